"""The search against a dense sort in float64, with thresholds moved so that small catalogues take
every path that large ones do."""

import copy
import io
import math
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec_recbole import CompressionError, FullSoftmax, TreeSoftmax
from cprec_recbole.search import compiled, exact, kernel
from tests.builders import block_embedding
from tests.oracles import best_by_sort

HEADS = [FullSoftmax, TreeSoftmax]
SIZES, RANKS, DIM = (60, 300, 700), (8, 4, 2), 8


def build(head_class, sizes=SIZES, ranks=RANKS, dim=DIM):
    head = head_class(block_embedding(sizes, ranks, dim))
    if head_class is TreeSoftmax:
        torch.nn.init.normal_(head.clusters)
    return head


WAYS = ("torch", "compiled", "indexed")  # that give the same result


@contextmanager
def way(name, head=None, **moved):
    """Within, a search takes one of the ways, with thresholds moved; `indexed` indexes the head."""
    with thresholds(**moved), mock.patch.object(compiled, "loops", NO_LOOPS[name]):
        if head is not None:
            head.drop_index()
            if name == "indexed":
                head.build_index()
                assert head.is_indexed
        yield


NO_LOOPS = {"torch": lambda: None, "compiled": compiled.loops, "indexed": compiled.loops}


def thresholds(*, keeps=False, piece=2**19, most=2**21):
    """Where the search changes its ways: the smallest catalogue is read in pieces and indexed."""
    stack = ExitStack()
    for module, name, value in (
        (exact, "_FEW_LOGITS", 2**22 if keeps else 0),
        (exact, "_MOST", most),
        (exact, "_PIECE", piece),
        (compiled, "_PIECE", piece),
        (compiled, "_MIN_ROWS", 1),
        (compiled, "_LARGE_HEAD", 1),
    ):
        stack.enter_context(mock.patch.object(module, name, value))
    return stack


def check(head, hidden, k, exclude=None, allowed=None):
    found = head.topk(hidden, k, exclude, allowed)
    items, scores = best_by_sort(head, hidden, k, exclude, allowed)
    assert torch.equal(found.items, items)
    torch.testing.assert_close(found.scores, scores, rtol=2e-5, atol=2e-5)


@settings(deadline=None, max_examples=300)
@given(
    head_class=st.sampled_from(HEADS),
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    batch=st.sampled_from([1, 2, 31, 33, 70]),
    wanted=st.one_of(st.integers(1, 12), st.floats(0, 1)),  # items, or a share of them
    exclude=st.sampled_from([None, (1,), (7,), (40,), "shared"]),
    allow=st.sampled_from([None, 1.0, 0.5, 0.02]),
    tied=st.booleans(),
    name=st.sampled_from(WAYS),
    piece=st.sampled_from([64, 3000, 2**21]),
    most=st.sampled_from([50, 2**21]),
    keeps=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_search_is_a_dense_sort(
    head_class, sizes, batch, wanted, exclude, allow, tied, name, piece, most, keeps, seed
):
    torch.manual_seed(seed)
    sizes = (sizes[0] + 1, *sizes[1:])
    head = build(head_class, sizes, tuple(min(DIM, 2 ** (3 - j)) for j in range(len(sizes))))
    hidden = torch.randn(batch, DIM)
    if tied:  # products of small whole numbers: many equal scores
        with torch.no_grad():
            for parameter in head.table.parameters():
                parameter.round_()
        hidden = hidden.round()
    n_items = sum(sizes)
    barred = allowed = None
    if exclude is not None:
        shape = (12,) if exclude == "shared" else (batch, *exclude)
        barred = torch.randint(0, n_items, shape)
    if allow is not None:
        allowed = torch.randperm(n_items)[: max(1, int(allow * n_items))]
    real = set(range(1, n_items) if allowed is None else allowed.tolist()) - {0}
    rows = [] if barred is None else barred.expand(batch, -1).tolist()
    left = min([len(real - set(row)) for row in rows], default=len(real))
    if not left:
        return
    k = min(wanted, left) if isinstance(wanted, int) else max(1, round(wanted * left))
    with way(name, head, piece=piece, most=most, keeps=keeps):
        check(head, hidden, k, barred, allowed)


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("batch", [1, 300])
def test_a_large_catalogue_is_searched_exactly(head_class, name, batch):
    head = build(head_class, (2_000, 48_000, 250_000), (16, 8, 4), 16)
    with torch.no_grad():  # concentrated like trained factors, so that bounds do skip
        for block, spread in zip(head.table.blocks, (0.6, 0.5, 0.3)):
            centres = torch.randn(50, block.weight.shape[1])
            near = centres[torch.randint(50, (len(block.weight),))]
            block.weight.copy_(spread * (near + 0.2 * torch.randn_like(near)))
    hidden, barred = torch.randn(batch, 16), torch.randint(0, 300_000, (min(64, batch), 30))
    with mock.patch.object(compiled, "loops", NO_LOOPS[name]):
        if name == "indexed":
            head.build_index()
            assert head.search(hidden[:1], 20).tail_share < 1
        check(head, hidden[:64], 20, exclude=barred)


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("keeps", [True, False])
def test_a_result_does_not_depend_on_batch_pieces_index_or_way(head_class, keeps):
    head = build(head_class)
    with torch.no_grad():  # pairs of rows that float32 hardly tells apart
        for block in head.table.blocks:
            half = len(block.weight) // 2
            block.weight[half : 2 * half] = block.weight[:half] * (1 + 1e-7 * torch.randn(half, 1))
    hidden = torch.randn(70, DIM)
    found = []
    for name in WAYS:
        with way(name, head, keeps=keeps):
            found.append(head.topk(hidden, 30))
            alone = [head.topk(row.unsqueeze(0), 30) for row in hidden]
            found.append([torch.cat(part) for part in zip(*alone)])
            with thresholds(piece=100, keeps=keeps):
                found.append([part.flip(0) for part in head.topk(hidden.flip(0), 30)])
    for items, scores in found:
        assert torch.equal(items, found[0].items)
        if head_class is FullSoftmax:
            assert torch.equal(scores, found[0].scores)
        torch.testing.assert_close(scores, found[0].scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("piece", [200, 2**19])
def test_scores_that_all_tie_come_by_lower_id(head_class, name, piece):
    head = build(head_class)
    with torch.no_grad():
        for block in head.table.blocks:
            block.weight.zero_()
    with way(name, head, piece=piece, most=300):
        hidden = torch.randn(3, DIM)
        check(head, hidden, 20, exclude=torch.tensor([[1, 2], [0, 0], [5, 5]]))


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_a_hidden_state_of_zeros_gets_the_lowest_ids(name, keeps):
    head = build(FullSoftmax)
    hidden = torch.randn(3, DIM)
    hidden[1] = 0
    with way(name, head, keeps=keeps):
        assert head.topk(hidden, 9).items[1].tolist() == list(range(1, 10))
        check(head, hidden, 9)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_a_row_keep_the_order_of_their_ids(name, dtype):
    head = build(FullSoftmax).to(dtype)
    with torch.no_grad():
        for block in head.table.blocks:  # every row several times, far from each other
            block.weight.copy_(block.weight[torch.randint(7, (len(block.weight),))])
    with way(name, head):
        hidden = torch.randn(40, DIM).to(dtype)
        found = head.topk(hidden, 25)
        tied = found.scores[:, 1:] == found.scores[:, :-1]
        assert tied.any()
        assert (found.items.diff(dim=1) > 0)[tied].all()
        torch.testing.assert_close(found.scores, best_by_sort(head, hidden, 25)[1])


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_near_ties_between_blocks_whose_logits_cancel(name, keeps):
    """Rounding of the normalisers alone may turn the order of two blocks around."""
    head = build(TreeSoftmax, (40, 60, 60), (8, 8, 8))
    with torch.no_grad():
        for block in head.table.blocks:
            block.weight[:, 0], block.weight[:, 1] = 300.0, -300.0
        rows = head.table.blocks[1].weight
        head.table.blocks[2].weight.copy_(rows + 1e-6 * torch.randn_like(rows))
        head.clusters[1] = head.clusters[0]
    hidden = torch.randn(40, DIM)
    hidden[:, 1] = hidden[:, 0] + 0.01 * torch.randn(40)
    with way(name, head, keeps=keeps):
        found = head.topk(hidden, 5)
    items, scores = best_by_sort(head, hidden, 5)
    assert torch.equal(found.items, items)
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", WAYS)
def test_a_tree_with_blocks_of_equal_rows(name):
    """The bound of such a block's normaliser is its very value."""
    head = build(TreeSoftmax, (40, 600, 600), (8, 4, 4))
    with torch.no_grad():
        for block in head.table.blocks[1:]:
            block.weight.copy_(block.weight[:1].expand_as(block.weight))
    with way(name, head):
        check(head, torch.randn(40, DIM), 30)


def test_equal_rows_can_be_indexed():
    head = build(FullSoftmax, (5, 3000), (16, 16), 16)
    with torch.no_grad():
        rows = head.table.blocks[1].weight
        rows.copy_(rows[:3].repeat(1000, 1))
    with way("indexed", head):
        check(head, torch.randn(2, 16), 5)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("head_class", HEADS)
def test_the_whole_head_excluded_and_part_of_the_tail_allowed(head_class, name):
    head = build(head_class, (500, 20_000, 60_000))
    order = head.table.partition.item_at.long()
    tail = order[500 + torch.randperm(80_000)[:40_000]]
    allowed = torch.cat([tail, order[:9]])
    with way(name, head):
        check(head, torch.randn(3, DIM), 7, exclude=order[:500], allowed=allowed)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_float32_is_not_trusted_where_it_cannot_tell(name, keeps):
    head = build(FullSoftmax, (3, 600), (8, 8))
    with torch.no_grad():
        rows = head.table.blocks[1].weight
        rows.copy_(rows[:1].expand_as(rows))
        rows[:, 0] += torch.randn(600) * 1e-7  # differences that a product in float32 loses
    with way(name, head, keeps=keeps):
        check(head, 3 + torch.randn(20, DIM), 30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_class", HEADS)
def test_other_precisions(head_class, dtype):
    head = build(head_class).to(dtype)
    for name in WAYS if dtype != torch.float64 else WAYS[:1]:
        with way(name, head):
            check(head, torch.randn(5, DIM).to(dtype), 20)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("head_class", HEADS)
def test_autocast_does_not_make_it_inexact(head_class, name, keeps):
    head, hidden = build(head_class), torch.randn(1, DIM)
    with way(name, head, keeps=keeps), torch.autocast("cpu", dtype=torch.bfloat16):
        found = head.topk(hidden, 20)
    assert torch.equal(found.items, best_by_sort(head, hidden, 20)[0])


def test_inference_mode_inside_and_outside():
    head, hidden = build(TreeSoftmax), torch.randn(3, DIM)
    with thresholds():
        with torch.inference_mode():
            head.build_index()
            inside = head.topk(hidden, 20)
        assert head.is_indexed
        assert torch.equal(head.topk(hidden, 20).items, inside.items)


def test_an_empty_batch_has_an_empty_result():
    found = build(FullSoftmax).topk(torch.empty(0, DIM), 5)
    assert found.items.shape == found.scores.shape == (0, 5)


def test_hidden_states_that_need_a_gradient_are_searched_without_one():
    hidden = torch.randn(2, DIM, requires_grad=True)
    assert not build(FullSoftmax).topk(hidden, 5).scores.requires_grad


# -- the index ------------------------------------------------------------------------------------


def optimizer_step(head, **kind):
    optimizer = torch.optim.Adam(head.parameters(), lr=0.5, **kind)
    head.loss(torch.randn(50, DIM), torch.randint(1, sum(SIZES), (50,))).backward()
    optimizer.step()


def replace_a_parameter(head):
    block = head.table.blocks[1]
    block.weight = torch.nn.Parameter(torch.randn_like(block.weight))


def replace_a_block(head):
    head.table.factors[1] = block_embedding(SIZES, RANKS, DIM).factors[1]


def replace_the_numbers(head):
    for parameter in head.parameters():  # as an average of weights is put in place
        parameter.data = -1.5 * parameter.data


CHANGES = {
    "another block": replace_a_block,
    "a step of Adam": lambda head: optimizer_step(head, foreach=False),
    "a step of Adam, foreach": lambda head: optimizer_step(head, foreach=True),
    "a step of Adam, fused": lambda head: optimizer_step(head, fused=True),
    "a loaded state": lambda head: head.load_state_dict(build(type(head)).state_dict()),
    "other numbers": replace_the_numbers,
    "another parameter": replace_a_parameter,
    "another precision": lambda head: head.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("head_class", HEADS)
def test_the_index_is_dropped_when_weights_change(head_class, change):
    head = build(head_class)
    with thresholds():
        head.build_index()
        assert head.is_indexed
        CHANGES[change](head)
        assert not head.is_indexed
        hidden = torch.randn(4, DIM, dtype=head.table.blocks[0].weight.dtype)
        check(head, hidden, 20)


def test_an_index_is_made_by_itself_once_it_pays():
    head = build(FullSoftmax)
    with thresholds(), mock.patch.object(compiled, "_ROWS_THAT_PAY", 5):
        for number in (2, 4):
            head.topk(torch.randn(2, DIM), 5)
            assert not head.is_indexed, number
        head.topk(torch.randn(2, DIM), 5)
        assert head.is_indexed
        head.drop_index()
        assert not head.is_indexed


def test_the_index_is_no_part_of_the_models_state():
    head = build(TreeSoftmax)
    names = set(head.state_dict())
    with thresholds():
        head.build_index()
        assert set(head.state_dict()) == names
        buffer = io.BytesIO()
        torch.save(head, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(head), torch.load(buffer, weights_only=False)):
            assert not other.is_indexed
            hidden = torch.randn(3, DIM)
            assert torch.equal(other.topk(hidden, 9).items, head.topk(hidden, 9).items)
        assert head.is_indexed


def test_a_small_block_is_not_indexed():
    head = build(FullSoftmax)
    head.build_index()
    assert head.search(torch.randn(2, DIM), 5).tail_share == 1


@settings(deadline=None, max_examples=100)
@given(
    n_rows=st.integers(1, 3000),
    rank=st.sampled_from([1, 3, 8, 16]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_an_order_by_nearness_holds_every_row_once(n_rows, rank, spread, seed):
    rng = np.random.default_rng(seed)
    rows = (spread * rng.standard_normal((n_rows, rank))).astype(np.float32)
    rows[n_rows // 2 :] = rows[: n_rows - n_rows // 2]  # copies
    for depth in range(4):
        order = kernel.sort_by_nearness(rows, -(-n_rows >> depth), depth)
        assert sorted(order.tolist()) == list(range(n_rows))


def test_rows_apart_come_into_groups_of_their_own():
    centres = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0], [0.0, -9.0]])
    cluster = torch.arange(4).repeat(100)
    rows = (centres[cluster] + torch.rand(400, 2)).numpy()
    groups = cluster[kernel.sort_by_nearness(rows, 100, 2)].view(4, 100)
    assert (groups == groups[:, :1]).all()
    assert sorted(groups[:, 0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("head_class", HEADS)
def test_several_threads_find_the_same(head_class):
    head, hidden = build(head_class), torch.randn(70, DIM)
    with way("indexed", head), mock.patch.object(compiled, "_ROWS_OF_A_THREAD", 7):
        one = head.topk(hidden, 9)
        with mock.patch.object(torch, "get_num_threads", return_value=3):
            three = head.topk(hidden, 9)
    assert torch.equal(one.items, three.items)
    assert torch.equal(one.scores, three.scores)


# -- bad input ------------------------------------------------------------------------------------

BAD = {
    "not a number": (dict(hidden=torch.full((2, DIM), torch.nan)), "`hidden` to hold finite"),
    "infinite": (dict(hidden=torch.full((1, DIM), torch.inf)), "`hidden` to hold finite"),
    "one dimension": (
        dict(hidden=torch.randn(DIM)),
        r"`hidden` to be real numbers of shape \[B, 8\].*\[8\]",
    ),
    "too wide": (
        dict(hidden=torch.randn(2, 9)),
        r"`hidden` to be real numbers of shape \[B, 8\].*\[2, 9\]",
    ),
    "whole numbers": (
        dict(hidden=torch.ones(1, DIM, dtype=torch.int64)),
        r"`hidden` to be real numbers .* torch.int64",
    ),
    "k of zero": (dict(k=0), "`k` to be from 1 to the 1059 items .* got 0"),
    "k too large": (dict(k=1060), "`k` to be from 1 to the 1059 items .* got 1060"),
    "k no number": (dict(k=2.5), "`k` to be from 1 .* got 2.5"),
    "k a truth": (dict(k=True), "`k` to be from 1 .* got True"),
    "exclude too large": (dict(exclude=torch.tensor([3, 1060])), "`exclude` .* 1 to 1059.* 1060"),
    "exclude negative": (dict(exclude=torch.tensor([[-1], [2]])), "`exclude` .* got -1"),
    "exclude broken": (dict(exclude=torch.tensor([1.0])), "`exclude` to hold item ids.*float32"),
    "exclude a mask": (dict(exclude=torch.ones(2, 4, dtype=torch.bool)), "`exclude` .*bool"),
    "exclude for three": (dict(exclude=torch.ones(3, 4).long()), r"`exclude` .*\[2, m\].*\[3, 4\]"),
    "exclude all": (dict(exclude=torch.arange(1060)), "`k` to be from 1 to the 0 items"),
    "all but three": (dict(exclude=torch.arange(4, 1060)), "`k` to be from 1 to the 3 items"),
    "allow nothing": (dict(allowed=torch.empty(0).long()), "`allowed` to hold at least one"),
    "allow padding": (dict(allowed=torch.tensor([0])), "`allowed` to hold at least one"),
    "allow too large": (dict(allowed=torch.tensor([1060])), "`allowed` .* 1 to 1059.* got 1060"),
    "allow by row": (dict(allowed=torch.ones(2, 2).long()), r"`allowed` .*\[m\].*\[2, 2\]"),
    "allow too few": (dict(allowed=torch.tensor([7, 7, 9])), "`k` to be from 1 to the 2 items"),
    "allow only the excluded": (
        dict(allowed=torch.tensor([7, 9]), exclude=torch.tensor([7, 9])),
        "`k` to be from 1 to the 0 items",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_bad_input_is_named(name, keeps, bad):
    options, message = BAD[bad]
    for head in map(build, HEADS):
        with way(name, head, keeps=keeps), pytest.raises(CompressionError, match=message):
            head.topk(**{"hidden": torch.randn(2, DIM), "k": 5, **options})


@pytest.mark.parametrize("name", ["exclude", "allowed"])
@pytest.mark.parametrize(
    "ids",
    [[None], ["1"], [2**70], {1, 2}, [[1, 2], 3], [1.5], [True]],
    ids=["none", "text", "huge", "set", "ragged", "fraction", "truth"],
)
def test_ids_of_other_kinds_are_named(name, ids):
    with pytest.raises(CompressionError, match=f"`{name}` to "):
        build(FullSoftmax).topk(torch.randn(2, DIM), 5, **{name: ids})


def test_ids_come_as_lists_and_arrays_too():
    head, hidden = build(FullSoftmax), torch.randn(2, DIM)
    expected = head.topk(hidden, 5, exclude=torch.tensor([3, 4]), allowed=torch.arange(1, 40))
    arrays = np.array([4, 3], dtype=np.uint16)[::-1], np.arange(1, 40, dtype=">i4")
    for exclude, allowed in (([3, 4], range(1, 40)), arrays):
        assert torch.equal(head.topk(hidden, 5, exclude, allowed).items, expected.items)


@pytest.mark.parametrize(
    ("value", "words"),
    [(math.nan, "to be finite"), (math.inf, "to be finite"), (1e18, "shorter than 1e")],
)
def test_weights_that_cannot_be_searched_are_named(value, words):
    head = build(FullSoftmax)
    with torch.no_grad():
        head.table.blocks[1].weight[5] = value
    with pytest.raises(CompressionError, match=words):
        head.topk(torch.randn(1, DIM), 3)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("head_class", HEADS)
def test_scores_that_overflow_are_named(head_class, name, keeps, batch):
    head = build(head_class)
    with torch.no_grad():
        head.table.blocks[0].weight.mul_(1e12)
    with way(name, head, keeps=keeps), pytest.raises(CompressionError, match="overflow"):
        head.topk(torch.full((batch, DIM), 1e30), 3)
