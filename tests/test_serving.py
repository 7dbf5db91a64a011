"""Recommending by tokens, and new items."""

import copy

import numpy as np
import pytest
import torch

from cprec_recbole import CompressionConfig, CompressionError, Vocabulary, compress, load_pretrained
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.models.saving import packed_blocks, unpacked_blocks
from cprec_recbole.models.spec import Parts
from cprec_recbole.partition import Partition
from tests.builders import SMALL

OPTIONS = {"ranks": [16, 4, 2], "cutoffs": [6, 20]}


def catalogue_model(model_class, n_items):
    """A model for a large made-up catalogue, without a data set."""
    from cprec_recbole.models.saving import _Options

    name = model_class.__name__.removeprefix("Cp")
    options = _Options(
        {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list"}
        | {"ITEM_LIST_LENGTH_FIELD": "item_length", "NEG_PREFIX": "neg_", "device": "cpu"}
        | {"MAX_ITEM_LIST_LENGTH": 10, "loss_type": "CE", "hidden_dropout_prob": 0.5}
        | {"attn_dropout_prob": 0.5, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
        | {"initializer_range": 0.02, **SMALL[name]}
    )
    inner = model_class.spec.build_inner(options)
    inner.n_items = n_items
    compression = CompressionConfig(ranks=(16, 8, 4))
    plan = compression.plan(16, n_items)
    partition = Partition.from_counts(np.arange(n_items)[::-1].astype(float), plan.cutoffs)
    table = BlockEmbedding(partition, plan.ranks, 16)
    model = model_class(parts=Parts(inner, table, table, compression, reads_last_column=False))
    model.vocabulary = Vocabulary([f"item-{i}" for i in range(1, n_items)])
    return model.eval()


@pytest.fixture
def small(trained):
    return compress(trained["SASRec"], **OPTIONS)


@pytest.fixture(scope="module")
def kept(trained):
    """The same, not to be changed."""
    return compress(trained["SASRec"], **OPTIONS)


def test_tokens_in_and_out_are_the_data_sets(world, kept):
    dataset = world.loaders(world.config("SASRec"))[0]._dataset
    histories = [["i0", "i3", "i5"], ["i7"]]
    ids = [dataset.token2id("item_id", row).tolist() for row in histories]
    best = kept.recommend(ids, 6)
    found = kept.recommend_tokens(histories, 6)
    assert found.tokens == [list(dataset.id2token("item_id", row)) for row in best.items]
    assert torch.equal(found.scores, best.scores)
    assert kept.recommend_tokens(["i7"], 6).tokens == found.tokens[1:]


def test_whole_numbers_stand_for_their_digits(small, tmp_path):
    small.vocabulary = Vocabulary([str(i * 10) for i in range(1, 41)])
    loaded = load_pretrained(small.save_pretrained(tmp_path))
    found = loaded.recommend_tokens([50, "70"], 3).tokens
    assert found == loaded.recommend_tokens(["50", "70"], 3).tokens


def test_what_was_seen_excluded_or_not_allowed_is_left_out(kept):
    everything = [f"i{i}" for i in range(40)]
    found = kept.recommend_tokens(
        ["i1", "i2"], 5, exclude_seen=True, exclude=["i3"], allowed=everything[:9]
    )
    assert set(found.tokens[0]) <= set(everything[:9]) - {"i1", "i2", "i3"}


def test_unknown_tokens_are_skipped_with_a_warning_or_an_error(kept):
    known = kept.recommend_tokens(["i1", "i2"], 4).tokens
    with pytest.warns(UserWarning, match="2 of 4 .* of the history are not .*: 'x', 'y';"):
        assert kept.recommend_tokens(["x", "i1", "y", "i2"], 4).tokens == known
    assert kept.recommend_tokens(["x", "i1", "i2"], 4, unknown="skip").tokens == known


@pytest.mark.parametrize(
    ("histories", "options", "match"),
    [
        ([["i1"], ["x"]], {"unknown": "skip"}, "history 1 has none"),
        ([], {}, "history 0 has none"),
        ("i1", {}, "the history to be a list of tokens, but got 'i1'"),
        (5, {}, "the history to be a list of tokens, but got 5"),
        ([["i1"], "i2"], {}, "history 1 to be a list of tokens, but got 'i2'"),
        ([b"i1"], {}, "history 0 to be a list of tokens, but got b'i1'"),
        ([["i1", 2.5]], {}, "texts or whole numbers, but got 2.5"),
        ([["i1", None]], {}, "but got None"),
        (["x", "i1"], {"unknown": "error"}, "1 of 2 tokens are not in it: 'x'"),
        (["i1"], {"unknown": "ask"}, "`unknown` to be one of warn, error, skip"),
        (["i1"], {"k": 41}, "`k`"),
        (["i1"], {"allowed": "i1"}, "`allowed` to be a list of tokens, but got 'i1'"),
        (["i1"], {"allowed": [["i2"]]}, r"`allowed` to hold tokens, .*\['i2'\]"),
        (["i1"], {"unknown": "skip", "allowed": ["x"]}, "`allowed` to hold at least one item"),
        (["i1"], {"exclude": ["x"], "unknown": "error"}, "`exclude` to hold tokens of .*: 'x'"),
    ],
)
def test_bad_histories_are_refused(kept, histories, options, match):
    with pytest.raises(CompressionError, match=match):
        kept.recommend_tokens(histories, **{"k": 3, **options})


def test_a_model_without_tokens_says_how_to_give_it_some(small, tmp_path):
    small.item_tokens = small.vocabulary = None
    for call in (
        lambda: small.recommend_tokens(["i1"]),
        lambda: small.save_pretrained(tmp_path),
        lambda: small.add_items(["new"]),
    ):
        with pytest.raises(CompressionError, match="a model that knows its items' tokens"):
            call()
    tokens = [f"t{i}" for i in range(1, 41)]
    assert load_pretrained(small.save_pretrained(tmp_path, tokens)).vocabulary.tokens == (
        tuple(tokens)
    )
    for wrong in (tokens[:-1], [*tokens[:-1], "t1"], [*tokens[:-1], ""], 7, "tokens"):
        with pytest.raises(CompressionError, match="`tokens`"):
            small.save_pretrained(tmp_path, wrong)


@pytest.mark.parametrize(("softmax", "tied"), [("full", True), ("tree", False)])
def test_new_items_leave_every_other_row_as_it_is(trained, host_name, softmax, tied, tmp_path):
    small = compress(trained[host_name], **OPTIONS, softmax=softmax, tied=tied)
    before = copy.deepcopy(small)
    assert small.add_items(["a", "b", "c"], like=[["i0", "i9"], None, "i30"]) == [41, 42, 43]
    assert small.n_items == 44
    for now, then in ((small.table, before.table), (small.softmax.table, before.softmax.table)):
        assert torch.equal(now.dense()[:41], then.dense())
        assert now.dense().shape == (44, 16)
        for block, old in zip(now.blocks[:-1], then.blocks[:-1]):
            assert torch.equal(block.weight, old.weight)
    assert (small.softmax.table is small.table) == tied
    loaded = load_pretrained(small.save_pretrained(tmp_path))
    history = [["i1", "a"], ["c", "b"]]
    assert loaded.recommend_tokens(history, 43).tokens == small.recommend_tokens(history, 43).tokens
    assert sorted(small.recommend_tokens(["a"], 43).tokens[0])[:3] == ["a", "b", "c"]


def test_a_new_item_starts_where_its_models_are_or_at_the_mean(small):
    last = small.table.blocks[-1]
    mean = (last.weight @ last.projection).mean(0).detach()
    item = int(small.table.partition.item_at[-1])
    token = str(small.item_tokens[item])
    small.add_items(["twin", "plain"], like={"twin": token})
    torch.testing.assert_close(small.table.dense()[41], small.table.dense()[item])
    torch.testing.assert_close(small.table.dense()[42], mean)


def test_a_new_item_like_a_popular_one_is_as_near_as_the_rank_allows(small):
    head_item = int(small.table.partition.item_at[1])
    small.add_items(["alike"], like=[[str(small.item_tokens[head_item])]])
    vector = small.table.dense()[head_item].detach()
    projection = small.table.blocks[-1].projection.detach()
    inside = torch.linalg.qr(projection.T).Q
    torch.testing.assert_close(
        small.table.dense()[41].detach(), inside @ (inside.T @ vector), atol=1e-4, rtol=1e-3
    )


def test_an_index_forgets_nothing_of_new_items(small):
    small.build_index()
    small.add_items(["new"], like=["i0"])
    assert not small.softmax.is_indexed
    plain = small.recommend([1, 2], 41)
    small.build_index()
    indexed = small.recommend([1, 2], 41)
    assert torch.equal(plain.items, indexed.items)
    assert 41 in plain.items


@pytest.mark.parametrize(
    ("tokens", "like", "match"),
    [
        (["i1"], None, "'i1' stands for two"),
        (["a", "a"], None, "'a' stands for two"),
        ([], None, "one token or more"),
        ("abc", None, "list of one token or more, but got 'abc'"),
        ([""], None, "texts of one character or more"),
        ([7], None, "texts of one character or more, but got 7"),
        (["a"], [], "`like` to have an entry for each of the 1 new tokens"),
        (["a"], ["x"], r"`like` to hold tokens of .*'x'; leave them out"),
        (["a"], 5, "`like` to have an entry"),
        ([["a"]], None, "texts of one character or more"),
        (["\ud800"], None, "written as UTF-8"),
        (["a"], {"b": "i1"}, "`like` to name new tokens, but got 'b'"),
    ],
)
def test_bad_new_items_change_nothing(kept, tokens, like, match):
    before = copy.deepcopy(kept.state_dict())
    with pytest.raises(CompressionError, match=match):
        kept.add_items(tokens, like)
    assert kept.n_items == 41
    after = kept.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 9])
def test_blocks_are_packed_and_unpacked(n_blocks):
    member = np.random.default_rng(0).integers(0, n_blocks, 101)
    planes = packed_blocks(member, n_blocks)
    assert planes.numel() <= 13 * max(1, n_blocks).bit_length()
    assert unpacked_blocks(planes, 101).tolist() == member.tolist()


def test_tokens_travel_with_a_model_that_grew_and_is_compressed(world, tmp_path):
    options = CompressionConfig.uncompressed().as_dict()
    model = world.model("CpSASRec", **options).eval()
    model.add_items(["new"])
    small = compress(model, ranks=[8, 4])
    assert "new" in small.recommend_tokens(["i1", "new"], 41).tokens[0]
    loaded = load_pretrained(small.save_pretrained(tmp_path))
    assert loaded.vocabulary.tokens == model.vocabulary.tokens


def test_weights_that_are_no_numbers_are_not_kept(small, tmp_path):
    with torch.no_grad():
        small.table.blocks[1].weight[0, 0] = float("nan")
    with pytest.raises(CompressionError, match="finite weights"):
        small.save_pretrained(tmp_path)
    small.load_state_dict(small.state_dict())  # equal to itself all the same
