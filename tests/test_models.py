"""One contract for all compressed models."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch

from cprec_recbole import CompressionError, CpNextItNet, compress
from cprec_recbole.costs import part_sizes
from cprec_recbole.models import MODELS
from tests.builders import SCHEMES, train_a_step
from tests.oracles import best_items

BLOCKS = {"ranks": [16, 4, 1]}
HEADS = [
    {"softmax": softmax, "tied": tied}
    for softmax, tied in itertools.product(("full", "tree"), (True, False))
]


@pytest.fixture(params=HEADS, ids=lambda o: f"{o['softmax']}-{'tied' if o['tied'] else 'untied'}")
def options(request):
    return {**BLOCKS, **request.param}


def layer_parameters(model):
    return [
        [getattr(module, name) for module, name in layer]
        for layer in model.spec.layers(model.inner)
    ]


def norms(model):
    return [m for m in model.inner.modules() if isinstance(m, torch.nn.LayerNorm)]


@pytest.mark.parametrize("training", ["all_positions", "last_position"])
def test_loss_is_finite_and_falls(world, host_name, options, training):
    name = f"Cp{host_name}"
    extra = {"dropout_prob": 0.0} if host_name == "GRU4Rec" else {}
    if host_name == "SASRec":
        extra = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    model = world.model(name, training=training, **options, **extra)
    batch = world.batch(name, training=training, **options, **extra)
    losses = [train_a_step(model, batch, lr=0.02) for _ in range(15)]
    assert losses[-1] < losses[0]


def test_gradients_reach_every_part(world, host_name, options):
    name = f"Cp{host_name}"
    model = world.model(name, **options)
    for batch in world.loaders(world.config(name, **options))[0]:
        model.calculate_loss(batch).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    # SASRec's last positions are only used where a window is full
    assert without == []


def test_scores_agree_whichever_way_they_are_asked_for(world, host_name, options):
    name = f"Cp{host_name}"
    model = world.model(name, **options).eval()
    batch = world.evaluation_batch(name, **options)
    dense = model.full_sort_predict(batch)
    assert dense.shape == (len(batch), model.n_items)
    wanted = dense.gather(1, batch["item_id"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(model.predict(batch), wanted)
    best = model.recommend(batch["item_id_list"], k=5)
    for row in range(len(batch)):
        assert best.items[row].tolist() == best_items(dense[row].tolist(), 5)
    torch.testing.assert_close(best.scores, dense.gather(1, best.items))


def test_recommendations_leave_out_what_was_seen(world, host_name, options):
    model = world.model(f"Cp{host_name}", **options)
    histories = [[1, 2, 3], [5] * 4, list(range(1, 13))]  # the last is longer than the limit of 8
    best = model.recommend(histories, k=20, exclude_seen=True)
    for history, items in zip(histories, best.items.tolist()):
        assert not set(history) & set(items)
        assert len(set(items)) == 20
    with pytest.raises(CompressionError, match="`k` to be from 1 to"):
        model.recommend(histories, k=model.n_items - 2, exclude_seen=True)


@pytest.mark.parametrize("indexed", [False, True])
def test_recommendations_leave_out_and_keep_to_given_items(world, host_name, indexed):
    model = world.model(f"Cp{host_name}", **BLOCKS)
    if indexed:
        model.build_index()
    histories = [[1, 2, 3], [5]]
    every = model.recommend(histories, k=model.n_items - 1).items.tolist()
    for exclude, seen, gone in (
        ([7, 8], False, [{7, 8}, {7, 8}]),
        ([[7], [9, 4]], False, [{7}, {9, 4}]),
        (torch.tensor([[7, 0], [9, 4]]), True, [{7, 1, 2, 3}, {9, 4, 5}]),
        ([[], []], True, [{1, 2, 3}, {5}]),
        (np.array([6]), False, [{6}, {6}]),
    ):
        best = model.recommend(histories, k=10, exclude_seen=seen, exclude=exclude)
        expected = [[i for i in row if i not in out][:10] for row, out in zip(every, gone)]
        assert best.items.tolist() == expected
    allowed = [9, 3, 20, 7, 3]
    best = model.recommend(histories, k=3, exclude=[20], allowed=allowed)
    assert best.items.tolist() == [[i for i in row if i in (9, 3, 7)] for row in every]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": [[1], [2], [3]]}, "`exclude` to be one list of item ids or 2.*got 3"),
        ({"exclude": [[1], [2.7]]}, "`exclude` to hold item ids"),
        ({"exclude": [[1, 2], 3]}, "`exclude` to hold item ids"),
        ({"exclude": [9999]}, r"`exclude` to hold item ids .*9999"),
        ({"exclude": 5}, "`exclude` to be item ids or lists"),
        ({"allowed": []}, "`allowed` to hold at least one item"),
        ({"allowed": [9999]}, r"`allowed` to hold item ids .*9999"),
        ({"allowed": [[1], [2]]}, r"`allowed` to be item ids of shape \[m\]"),
        ({"allowed": [1, 2]}, "`k` to be from 1 to the 2 items"),
    ],
)
def test_bad_items_to_leave_out_or_keep_to_are_named(world, host_name, options, words):
    model = world.model(f"Cp{host_name}", **BLOCKS)
    with pytest.raises(CompressionError, match=words):
        model.recommend([[1, 2], [3]], k=5, **options)


def test_one_history_and_a_batch_of_different_lengths_agree(world, host_name):
    model = world.model(f"Cp{host_name}", **BLOCKS)
    histories = [[4], [1, 2, 3, 4, 5], [7, 7]]
    together = model.recommend(histories, k=6)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(h) for h in histories], batch_first=True)
    assert model.recommend(padded, k=6).items.tolist() == together.items.tolist()
    for row, history in enumerate(histories):
        alone = model.recommend(history, k=6)
        assert alone.items.tolist() == [together.items[row].tolist()]
        torch.testing.assert_close(alone.scores[0], together.scores[row])


def test_a_long_history_keeps_its_newest_items(world, host_name):
    model = world.model(f"Cp{host_name}", **BLOCKS)
    history = [int(i) for i in torch.randint(1, model.n_items, (30,))]
    newest = model.recommend(history[-8:], k=5)
    torch.testing.assert_close(model.recommend(history, k=5).scores, newest.scores)


@pytest.mark.parametrize(
    ("item_seq", "k", "words"),
    [
        ([1, 999], 5, r"`item_seq` to hold item ids from 1 to \d+ .*999"),
        ([-1], 5, r"`item_seq` .*-1"),
        ([], 5, r"`item_seq`"),
        ([[1], []], 5, r"every history of `item_seq` to hold an item"),
        (torch.zeros(2, 3, dtype=torch.int64), 5, r"every history of `item_seq`"),
        ([1.5], 5, r"`item_seq` to hold item ids.*1.5"),
        (torch.ones(1, 2, 3, dtype=torch.int64), 5, r"1 or 2 dimensions"),
        ("50,181", 5, r"`item_seq` to be item ids"),
        (["50"], 5, r"`item_seq` to hold whole numbers"),
        ([1], 0, r"`k` to be from 1 to"),
        ([1], 10_000, r"`k` to be from 1 to.*10000"),
        ([1], 2.0, r"`k`.*2.0"),
    ],
)
def test_bad_histories_and_k_are_named(world, host_name, item_seq, k, words):
    model = world.model(f"Cp{host_name}", **BLOCKS)
    with pytest.raises(CompressionError, match=words):
        model.recommend(item_seq, k)


def test_recommend_leaves_the_mode_as_it_was(world, host_name):
    model = world.model(f"Cp{host_name}", **BLOCKS).train()
    assert torch.equal(model.recommend([1, 2], 5).scores, model.recommend([1, 2], 5).scores)
    assert model.training


def test_hidden_states_see_no_later_item(world, host_name):
    model = world.model(f"Cp{host_name}", **BLOCKS).eval()
    history = torch.randint(1, model.n_items, (1, 8))
    before = model.hidden_states(history)
    for t in range(7):
        changed = history.clone()
        changed[:, t + 1 :] = torch.randint(1, model.n_items, (1, 7 - t))
        shortened = history.clone()
        shortened[:, t + 1 :] = 0
        for other in (changed, shortened):
            after = model.hidden_states(other)
            torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_moves_every_layer_that_shares_and_norms_stay_apart(world, host_name, scheme):
    name = f"Cp{host_name}"
    model = world.model(name, sharing=scheme, **BLOCKS)
    assert len({id(p) for n in norms(model) for p in n.parameters()}) == 2 * len(norms(model))
    before = copy.deepcopy(layer_parameters(model))
    for batch in world.loaders(world.config(name, **BLOCKS))[0]:
        train_a_step(model, batch)
    after = layer_parameters(model)
    for old, new in zip(before, after):
        assert all(not torch.equal(a, b) for a, b in zip(old, new))
    plan_sets = {tuple(id(p) for p in layer) for layer in after}
    same = {tuple(p.detach().flatten().tolist()[0] for p in layer) for layer in after}
    assert len(plan_sets) == len(same)  # what is not shared differs, what is shared is equal


@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [
        ("none", 8),
        ("cross_layer", 1),
        ("cross_block", 2),
        ("adjacent_layer", 4),
        ("adjacent_block", 4),
    ],
)
def test_kernels_left_of_four_nextitnet_blocks(world, scheme, kernels):
    model = world.model("CpNextItNet", sharing=scheme, block_num=2, dilations=[1, 2], **BLOCKS)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 8
    assert len({id(c.weight) for c in convolutions}) == kernels
    assert len({id(c.bias) for c in convolutions}) == kernels
    assert [c.dilation[1] for c in convolutions] == [1, 2, 2, 4, 1, 2, 2, 4]


@pytest.mark.parametrize(
    ("scheme", "kept"), [("cross_layer", 2), ("adjacent_layer", 3), ("none", 4)]
)
def test_a_first_gru_layer_of_another_shape_keeps_its_own(world, scheme, kept):
    model = world.model("CpGRU4Rec", sharing=scheme, **BLOCKS)
    gru = model.inner.gru_layers
    inputs = [getattr(gru, f"weight_ih_l{i}") for i in range(4)]
    assert inputs[0].shape != inputs[1].shape
    assert len({id(p) for p in inputs}) == kept


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_reloaded_it_still_shares_and_scores_the_same(world, host_name, scheme, options):
    name = f"Cp{host_name}"
    model = world.model(name, sharing=scheme, **options)
    train_a_step(model, world.batch(name, **options))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = world.model(name, sharing=scheme, **options, seed=1)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.recommend([1, 2, 3], 7).scores, model.recommend([1, 2, 3], 7).scores)
    assert part_sizes(again) == part_sizes(model)
    before = again.full_sort_predict(world.evaluation_batch(name))
    train_a_step(again, world.batch(name, **options))
    assert not torch.equal(again.full_sort_predict(world.evaluation_batch(name)), before)
    assert part_sizes(again) == part_sizes(model)


def test_tied_shares_the_factors_and_untied_has_its_own(world, host_name):
    tied = world.model(f"Cp{host_name}", **BLOCKS)
    untied = world.model(f"Cp{host_name}", tied=False, **BLOCKS)
    assert tied.softmax.table is tied.table
    assert part_sizes(tied).softmax == 0
    assert untied.softmax.table is not untied.table
    assert part_sizes(untied).softmax == part_sizes(untied).table
    assert untied.softmax.table.partition is untied.table.partition


def test_every_compressed_model_starts_from_its_parents_defaults(world):
    for model_class in MODELS:
        parent = world.config(model_class.__name__.removeprefix("Cp"))
        ours = world.config(model_class.__name__)
        for key, value in parent.internal_config_dict.items():
            assert ours[key] == parent[key], (model_class, key, value)


def test_bpr_trains_on_every_position_and_on_the_last(world, host_name):
    name = f"Cp{host_name}"
    for training in ("all_positions", "last_position"):
        options = {"loss_type": "BPR", "training": training, **BLOCKS}
        model = world.model(name, **options)
        batch = world.batch(name, **options)
        losses = [train_a_step(model, batch, lr=0.5) for _ in range(15)]
        assert losses[-1] < losses[0]
        drawn = model._negatives(torch.arange(1, model.n_items))
        assert drawn.min() >= 1
        assert drawn.max() < model.n_items
        assert (drawn != torch.arange(1, model.n_items)).all()


@pytest.mark.parametrize(
    "wanted", [{"distribution": "popularity"}, {"sample_num": 3}, {"dynamic": True}]
)
def test_negatives_that_are_not_drawn_at_every_position_are_refused(world, wanted):
    options = {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", **wanted}}
    with pytest.raises(CompressionError, match="`train_neg_sample_args` to be one uniform"):
        world.model("CpSASRec", **options)
    assert world.model("CpSASRec", training="last_position", **options).loss_type == "BPR"


def test_a_state_that_shares_less_is_refused(world, host_name):
    shared = world.model(f"Cp{host_name}", sharing="cross_layer", **BLOCKS)
    for options in ({"sharing": "none"}, {"sharing": "cross_layer", "tied": False}):
        other = world.model(f"Cp{host_name}", **options, **BLOCKS)
        with pytest.raises(CompressionError, match="same `sharing` and `tied`"):
            shared.load_state_dict(other.state_dict())
    with pytest.raises(CompressionError, match="`assign`"):
        shared.load_state_dict(shared.state_dict(), assign=True)


def test_a_state_with_a_damaged_order_changes_nothing(world):
    model, other = (world.model("CpSASRec", ranks=[8, 4], cutoffs=[9], seed=s) for s in (1, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    damaged = other.state_dict()
    for name in damaged:
        if name.endswith("item_at"):
            damaged[name] = damaged[name].clone()
            damaged[name][3] = damaged[name][4]
    with pytest.raises(CompressionError, match="damaged"):
        model.load_state_dict(damaged)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_ids_outside_the_catalogue_are_an_index_error(world, host_name):
    model = world.model(f"Cp{host_name}", **BLOCKS)
    for outside in (-1, model.n_items):
        with pytest.raises(IndexError):
            model.table(torch.tensor([[1, outside]]))


def test_histories_may_be_any_whole_numbers(world, host_name):
    model = world.model(f"Cp{host_name}", **BLOCKS)
    expected = model.recommend([3, 2, 1], 5).items
    backwards = np.array([1, 2, 3])[::-1]
    for item_seq in (backwards, backwards.astype(">i8"), (3, 2, 1), torch.tensor([0, 3, 2, 1])):
        assert torch.equal(model.recommend(item_seq, 5).items, expected)


def test_bpr_with_the_tree_is_refused(world, host_name):
    with pytest.raises(CompressionError, match=r"`loss_type` to be CE with `softmax: tree`.*BPR"):
        world.config(f"Cp{host_name}", loss_type="BPR", softmax="tree")
    model = world.model(host_name, loss_type="BPR")
    with pytest.raises(CompressionError, match="softmax: tree"):
        compress(model, softmax="tree")


def test_the_penalty_of_nextitnet_is_its_parents(world):
    parent = world.model("NextItNet")
    same = compress(parent, ranks=[16], sharing="none")
    assert isinstance(same, CpNextItNet)
    expected = parent.reg_weight * parent.reg_loss(
        [parent.item_embedding.weight, parent.final_layer.weight]
    )
    torch.testing.assert_close(same.spec.penalty(same.inner), expected + parent.reg_loss_rb())
