"""The search against a dense sort in float64, with thresholds moved so that small catalogues take
every path that large ones do."""

import copy
import io
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cprec_recbole import CompressionError, FullSoftmax, TreeSoftmax
from cprec_recbole.search import index, reading, settle, sorting
from cprec_recbole.search import pruned as search
from cprec_recbole.search.bounds import Bounds, Reach, group_rows
from cprec_recbole.search.topk import Barred
from tests.builders import block_embedding
from tests.oracles import best_by_sort

HEADS = [FullSoftmax, TreeSoftmax]
SIZES, RANKS, DIM = (60, 300, 700), (8, 4, 2), 8


def build(head_class, sizes=SIZES, ranks=RANKS, dim=DIM):
    head = head_class(block_embedding(sizes, ranks, dim))
    if head_class is TreeSoftmax:
        torch.nn.init.normal_(head.clusters)
    return head


def thresholds(*, sort=(0, 0), few=2**18, piece=2**21, rows=256):
    """Where the search changes its ways; the smallest catalogue is searched, not sorted."""
    stack = ExitStack()
    for module, name, value in (
        (sorting, "MOST_ITEMS", sort[0]),
        (sorting, "MOST_SCORES", sort[1]),
        (search, "_FEW", few),
        (search, "_ROWS", rows),
        (reading, "PIECE", piece),
        (index, "_MIN_ROWS", 1),
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
    indexed=st.booleans(),
    few=st.sampled_from([0, 500, 2**18]),
    piece=st.sampled_from([64, 3000, 2**21]),
    sort=st.sampled_from([(0, 0), (2**15, 2**18)]),
    seed=st.integers(0, 2**31),
)
def test_a_search_is_a_dense_sort(
    head_class, sizes, batch, wanted, exclude, allow, tied, indexed, few, piece, sort, seed
):
    torch.manual_seed(seed)
    sizes = (sizes[0] + 1, *sizes[1:])
    head = build(head_class, sizes, tuple(min(DIM, 2 ** (3 - j)) for j in range(len(sizes))))
    hidden = torch.randn(batch, DIM)
    if tied:  # products of small whole numbers: many equal scores
        for block in head.table.blocks:
            for parameter in block.parameters():
                parameter.data = parameter.data.round()
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
    with thresholds(few=few, piece=piece, sort=sort):
        if indexed:
            head.build_index()
        check(head, hidden, k, barred, allowed)


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("batch", [1, 300])
def test_a_large_catalogue_is_searched_exactly(head_class, indexed, batch):
    head = build(head_class, (2_000, 48_000, 250_000), (16, 8, 4), 16)
    with torch.no_grad():  # concentrated like trained factors, so that bounds do skip
        for block, spread in zip(head.table.blocks, (0.6, 0.5, 0.3)):
            centres = torch.randn(50, block.weight.shape[1])
            near = centres[torch.randint(50, (len(block.weight),))]
            block.weight.copy_(spread * (near + 0.2 * torch.randn_like(near)))
    hidden = torch.randn(batch, 16)
    if indexed:
        head.build_index()
        assert head.search(hidden[:1], 20).tail_share < 1
    check(head, hidden[:64], 20, exclude=torch.randint(0, 300_000, (min(64, batch), 30)))
    everyone = head.topk(hidden, 20)
    for row in (0, batch - 1):
        alone = head.topk(hidden[row : row + 1], 20)
        assert torch.equal(alone.items[0], everyone.items[row])


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("piece", [200, 2**21])
def test_scores_that_all_tie_come_by_lower_id(head_class, indexed, piece):
    head = build(head_class)
    with thresholds(piece=piece), torch.no_grad():
        for block in head.table.blocks:
            block.weight.zero_()
        if indexed:
            head.build_index()
        check(head, torch.randn(3, DIM), 20, exclude=torch.tensor([[1, 2], [0, 0], [5, 5]]))


@pytest.mark.parametrize("indexed", [False, True])
def test_copies_of_a_row_keep_the_order_of_their_ids(indexed):
    head = build(FullSoftmax)
    with thresholds(), torch.no_grad():
        for block in head.table.blocks:  # every row several times, far from each other
            block.weight.copy_(block.weight[torch.randint(7, (len(block.weight),))])
        if indexed:
            head.build_index()
        check(head, torch.randn(40, DIM), 25)


def test_near_ties_between_blocks_whose_logits_cancel():
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
    for sort in ((0, 0), (2**15, 2**18)):
        with thresholds(sort=sort):
            head.drop_index()
            found = head.topk(hidden, 5)
            items, scores = best_by_sort(head, hidden, 5)
            assert torch.equal(found.items, items)
            torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-3)


def test_equal_rows_can_be_grouped():
    for seed in range(10):
        torch.manual_seed(seed)
        head = build(FullSoftmax, (5, 3000), (16, 16), 16)
        with thresholds(), torch.no_grad():
            rows = head.table.blocks[1].weight
            rows.copy_(rows[:3].repeat(1000, 1))
            head.build_index()
            check(head, torch.randn(2, 16), 5)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("head_class", HEADS)
def test_the_whole_head_excluded_and_part_of_the_tail_allowed(head_class, indexed):
    head = build(head_class, (500, 20_000, 60_000))
    if indexed:
        head.build_index()
    order = head.table.partition.item_at.long()
    allowed = order[500 + torch.randperm(80_000)[:40_000]]
    check(
        head, torch.randn(3, DIM), 7, exclude=order[:500], allowed=torch.cat([allowed, order[:9]])
    )


def test_float32_is_not_trusted_where_it_cannot_tell():
    head = build(FullSoftmax, (3, 600), (8, 8))
    with thresholds(), torch.no_grad():
        rows = head.table.blocks[1].weight
        rows.copy_(rows[:1].expand_as(rows))
        rows[:, 0] += torch.randn(600) * 1e-7  # differences that a product in float32 loses
        check(head, 3 + torch.randn(20, DIM), 30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_class", HEADS)
def test_other_precisions(head_class, dtype):
    head = build(head_class).to(dtype)
    with thresholds():
        for indexed in (False, True):
            if indexed:
                head.build_index()
            check(head, torch.randn(5, DIM).to(dtype), 20)


@pytest.mark.parametrize("sort", [(0, 0), (2**15, 2**18)])
@pytest.mark.parametrize("head_class", HEADS)
def test_autocast_does_not_make_it_inexact(head_class, sort):
    head, hidden = build(head_class), torch.randn(1, DIM)
    with thresholds(sort=sort), torch.autocast("cpu", dtype=torch.bfloat16):
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


def test_an_untied_head_searches_its_own_factors():
    head = build(FullSoftmax)
    other = FullSoftmax(block_embedding(SIZES, RANKS, DIM))
    other.table.partition = head.table.partition
    hidden = torch.randn(4, DIM)
    check(other, hidden, 10)
    assert not torch.equal(head.topk(hidden, 10).items, other.topk(hidden, 10).items)


# -- the index ------------------------------------------------------------------------------------


def optimizer_step(head, **kind):
    optimizer = torch.optim.Adam(head.parameters(), lr=0.5, **kind)
    head.loss(torch.randn(50, DIM), torch.randint(1, sum(SIZES), (50,))).backward()
    optimizer.step()


def load_other_weights(head):
    head.load_state_dict(build(type(head)).state_dict())


def write_through_data(head):
    for parameter in head.parameters():  # as averages of weights do; PyTorch does not count it
        parameter.data.mul_(-1.5)


def replace_a_parameter(head):
    block = head.table.blocks[1]
    block.weight = torch.nn.Parameter(torch.randn_like(block.weight))


def change_signs_through_data(head):
    for parameter in head.parameters():
        parameter.data.neg_()  # the lowest byte of each number stays what it was


def replace_a_block(head):
    head.table.factors[1] = block_embedding(SIZES, RANKS, DIM).factors[1]


CHANGES = {
    "a change of signs through .data": change_signs_through_data,
    "another block": replace_a_block,
    "a step of Adam": lambda head: optimizer_step(head, foreach=False),
    "a step of Adam, foreach": lambda head: optimizer_step(head, foreach=True),
    "a step of Adam, fused": lambda head: optimizer_step(head, fused=True),
    "a loaded state": load_other_weights,
    "a change through .data": write_through_data,
    "another parameter": replace_a_parameter,
    "another precision": lambda head: head.double(),
}


@pytest.mark.parametrize("look", [index._look_at, index._Numbers], ids=["in place", "as on a GPU"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("head_class", HEADS)
def test_the_index_is_dropped_when_weights_change(head_class, change, look, monkeypatch):
    monkeypatch.setattr(index, "_look_at", look)
    head = build(head_class)
    with thresholds():
        head.build_index()
        assert head.is_indexed
        CHANGES[change](head)
        assert not head.is_indexed
        hidden = torch.randn(4, DIM, dtype=head.table.blocks[0].weight.dtype)
        check(head, hidden, 20)
        head.build_index()
        check(head, hidden, 20)


def test_searching_twice_keeps_the_index():
    head = build(FullSoftmax)
    with thresholds():
        head.build_index()
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
        for other in (copy.deepcopy(head), through_pickle(head)):
            assert not other.is_indexed
            hidden = torch.randn(3, DIM)
            assert torch.equal(other.topk(hidden, 9).items, head.topk(hidden, 9).items)
        assert head.is_indexed


def through_pickle(head):
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_small_block_is_not_grouped():
    head = build(FullSoftmax)
    head.build_index()
    hidden = torch.randn(2, DIM)
    with mock.patch.multiple(sorting, MOST_ITEMS=0, MOST_SCORES=0):
        assert head.search(hidden, 5).tail_share == 1


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
    "k of zero": (dict(k=0), "`k` to be from 1 to the 1059 items .* got 0"),
    "k too large": (dict(k=1060), "`k` to be from 1 to the 1059 items .* got 1060"),
    "k no number": (dict(k=2.5), "`k` to be from 1 .* got 2.5"),
    "k a truth": (dict(k=True), "`k` to be from 1 .* got True"),
    "exclude too large": (dict(exclude=torch.tensor([3, 1060])), "`exclude` .* 0 to 1059.* 1060"),
    "exclude negative": (dict(exclude=torch.tensor([[-1], [2]])), "`exclude` .* got -1"),
    "exclude broken": (dict(exclude=torch.tensor([1.0])), "`exclude` to hold item ids.*float32"),
    "exclude a mask": (dict(exclude=torch.ones(2, 4, dtype=torch.bool)), "`exclude` .*bool"),
    "exclude for three": (dict(exclude=torch.ones(3, 4).long()), r"`exclude` .*\[2, m\].*\[3, 4\]"),
    "exclude all": (dict(exclude=torch.arange(1060)), "`k` to be from 1 to the 0 items"),
    "all but three": (dict(exclude=torch.arange(4, 1060)), "`k` to be from 1 to the 3 items"),
    "allow nothing": (dict(allowed=torch.empty(0).long()), "`allowed` to hold at least one"),
    "allow padding": (dict(allowed=torch.tensor([0])), "`allowed` to hold at least one"),
    "allow too large": (dict(allowed=torch.tensor([1060])), "`allowed` .* 0 to 1059.* got 1060"),
    "allow by row": (dict(allowed=torch.ones(2, 2).long()), r"`allowed` .*\[m\].*\[2, 2\]"),
    "allow too few": (dict(allowed=torch.tensor([7, 7, 9])), "`k` to be from 1 to the 2 items"),
    "allow only the excluded": (
        dict(allowed=torch.tensor([7, 9]), exclude=torch.tensor([7, 9])),
        "`k` to be from 1 to the 0 items",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("sort", [(0, 0), (2**15, 2**18)])
@pytest.mark.parametrize("head_class", HEADS)
def test_bad_input_is_named(head_class, sort, bad):
    options, message = BAD[bad]
    with thresholds(sort=sort), pytest.raises(CompressionError, match=message):
        build(head_class).topk(**{"hidden": torch.randn(2, DIM), "k": 5, **options})


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


def test_whole_numbers_are_no_hidden_states():
    with pytest.raises(CompressionError, match=r"`hidden` to be real numbers .* torch.int64"):
        build(FullSoftmax).topk(torch.ones(1, DIM, dtype=torch.int64), 3)


def test_weights_too_large_to_square_are_named():
    head = build(FullSoftmax)
    with torch.no_grad():
        head.table.blocks[1].weight[5] = 1e18
    with pytest.raises(CompressionError, match="shorter than 1e"):
        head.topk(torch.randn(1, DIM), 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers_are_named(value):
    head = build(FullSoftmax)
    with torch.no_grad():
        head.table.blocks[1].weight[5] = value
    with pytest.raises(CompressionError, match="weights of the item table to be finite"):
        head.topk(torch.randn(1, DIM), 3)


@pytest.mark.parametrize("sort", [(0, 0), (2**15, 2**18)])
@pytest.mark.parametrize("head_class", HEADS)
def test_scores_that_overflow_are_named(head_class, sort):
    head = build(head_class)
    with thresholds(sort=sort), torch.no_grad():
        head.table.blocks[0].weight.mul_(1e12)
        with pytest.raises(CompressionError, match="overflow"):
            head.topk(torch.full((2, DIM), 1e30), 3)


# -- its parts ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@example(n_rows=1, rank=3, seed=1171586)  # the log of the sum is 50 and a sum of one logit
@given(n_rows=st.integers(1, 3000), rank=st.sampled_from([1, 3, 8, 16]), seed=st.integers(0, 2**31))
def test_bounds_hold_and_groups_hold_every_row_once(n_rows, rank, seed):
    torch.manual_seed(seed)
    table = block_embedding((3, n_rows), (16, rank), 16)
    head = FullSoftmax(table)
    with thresholds():
        head.build_index()
    _, strip = head._current().weights.indexed
    order = strip.positions(torch.arange(len(strip.codes)))
    assert sorted(order[order > 0].tolist()) == list(range(3, n_rows + 3))
    inside, rows = strip.find(torch.arange(n_rows + 3))
    assert torch.equal(order[rows], torch.arange(3, n_rows + 3))
    assert inside.tolist() == [False] * 3 + [True] * n_rows

    hidden = 3 * torch.randn(9, 16).double()
    query = strip.query(hidden).T
    logits = (strip.codes @ strip.factor(query)).view(-1, strip.group, 9)
    reach = Reach.of(query)
    assert (strip.bounds.above(reach) >= logits.amax(1)).all()
    by_branch = logits.view(len(strip.branches.ball), -1, 9)
    assert (strip.branches.above(reach) >= by_branch.amax(1)).all()
    exact = settle.exact_log_sum(strip_of(head, 1), hidden)
    rounding = strip.rounding * hidden.norm(dim=1)  # half of what the search allows two logits
    for bounds in (strip.bounds, strip.branches):
        assert (bounds.log_sum_below(query) <= exact + rounding).all()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("n_rows", [17, 19, 129])
@pytest.mark.parametrize("equal", [True, False])
def test_a_group_of_copies_alone_counts_for_nothing(n_rows, size, equal):
    rows = torch.zeros(n_rows, 3) if equal else 0.01 * torch.randn(n_rows, 3)
    rows[n_rows // 2] += 0.0 if equal else 100.0  # which every odd half repeats
    groups, real = group_rows(rows, size)
    bounds = Bounds.of(rows[groups], real)
    query = torch.randn(3, 5)
    logits = (rows @ query).double()
    assert (bounds.log_sum_below(query) <= logits.logsumexp(0) + 1e-4).all()
    upper = bounds.above(Reach.of(query))
    assert (upper.amax(0) >= logits.amax(0)).all()
    assert upper.isfinite().all()


def test_such_groups_come_about():
    _, real = group_rows(torch.zeros(17, 3), 2)
    assert (real.sum(1) == 0).any()
    assert real.sum() == 17


def strip_of(head, j):
    return head._current().weights.whole[j]


@pytest.mark.parametrize("piece", [40, 2**21])
@pytest.mark.parametrize("group", [1, 7, 64])
def test_a_reader_reads_what_a_product_gives(piece, group):
    head = build(FullSoftmax)
    strip = strip_of(head, 1)
    hidden = torch.randn(5, DIM).double()
    barred = Barred.from_ids(torch.randint(0, sum(SIZES), (5, 200)), 5, head.table.partition)
    with thresholds(piece=piece):
        reader = reading.Reader(strip, strip.query(hidden).T.contiguous(), barred, group)
        maxima, log_sum = reader.maxima_and_log_sum()
        dense = strip.codes @ strip.query(hidden).T
        torch.testing.assert_close(log_sum, dense.double().logsumexp(0), rtol=1e-5, atol=1e-5)
        for row, position in zip(barred.rows, barred.positions):
            if strip.holds(position):
                dense[position - strip.start, row] = -torch.inf
        best = torch.stack([part.amax(0) for part in dense.split(group)])
        torch.testing.assert_close(maxima, best)
        torch.testing.assert_close(reader.maxima(), best)
        torch.testing.assert_close(reader.logits(), dense)
        floor = dense.topk(10, dim=0).values[-1] - 1e-4
        expected = {(c, p + strip.start) for p, c in (dense >= floor).nonzero().tolist()}
        if len(expected) > piece:
            with pytest.raises(reading.TooManyCandidates):
                reader.above(maxima, floor)
            return
        columns, positions, logits = reader.above(maxima, floor)
        fine = ~barred.hit(columns, positions, sum(SIZES))
        assert set(zip(columns[fine].tolist(), positions[fine].tolist())) == expected
        expected_logits = dense[positions[fine] - strip.start, columns[fine]]
        torch.testing.assert_close(logits[fine], expected_logits)
