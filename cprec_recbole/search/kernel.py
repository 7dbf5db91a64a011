"""Loops of the search that numba compiles.

In all of them B is the rows of the batch, of which `some` are worked on, and r a block's rank. An
item's *place* is its position in popularity order. Products in float32 are sums in any order. Those
in float64 are summed one after the other: they decide between near items, and depend on nothing but
their two factors.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

FAN = 64  # groups whose bounds are looked at together: a branch
_LOG2_E = np.float32(math.log2(math.e))
_PIECE = 2**14  # logits of a row at a time
_LOWEST = np.float32(-126)  # the exponent of float32's smallest normal number
# 2 to the power of x in [0, 1), by powers of x: least squares for the relative error, 1.5e-7
_POWERS = (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1)
P0, P1, P2, P3, P4, P5 = (np.float32(each) for each in _POWERS)
Array = np.ndarray
Span = tuple[int, int]


class Block(NamedTuple):
    """The rows of a block but the padding row."""

    values: Array  # [n, r], float32 or int8; in int4 two to a byte, [n, ceil(r / 2)], uint8
    scales: Array  # of rows in int8, [n]; empty for others
    rank: int
    start: int  # place of the first row
    number: int  # which block it is
    column: int  # of its first number in queries
    moved_column: int  # the same in moved queries


class Tiles(NamedTuple):
    """The same rows in groups of near ones, with bounds of groups and of branches of them."""

    values: Array  # [G, r, size]
    scales: Array  # [G * size] or empty
    order: Array  # row of the block, [G * size]
    counts: Array  # rows of each group; in the last one others fill up, [G]
    bounds: Array  # centre, radius, middle and half widths of groups, [branches, 3 r + 1, FAN]
    branch_counts: Array
    branch_bounds: Array  # the same of branches, [ceil(branches / FAN), 3 r + 1, FAN]


class Best(NamedTuple):
    """The best items so far: for each row a heap whose first entry is the last of them."""

    scores: Array  # [B, k], float64
    places: Array  # [B, k]
    item_at: Array  # item id at each place
    excluded: Array  # row * n_items + place of what is left out, rising, [M]


class Queries(NamedTuple):
    """Hidden states in the spaces of all blocks, beside each other."""

    exact: Array  # [B, sum r], float64
    rough: Array  # the same in float32
    moved: Array  # in the spaces of bounds, [B, sum r], float32
    slack: Array  # what rounding may change of a score in float32, [n_blocks, B]
    offsets: Array  # score = logit + offset, [n_blocks, B], float64
    rounds: bool  # whether scores are rounded to float32, by which equal ones come by id


def _in_order(function: Any, **options: Any) -> Any:
    """Compile a function when it is first called, and keep that on disk if there is a place."""
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # numba finds no folder that it may write to
        return njit(nogil=True, **options)(function)


_in_any_order = partial(_in_order, fastmath={"reassoc", "contract", "nsz"})


# -- products ------------------------------------------------------------------------------------


@_in_order
def in_spaces(hidden: Array, basis: Array) -> Array:
    """Hidden states in other spaces, `[B, d], [d, r] -> [B, r]`."""
    states = np.zeros((len(hidden), basis.shape[1]))
    for i in range(len(hidden)):
        for c in range(len(basis)):
            for a in range(basis.shape[1]):
                states[i, a] += basis[c, a] * hidden[i, c]
    return states


@_in_order
def prepare(
    hidden: Array, basis: Array, moved_basis: Array, roundings: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """The first parts of Queries, and the lengths of the states `[B]`, of hidden states `[B, d]`
    and what rounding may change in each block for a state of length one, `[n_blocks]`."""
    exact = in_spaces(hidden, basis)
    moved = in_spaces(hidden, moved_basis).astype(np.float32)
    lengths = np.sqrt((hidden * hidden).sum(1))
    slack = np.empty((len(roundings), len(hidden)), dtype=np.float32)
    for j in range(len(roundings)):
        for i in range(len(hidden)):
            slack[j, i] = roundings[j] * lengths[i]
    return exact, exact.astype(np.float32), moved, slack, lengths


def _rows(values: Array, start: int, end: int) -> Array:
    """Some rows of a block with a number to each entry, `[m, r]`; of an odd rank in int4 one more,
    which is zero."""
    raise NotImplementedError  # outside of compiled loops


@overload(_rows, inline="always")
def _rows_compiled(values: Any, start: Any, end: Any) -> Any:
    def as_they_are(values: Any, start: Any, end: Any) -> Any:
        return values[start:end]

    def unpacked(values: Any, start: Any, end: Any) -> Any:
        halves = values[start:end].reshape(-1)
        numbers = np.empty(2 * len(halves), dtype=np.int8)
        for i in range(len(halves)):
            numbers[2 * i] = np.int8(halves[i] & np.uint8(15)) - np.int8(8)
            numbers[2 * i + 1] = np.int8(halves[i] >> np.uint8(4)) - np.int8(8)
        return numbers.reshape(end - start, -1)

    return unpacked if values.dtype == types.uint8 else as_they_are


@_in_order
def in_float(values: Array, start: int, end: int) -> Array:
    """Some rows of a block in int4 as float32, `[m, r]`; of an odd rank as in `_rows`."""
    return _rows(values, start, end).astype(np.float32)


@_in_any_order
def _multiply(rows: Array, scales: Array, query: Array, out: Array) -> None:
    """Logits of rows, `[m]`."""
    for g in range(len(out)):
        logit = np.float32(0)
        for a in range(len(query)):
            logit += np.float32(rows[g, a]) * query[a]
        out[g] = logit
    if len(scales):
        for g in range(len(out)):
            out[g] *= scales[g]


@_in_order
def _exact_logit(block: Block, row: int, queries: Queries, i: int) -> float:
    query, rank = queries.exact[i, block.column :], block.rank
    values = _rows(block.values, row, row + 1)[0]
    scale = np.float64(block.scales[row]) if len(block.scales) else 1.0
    one = two = three = four = 0.0  # sums beside each other, which do not wait for another
    for a in range(0, rank - 3, 4):
        one += np.float64(values[a]) * scale * query[a]
        two += np.float64(values[a + 1]) * scale * query[a + 1]
        three += np.float64(values[a + 2]) * scale * query[a + 2]
        four += np.float64(values[a + 3]) * scale * query[a + 3]
    for a in range(rank - rank % 4, rank):
        one += np.float64(values[a]) * scale * query[a]
    return (one + two) + (three + four)


# -- the best ------------------------------------------------------------------------------------


@_in_order
def _comes_first(score: float, item: int, other_score: float, other_item: int) -> bool:
    return score > other_score or (score == other_score and item < other_item)


@_in_order
def _sink(scores: Array, places: Array, item_at: Array, end: int, score: float, place: int) -> None:
    """Put an item at the top of a heap, `[end]`, in place of what is there, and let it sink."""
    item, at = item_at[place], 0
    while 2 * at + 1 < end:
        child, other = 2 * at + 1, 2 * at + 2
        if other < end and _comes_first(
            scores[child], item_at[places[child]], scores[other], item_at[places[other]]
        ):
            child = other
        if not _comes_first(score, item, scores[child], item_at[places[child]]):
            break
        scores[at], places[at] = scores[child], places[child]
        at = child
    scores[at], places[at] = score, place


@_in_order
def _offer(best: Best, i: int, score: float, place: int) -> None:
    """Take an item into a row's heap, if it comes before the last of it."""
    scores, places, item_at = best.scores[i], best.places[i], best.item_at
    if _comes_first(score, item_at[place], scores[0], item_at[places[0]]):
        _sink(scores, places, item_at, len(scores), score, place)


@_in_order
def _consider(best: Best, i: int, block: Block, row: int, queries: Queries) -> None:
    """Offer a row of a block, unless it is left out."""
    place = block.start + row
    if len(best.excluded):
        key = i * len(best.item_at) + place
        at = np.searchsorted(best.excluded, key)
        if at < len(best.excluded) and best.excluded[at] == key:
            return
    score = _exact_logit(block, row, queries, i) + queries.offsets[block.number, i]
    if queries.rounds:
        score = np.float64(np.float32(score))
    _offer(best, i, score, place)


@_in_order
def _floor(best: Best, i: int, block: Block, queries: Queries) -> np.float32:
    """What a logit in float32 must reach to be of interest."""
    last = np.float32(best.scores[i, 0] - queries.offsets[block.number, i])
    return last - queries.slack[block.number, i]


@_in_order
def _raise_floor(lasts: Array, logit: np.float32) -> None:
    """Replace the smallest of a heap of numbers, `[k]`."""
    at, end = 0, len(lasts)
    while 2 * at + 1 < end:
        child = 2 * at + 1
        if child + 1 < end and lasts[child + 1] < lasts[child]:
            child += 1
        if logit <= lasts[child]:
            break
        lasts[at] = lasts[child]
        at = child
    lasts[at] = logit


@_in_order
def _reaches(numbers: Array, floor: np.float32) -> bool:
    """Whether any of some numbers is as large."""
    n_reaching = 0
    for s in range(len(numbers)):  # no branch: several at once
        n_reaching += numbers[s] >= floor
    return n_reaching > 0


@_in_order
def _take(best: Best, block: Block, start: int, logits: Array, queries: Queries, i: int) -> None:
    """Offer rows from `start` on with logits `[m]`."""
    if not _reaches(logits, _floor(best, i, block, queries)):
        return
    first_key = i * len(best.item_at) + block.start + start
    at = np.searchsorted(best.excluded, first_key)
    while at < len(best.excluded) and best.excluded[at] < first_key + len(logits):
        logits[best.excluded[at] - first_key] = -np.inf
        at += 1
    # first what the last of the best will be, in float32: so few items need an exact score
    lasts = np.empty(best.scores.shape[1], dtype=np.float32)
    for j in range(len(lasts)):
        lasts[j] = best.scores[i, j] - queries.offsets[block.number, i]
    for takes in (False, True):
        floor = lasts[0] - queries.slack[block.number, i] if takes else lasts[0]
        for first in range(0, len(logits), FAN):
            last = min(first + FAN, len(logits))
            if _reaches(logits[first:last], floor):
                for g in range(first, last):
                    if logits[g] >= floor:
                        if takes:
                            _consider(best, i, block, start + g, queries)
                        else:
                            _raise_floor(lasts, logits[g])
                            floor = lasts[0]


@_in_order
def take_rows(
    best: Best, block: Block, start: int, logits: Array, sums: Array, queries: Queries, some: Span
) -> None:
    """Offer rows from `start` on, given their logits `[B, m]`; `sums` as in `read_rows`."""
    for i in range(some[0], some[1]):
        if len(sums):
            _add_powers(sums, i, logits[i])
        _take(best, block, start, logits[i], queries, i)


@_in_order
def read_rows(
    best: Best, block: Block, rough: Block, sums: Array, queries: Queries, some: Span
) -> None:
    """Offer all rows of a block, of which `rough` has the logits within the slack; and add the
    exponentials of their logits to `sums`, peaks and totals, `[B, 2]`, unless that is empty."""
    logits = np.empty(min(_PIECE, len(block.values)), dtype=np.float32)
    for start in range(0, len(block.values), _PIECE):
        end = min(start + _PIECE, len(block.values))
        rows, part = _rows(rough.values, start, end), logits[: end - start]
        for i in range(some[0], some[1]):
            query = queries.rough[i, rough.column : rough.column + rough.rank]
            _multiply(rows, rough.scales[start:end], query, part)
            if len(sums):
                _add_powers(sums, i, part)
            _take(best, block, start, part, queries, i)


@_in_order
def take_places(best: Best, block: Block, places: Array, queries: Queries, some: Span) -> None:
    """Offer the rows at some places, `[m]`."""
    for i in range(some[0], some[1]):
        for place in places:
            _consider(best, i, block, place - block.start, queries)


@_in_order
def merge(best: Best, rows: Array, part: Best, offsets: Array) -> None:
    """Offer the best of other heaps, those of some rows, whose scores get an offset, `[m]`."""
    for i in range(len(rows)):
        for j in range(part.scores.shape[1]):
            if part.scores[i, j] > -np.inf:
                _offer(best, rows[i], part.scores[i, j] + offsets[i], part.places[i, j])


# -- groups --------------------------------------------------------------------------------------


@_in_any_order
def _add_products(out: Array, query: Array, columns: Array) -> None:
    """Add `query @ columns`, `[r] @ [r, FAN]`, to `out`."""
    for a in range(len(query)):
        for s in range(FAN):
            out[s] += query[a] * columns[a, s]


@_in_any_order
def _reaching(
    bounds: Array, block: Block, queries: Queries, i: int, floor: np.float32, out: Array
) -> bool:
    """Whether any group may reach the floor; then `out` has numbers that no logit of a group
    exceeds, `[3 r + 1, FAN] -> [FAN]`: the smaller of `z . centre + |z| radius` and of the same for
    the box, with the absolute values of z."""
    rank = block.rank
    query = queries.moved[i, block.moved_column : block.moved_column + rank]
    length = np.float32(0)
    for a in range(rank):
        length += query[a] * query[a]
    length = np.sqrt(length) * np.float32(1.00001)
    for s in range(FAN):
        out[s] = length * bounds[rank, s]
    _add_products(out, query, bounds[:rank])
    if not _reaches(out, floor):
        return False
    box = np.zeros(FAN, dtype=np.float32)
    _add_products(box, query, bounds[rank + 1 : 2 * rank + 1])
    _add_products(box, np.abs(query), bounds[2 * rank + 1 :])
    for s in range(FAN):
        out[s] = min(out[s], box[s])
    return True


@_in_any_order
def _multiply_tile(
    block: Block, tiles: Tiles, group: int, queries: Queries, i: int, out: Array
) -> None:
    """Logits of the rows of a group, `[size]`."""
    query, size = queries.rough[i, block.column :], tiles.values.shape[2]
    for s in range(size):
        out[s] = np.float32(0)
    for a in range(tiles.values.shape[1]):
        for s in range(size):
            out[s] += np.float32(tiles.values[group, a, s]) * query[a]
    if len(tiles.scales):
        for s in range(size):
            out[s] *= tiles.scales[group * size + s]


@_in_order
def _take_branch(
    best: Best, block: Block, tiles: Tiles, branch: int, queries: Queries, i: int, memory: Array
) -> int:
    """Offer the rows of a branch; returns how many were read."""
    upper, logits, n_read = memory[0], memory[1], 0
    floor = _floor(best, i, block, queries)
    if not _reaching(tiles.bounds[branch], block, queries, i, floor, upper):
        return 0
    first, size = branch * FAN, tiles.values.shape[2]
    for s in range(min(FAN, len(tiles.counts) - first)):
        if upper[s] >= floor:
            _multiply_tile(block, tiles, first + s, queries, i, logits)
            n_read += size
            for g in range(tiles.counts[first + s]):
                if logits[g] >= floor:
                    row = np.int64(tiles.order[(first + s) * size + g])
                    _consider(best, i, block, row, queries)
                    floor = _floor(best, i, block, queries)
    return n_read


@_in_order
def _above_branches(
    block: Block, tiles: Tiles, queries: Queries, i: int, floor: np.float32
) -> Array:
    """What no logit of a branch exceeds, `[branches]`; -inf where none reaches the floor."""
    upper = np.full(len(tiles.branch_bounds) * FAN, -np.inf, dtype=np.float32)
    for t in range(len(tiles.branch_bounds)):
        part = upper[t * FAN : (t + 1) * FAN]
        if not _reaching(tiles.branch_bounds[t], block, queries, i, floor, part):
            part[:] = -np.inf
    return upper[: len(tiles.branch_counts)]


@_in_order
def take_groups(best: Best, block: Block, tiles: Tiles, queries: Queries, some: Span) -> int:
    """Offer the rows of the groups that may hold one of the best; returns how many were read."""
    memory = np.empty((2, max(FAN, tiles.values.shape[2])), dtype=np.float32)
    n_read = 0
    for i in range(some[0], some[1]):
        upper = _above_branches(block, tiles, queries, i, _floor(best, i, block, queries))
        first = np.argmax(upper)  # the most promising one raises the floor
        if upper[first] > -np.inf:
            n_read += _take_branch(best, block, tiles, first, queries, i, memory)
            for branch in range(len(upper)):
                if branch != first and upper[branch] >= _floor(best, i, block, queries):
                    n_read += _take_branch(best, block, tiles, branch, queries, i, memory)
    return n_read


# -- normalisers of a tree -----------------------------------------------------------------------


@_in_any_order
def _sum_of_powers(logits: Array, peak: np.float32) -> np.float32:
    """Sum of `exp(logit - peak)`."""
    total = np.float32(0)
    for s in range(len(logits)):
        power = max((logits[s] - peak) * _LOG2_E, _LOWEST)
        whole = np.floor(power)
        x = power - whole
        mantissa = ((((P0 * x + P1) * x + P2) * x + P3) * x + P4) * x + P5
        bits = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
        total += mantissa * bits.view(np.float32)
    return total


@_in_any_order
def _highest(logits: Array) -> np.float32:
    lanes = np.full(FAN, -np.inf, dtype=np.float32)  # beside each other: several at once
    for first in range(0, len(logits), FAN):
        for s in range(min(FAN, len(logits) - first)):
            logit = logits[first + s]
            lanes[s] = logit if logit > lanes[s] else lanes[s]
    return lanes.max()


@_in_order
def _add_powers(sums: Array, i: int, logits: Array) -> None:
    """Add the exponentials to a row's peak and total, `[B, 2]`: `log(sum) = peak + log(total)`."""
    if _reaches(logits, np.float32(sums[i, 0] + 32)):  # far from float32's largest number
        peak = _highest(logits)
        sums[i, 1] *= math.exp(sums[i, 0] - peak)
        sums[i, 0] = peak
    for first in range(0, len(logits), 1024):  # short sums, for their rounding
        part = logits[first : first + 1024]
        sums[i, 1] += _sum_of_powers(part, np.float32(sums[i, 0]))


@_in_order
def _log_sum_below(
    bounds: Array, counts: Array, size: int, query: Array, memory: Array
) -> np.float32:
    """What the log of the summed exponentials of all rows is not below. By Jensen a group of n
    rows sums to at least `n exp(z . centre)`; those that are not full are left out."""
    sums = np.full((1, 2), -np.inf)
    sums[0, 1] = 0.0
    for t in range(len(bounds)):
        n = min(FAN, len(counts) - t * FAN)
        while n and counts[t * FAN + n - 1] < size:
            n -= 1
        if n:
            memory[1, :FAN] = 0
            _add_products(memory[1], query, bounds[t])
            _add_powers(sums, 0, memory[1, :n])
    log_sum = sums[0, 0] + math.log(sums[0, 1] * size) if sums[0, 1] else -np.inf
    return np.float32(log_sum)


@_in_order
def find_open(
    is_open: Array, best: Best, block: Block, tiles: Tiles, queries: Queries, some: Span
) -> None:
    """For which rows of a tree's batch a block has to be read, into `is_open`, `[B]`: those where,
    for all that bounds say of its normaliser, an item may do. Offsets are cluster logits here."""
    memory = np.empty((2, FAN), dtype=np.float32)
    n_groups, size, rank = len(tiles.counts), tiles.values.shape[2], block.rank
    for i in range(some[0], some[1]):
        moved = queries.moved[i, block.moved_column : block.moved_column + rank]
        floor = _floor(best, i, block, queries)
        below = _log_sum_below(tiles.branch_bounds, tiles.branch_counts, FAN * size, moved, memory)
        if _above_branches(block, tiles, queries, i, floor + below).max() == -np.inf:
            continue
        floor += _log_sum_below(tiles.bounds, tiles.counts, size, moved, memory)
        upper = _above_branches(block, tiles, queries, i, floor)
        for branch in range(len(upper)):
            if upper[branch] >= floor and not is_open[i]:
                _reaching(tiles.bounds[branch], block, queries, i, floor, memory[0])
                n = min(FAN, n_groups - branch * FAN)
                is_open[i] = _reaches(memory[0, :n], floor)


@_in_any_order
def exact_log_sums(block: Block, queries: Queries) -> Array:
    """The log of the summed exponentials of all rows, `[B]`, in float64."""
    result = np.empty(len(queries.exact))
    logits = np.empty(len(block.values))
    for i in range(len(result)):
        for row in range(len(logits)):
            logits[row] = _exact_logit(block, row, queries, i)
        peak, total = logits.max(), 0.0
        for row in range(len(logits)):
            total += math.exp(logits[row] - peak)
        result[i] = peak + math.log(total)
    return result


# -- the result ----------------------------------------------------------------------------------


@_in_order
def sort(best: Best) -> None:
    """Sort each row's heap, best first, equal scores by lower item id."""
    for i in range(len(best.scores)):
        scores, places = best.scores[i], best.places[i]
        for end in range(len(scores) - 1, 0, -1):
            score, place = scores[end], places[end]
            scores[end], places[end] = scores[0], places[0]
            _sink(scores, places, best.item_at, end, score, place)


@_in_order
def result(best: Best, items: Array, scores: Array) -> bool:
    """Write the items and scores of what was sorted, `[B, k]`; whether all scores are finite."""
    is_finite = True
    for i in range(items.shape[0]):
        for j in range(items.shape[1]):
            items[i, j] = best.item_at[best.places[i, j]]
            scores[i, j] = best.scores[i, j]
            is_finite = is_finite and np.isfinite(scores[i, j])
    return is_finite


# -- a search in one call ------------------------------------------------------------------------


@_in_order
def search(
    hidden: Array,
    basis: Array,
    moved_basis: Array,
    roundings: Array,
    blocks: tuple[Block, ...],
    rough_head: Block,
    tiles: tuple[Tiles, ...],
    item_at: Array,
    excluded: Array,
    items: Array,
    scores: Array,
) -> tuple[int, bool]:
    """Write the best of a flat softmax, `[B, k]`: the steps of `compiled` in one call, since each
    call takes as long as reading a small block. Blocks that are read whole have tiles without
    groups; where all are, there are no tiles. Returns how many rows of the tail were read, and
    whether scores are finite numbers."""
    exact, rough, moved, slack, _ = prepare(hidden, basis, moved_basis, roundings)
    (n_rows, k), n_read = items.shape, 0
    queries = Queries(exact, rough, moved, slack, np.zeros((len(blocks), n_rows)), True)
    best = Best(np.full((n_rows, k), -np.inf), np.zeros((n_rows, k), np.int64), item_at, excluded)
    no_sums, some = np.empty((0, 2)), (0, n_rows)
    read_rows(best, blocks[0], rough_head, no_sums, queries, some)
    for j in range(1, len(blocks)):
        if len(tiles) and len(tiles[j].counts):
            n_read += take_groups(best, blocks[j], tiles[j], queries, some)
        else:
            read_rows(best, blocks[j], blocks[j], no_sums, queries, some)
            n_read += n_rows * len(blocks[j].values)
    sort(best)
    return n_read, result(best, items, scores) and np.isfinite(slack).all()


# -- the index -----------------------------------------------------------------------------------


@_in_any_order
def _along(rows: Array, runs: Array) -> Array:
    """Coordinates of the rows of each run along their principal direction, that of a sample,
    `[n, r], [R, m] -> [R, m]`; infinity where a run has no row, -1."""
    along, rank = np.full(runs.shape, np.inf, np.float32), rows.shape[1]
    step = max(1, runs.shape[1] // 256)
    for i in range(len(runs)):
        run = runs[i][runs[i] >= 0]
        some = rows[run[::step]]
        some -= some.sum(0) / np.float32(max(1, len(some)))
        scatter = some.T @ some
        for _ in range(3):  # eight steps towards the eigenvector of the largest eigenvalue
            scatter /= max(np.float32(1e-30), np.abs(scatter).max())
            scatter = scatter @ scatter
        direction = scatter.sum(1)
        for g in range(runs.shape[1]):
            if runs[i, g] >= 0:
                total = np.float32(0)
                for a in range(rank):
                    total += rows[runs[i, g], a] * direction[a]
                along[i, g] = total
    return along


def sort_by_nearness(rows: Array, size: int, depth: int) -> Array:
    """An order of rows in which runs of `size` hold near ones, `[n, r] -> [n]`: all are halved at
    the median of their principal direction, both halves likewise, `depth` times."""
    order = np.arange(size << depth, dtype=np.int32)
    order[len(rows) :] = -1  # what fills up comes last at each median
    for level in range(depth):
        runs = order.reshape(2**level, -1)
        halves = np.argpartition(_along(rows, runs), runs.shape[1] // 2, axis=1)
        order = np.take_along_axis(runs, halves, axis=1).ravel()
    return order[order >= 0].astype(np.int64)
