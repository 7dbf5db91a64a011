"""The search by compiled loops where numba is installed: of weights on a CPU, in float32, int8 or
int4.

Of a large catalogue most rows need not be read: those of the tail blocks are sorted into groups of
near ones, with bounds on their logits.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.integers import Int4Rows, Int8Rows
from cprec_recbole.search.table import Rows, SearchTable
from cprec_recbole.search.topk import Found, Limits, TopK, not_finite

_BATCH = 256  # rows of a batch that are searched together
_THIN = 12  # below so many, a loop is quicker than a product of matrices
_PIECE = 2**18  # logits at a time: 1 MiB, which stays in the cache
_ROWS_OF_A_THREAD = 16  # of a batch, at least
_MAX_RANK = 32  # above it bounds skip too little to be worth a copy of the rows
_MIN_ROWS = 2**14  # below it reading is quicker than looking at bounds
_GROUP_VALUES = 256  # numbers to a group: 64 rows of rank 4, 16 of rank 16
_NO_SUMS = np.empty((0, 2))
_LARGE_HEAD = 2**12  # rows
_ROWS_THAT_PAY = 512  # of batches; searched without an index, they take as long as making one


@functools.cache
def loops() -> Any:
    """The module of the compiled loops; None where numba is missing."""
    try:
        from cprec_recbole.search import kernel
    except ImportError:
        return None
    return kernel


def compiled_search(table: SearchTable) -> CompiledSearch | None:
    """The compiled search of a table, made once; None where torch has to search it."""
    if table.compiled is None:
        fits = table.dtype == torch.float32 and table.partition.item_at.device.type == "cpu"
        table.compiled = CompiledSearch(table) if fits and loops() is not None else None
    return table.compiled


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="cprec-search")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its threads


class _Index(NamedTuple):
    """The blocks with what there is of an index, which belong together."""

    blocks: tuple[Any, ...]
    tiles: tuple[Any, ...]  # without groups for blocks that are read whole
    moved_basis: np.ndarray  # brings hidden states into the spaces of the bounds, [d, sum r]


class CompiledSearch:
    """A table as the loops read it, with an index once that pays or `build_index` was called."""

    def __init__(self, table: SearchTable) -> None:
        self.table, self.loops = table, loops()
        self.item_at = table.partition.item_at.numpy()
        ends = np.cumsum(table.ranks).tolist()
        self.blocks = tuple(
            self.loops.Block(*_numbers(rows.values), rank, rows.start, j, end - rank, 0)
            for j, (rows, rank, end) in enumerate(zip(table.blocks, table.ranks, ends))
        )
        # what brings hidden states into the spaces of all blocks, [d, sum r]; a tree's clusters too
        clusters = [] if table.clusters is None else [table.clusters.T]
        basis = torch.cat([*(block.basis for block in table.blocks), *clusters], 1)
        self.basis = basis.numpy()
        self.is_indexed, self.n_searched, self._building = False, 0, threading.Lock()
        none = _no_tiles(_numbers(table.blocks[0].values, for_tiles=True)[0].dtype)
        self.index = _Index(self.blocks, (none,) * len(self.blocks), basis[:, :0].numpy())
        # for thin batches, a large head of a flat softmax in int8 too: a quarter of the memory
        self.rough_head = self.blocks[0]
        self.roundings = self.thin_roundings = np.full(len(self.blocks), table.rounding)
        head = table.blocks[0].values
        if table.clusters is None and isinstance(head, Tensor) and len(head) >= _LARGE_HEAD:
            rough = Int8Rows.of(head)
            self.rough_head = self.blocks[0]._replace(
                values=rough.values.numpy(), scales=rough.scales.numpy()
            )
            # of two logits, one may be off by this much upwards, and one downwards
            longest = float(torch.linalg.matrix_norm(table.blocks[0].basis, 2))
            error = 2 * longest * float((head - rough[:]).norm(dim=1).max())
            self.thin_roundings = self.roundings + error * (np.arange(len(self.blocks)) == 0)

    def build_index(self) -> None:
        """Sort the rows of large tail blocks into groups with bounds; other threads search without
        them until all is there."""
        with self._building:
            if self.is_indexed:
                return
            blocks, tiles, bases = list(self.blocks), list(self.index.tiles), [self.basis[:, :0]]
            for j, rows in enumerate(self.table.blocks):
                if j and len(rows.values) >= _MIN_ROWS and rows.values.shape[1] <= _MAX_RANK:
                    column = sum(basis.shape[1] for basis in bases)
                    blocks[j] = blocks[j]._replace(moved_column=column)
                    basis, tiles[j] = _sorted_into_tiles(rows)
                    bases.append(basis)
            self.index = _Index(tuple(blocks), tuple(tiles), np.concatenate(bases, axis=1))
            self.is_indexed = True

    def search(self, hidden: Tensor, limits: Limits) -> Found:
        """See exact.search."""
        self.n_searched += len(hidden)
        if self.n_searched >= _ROWS_THAT_PAY and not self.is_indexed:
            self.build_index()
        states = hidden.detach().double().contiguous().numpy()
        n_rows = len(states)
        items = np.empty((n_rows, limits.k), np.int64)
        scores = np.empty((n_rows, limits.k), np.float32)
        tail_rows, is_finite = 0, True
        if n_rows < _THIN and self.table.clusters is None and limits.allowed is None:
            index, excluded = self.index, limits.excluded.numpy()
            tiles = index.tiles if index.moved_basis.size else ()
            tail_rows, is_finite = self.loops.search(
                *(states, self.basis, index.moved_basis, self.thin_roundings),
                *(index.blocks, self.rough_head, tiles, self.item_at, excluded),
                *(items, scores),
            )
        else:
            for start in range(0, n_rows, _BATCH):
                end, own = min(start + _BATCH, n_rows), limits
                if n_rows > _BATCH:
                    own = limits.of_rows(torch.arange(start, end))
                part = _Part(self, states[start:end], own)
                is_finite &= self.loops.result(part.search(), items[start:end], scores[start:end])
                tail_rows += part.tail_rows
        if not is_finite:
            raise not_finite(hidden)
        found = TopK(torch.from_numpy(items), torch.from_numpy(scores))
        return Found(found, tail_rows / max(1, n_rows * self.table.n_tail))


class _Part:
    """Rows of a batch that are searched together."""

    def __init__(self, whole: CompiledSearch, hidden: np.ndarray, limits: Limits) -> None:
        self.whole, self.loops, self.limits = whole, whole.loops, limits
        self.hidden, self.index, self.n_rows = hidden, whole.index, len(hidden)
        self.excluded = limits.excluded.numpy()
        self.allowed = None if limits.allowed is None else limits.allowed.numpy()
        self.tail_rows = 0  # products of a row of the tail and a row of the batch
        exact, *others, self.lengths = self.loops.prepare(
            hidden, whole.basis, self.index.moved_basis, whole.roundings
        )
        self.clusters = exact[:, sum(whole.table.ranks) :]  # logits of a tree's
        if not np.isfinite(others[-1]).all():
            raise not_finite(torch.from_numpy(hidden))
        offsets = np.zeros((len(whole.blocks), self.n_rows))
        self.queries = self.loops.Queries(exact, *others, offsets, rounds=True)

    def search(self) -> Any:
        """The best of each row, sorted: scores in float64, and positions."""
        if self.whole.table.clusters is None:
            return self._by_offsets()
        best = self._by_rough_normalisers()
        blocks = np.searchsorted(self.whole.table.partition.cutoffs, best.places, side="right")
        unsure = np.flatnonzero(self._are_unsure(best.scores, blocks))
        if len(unsure):
            part = self._some(unsure)
            part._find_exact_offsets(self._are_of_interest(best.scores, blocks)[:, unsure])
            exact = part._by_offsets()
            best.scores[unsure, :-1], best.places[unsure, :-1] = exact.scores, exact.places
        return best

    def _some(self, rows: np.ndarray) -> _Part:
        """Some of the rows as a part of their own."""
        return _Part(self.whole, self.hidden[rows], self.limits.of_rows(torch.from_numpy(rows)))

    def _by_offsets(self) -> Any:
        """The best by logits and the blocks' offsets, rounded to float32."""
        best = self._none(self.limits.k)
        for block, tiles in zip(self.index.blocks, self.index.tiles):
            if self.allowed is not None:
                self._take_allowed(best, block, self.queries, self.allowed)
            elif not len(tiles.counts):
                self._read(best, block, self.queries)
            else:
                self._on_threads(self.loops.take_groups, best, block, tiles, self.queries)
        self.loops.sort(best)
        return best

    def _by_rough_normalisers(self) -> Any:
        """The best of a tree and one more, by normalisers in float32; scores are not rounded."""
        # of a score, the head's normaliser is what all items have in common; in the other blocks
        # there are a cluster's logit and the block's own normaliser besides
        best = self._none(self.limits.k + 1)
        for j, (block, tiles) in enumerate(zip(self.index.blocks, self.index.tiles)):
            rows, part = np.arange(self.n_rows), self
            if j:
                self.queries.offsets[j] = self.clusters[:, j - 1]
            if len(tiles.counts):
                is_open = np.zeros(self.n_rows, dtype=bool)
                # the bound of a normaliser may be off as its value may
                slack = self.queries.slack + self._errors().T.astype(np.float32)
                queries = self.queries._replace(slack=slack)
                self._on_threads(self.loops.find_open, is_open, best, block, tiles, queries)
                rows = np.flatnonzero(is_open)
                part = self if len(rows) == self.n_rows else self._some(rows)
            if len(rows):
                inside, log_sums = part._best_inside(block)
                offsets = self.queries.offsets[j][rows] - log_sums if j else np.zeros(len(rows))
                self.loops.merge(best, rows, inside, offsets)
            if j == 0:
                logits = np.column_stack([log_sums, self.clusters])
                normaliser = np.logaddexp.reduce(logits, axis=1)
        self.loops.sort(best)
        best.scores[:] -= normaliser[:, np.newaxis]
        return best

    def _best_inside(self, block: Any) -> tuple[Any, np.ndarray]:
        """The best of a tree's block and one more, by logits, and its normaliser, `[B]`."""
        offsets = np.zeros_like(self.queries.offsets)
        queries = self.queries._replace(offsets=offsets, rounds=False)
        best, sums = self._none(self.limits.k + 1), np.tile([-np.inf, 0.0], (self.n_rows, 1))
        self._read(best, block, queries, sums)
        if self.allowed is not None:
            best = self._none(self.limits.k + 1)
            self._take_allowed(best, block, queries, self.allowed)
        return best, sums[:, 0] + np.log(sums[:, 1])

    def _find_exact_offsets(self, wanted: np.ndarray) -> None:
        """Offsets in float64, each row's on its own, of the blocks `[n_blocks, B]` that are wanted;
        of others -inf."""
        offsets = self.queries.offsets
        offsets[:] = -np.inf
        for j, block in enumerate(self.whole.blocks):
            rows = np.flatnonzero(wanted[j])
            if len(rows):
                log_sums = self.loops.exact_log_sums(block, self._some(rows).queries)
                if j == 0:  # wanted of all rows
                    logits = np.column_stack([log_sums, self.clusters])
                    offsets[0] = -np.logaddexp.reduce(logits, axis=1)
                else:
                    offsets[j, rows] = self.clusters[rows, j - 1] + offsets[0, rows] - log_sums

    def _errors(self) -> np.ndarray:
        """How far errors of the normalisers may move two scores apart, `[B, 1]`."""
        # off by as much as logits, and by what rounding does to the sums
        table = self.whole.table
        scale = self.lengths * table.longest + math.log(table.partition.n_items)
        errors = 2 * self.lengths * table.rounding + 16 * np.finfo(np.float32).eps * scale
        return errors[:, np.newaxis]

    def _are_unsure(self, scores: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Rows whose order errors of the normalisers could change, `[B]`: that of two blocks, or in
        one where it decides to which numbers scores are rounded."""
        gaps = scores[:, :-1] - scores[:, 1:]
        across = (np.diff(blocks, axis=1) != 0) & (gaps <= self._errors())
        digits = 4 * np.finfo(np.float32).eps * np.abs(scores[:, :-1])
        return (across | (gaps > 0) & (gaps <= digits)).any(1)

    def _are_of_interest(self, scores: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Blocks that may have one of the best, `[n_blocks, B]`: those that have one, unless what
        comes next is near; and the head, for its normaliser."""
        near = scores[:, -2] - scores[:, -1] <= self._errors()[:, 0]
        numbers = np.arange(len(self.whole.blocks))[:, np.newaxis]
        has_one = (blocks[:, :-1, np.newaxis] == numbers.T).any(1).T
        return has_one | near | (numbers == 0)

    # -- one block ---------------------------------------------------------------------------------

    def _none(self, k: int) -> Any:
        scores, places = np.full((self.n_rows, k), -np.inf), np.zeros((self.n_rows, k), np.int64)
        return self.loops.Best(scores, places, self.whole.item_at, self.excluded)

    def _take_allowed(self, best: Any, block: Any, queries: Any, allowed: np.ndarray) -> None:
        """Offer the items of a block that are allowed."""
        ends = np.searchsorted(allowed, [block.start, block.start + len(block.values)])
        some = allowed[slice(*ends)]
        self.tail_rows += len(some) * self.n_rows if block.number else 0
        self._on_threads(self.loops.take_places, best, block, some, queries)

    def _read(self, best: Any, block: Any, queries: Any, sums: np.ndarray = _NO_SUMS) -> None:
        """Offer all items of a block; `sums` as in the loops."""
        n = len(block.values)
        self.tail_rows += self.n_rows * n if block.number else 0
        if self.n_rows < _THIN:
            self._on_threads(self.loops.read_rows, best, block, block, sums, queries)
            return
        rows = self.whole.table.blocks[block.number].values
        rough = queries.rough[:, block.column : block.column + rows.shape[1]]
        width = max(1, _PIECE // self.n_rows)
        memory = torch.empty(self.n_rows * min(width, n))
        for start in range(0, n, width):
            end = min(start + width, n)
            logits = memory[: self.n_rows * (end - start)].view(self.n_rows, -1)
            if isinstance(rows, Int4Rows):  # which torch unpacks in several passes
                whole = self.loops.in_float(block.values, start, end)[:, : block.rank]
                part = torch.from_numpy(whole)
            else:
                part = rows[start:end]
            torch.mm(torch.from_numpy(rough), part.T, out=logits)
            own = best, block, start, logits.numpy(), sums, queries
            self._on_threads(self.loops.take_rows, *own)

    def _on_threads(self, loop: Any, *arguments: Any) -> None:
        """Run a loop over the rows on torch's number of threads, and count the rows of the tail
        that it says it read."""
        n_threads = min(torch.get_num_threads(), self.n_rows // _ROWS_OF_A_THREAD)
        if n_threads <= 1:
            self.tail_rows += loop(*arguments, (0, self.n_rows)) or 0
            return
        cuts = [self.n_rows * i // n_threads for i in range(n_threads + 1)]
        pool = _pool(n_threads)
        parts = [pool.submit(partial(loop, *arguments, pair)) for pair in pairwise(cuts)]
        self.tail_rows += sum(part.result() or 0 for part in parts)


def _numbers(
    values: Tensor | Int8Rows, *, for_tiles: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scales as the loops read them; those in int4, whose scales are in the queries, are
    packed but in tiles."""
    none = np.empty(0, dtype=np.float32)
    if isinstance(values, Int4Rows):
        whole = values.numbers(slice(None)).to(torch.int8) if for_tiles else values.values
        return whole.numpy(), none
    if isinstance(values, Int8Rows):
        return values.values.numpy(), values.scales.numpy()
    return values.detach().numpy(), none


# -- the index -----------------------------------------------------------------------------------


def _no_tiles(dtype: Any) -> Any:
    """Tiles of a block that has no groups."""
    values, bounds = np.empty((0, 1, 1), dtype), np.empty((0, 1, 1), np.float32)
    scales, order, counts = (np.empty(0, each) for each in (np.float32, np.int32, np.int64))
    return loops().Tiles(values, scales, order, counts, bounds, counts, bounds)


def _sorted_into_tiles(rows: Rows) -> tuple[np.ndarray, Any]:
    """Rows in groups of near ones with bounds, and what brings hidden states into the space of the
    bounds, `[d, r]`."""
    # there, rows are as long as their item vectors, so that bounds are not stretched by how
    # training shared out the length between the factors, and axes are the rows' principal ones,
    # along which boxes are tight
    loops_ = loops()
    orthonormal, triangular = torch.linalg.qr(rows.basis)
    vectors = rows.values.double() @ triangular.T
    centred = vectors - vectors.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
    moved = (vectors @ axes).float()
    # halved until a group has few enough numbers
    depth = max(0, math.ceil(math.log2(moved.numel() / _GROUP_VALUES)))
    size = -(-len(moved) >> depth)
    order = torch.from_numpy(loops_.sort_by_nearness(moved.numpy(), size, depth))
    bounds, counts = _bounds(moved[order], size)
    branch_bounds, branch_counts = _bounds(moved[order], size * loops_.FAN)
    order = torch.cat([order, order[-1:].expand(-len(order) % size)])
    values, scales = map(torch.from_numpy, _numbers(rows.values, for_tiles=True))
    values = values[order].view(len(counts), size, -1).transpose(1, 2).contiguous()
    scales = scales[order] if len(scales) else scales
    own = values.numpy(), scales.numpy(), order.int().numpy()
    tiles = loops_.Tiles(*own, counts, bounds, branch_counts, branch_bounds)
    return (orthonormal @ axes).contiguous().numpy(), tiles


def _bounds(rows: Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre, radius, middle and half widths of groups of `size` rows, as `Tiles` has them, and
    the rows of each group."""
    fan, parts = loops().FAN, rows.split(size)
    counts = np.array([len(part) for part in parts])
    groups = torch.cat([rows, rows[-1:].expand(-len(rows) % size, -1)])
    groups = groups.view(len(parts), size, -1)
    centre = groups.mean(1)
    centre[-1] = parts[-1].mean(0)
    radius = (groups - centre.unsqueeze(1)).norm(dim=2).amax(1, keepdim=True)
    low, high = groups.amin(1), groups.amax(1)
    middle, half = (low + high) / 2, (high - low) / 2
    # wider by what rounding may do to the products
    error = (2 * rows.shape[1] + 8) * torch.finfo(rows.dtype).eps
    radius += error * (radius + centre.norm(dim=1, keepdim=True))
    half += error * (half + middle.abs())
    bounds = F.pad(torch.cat([centre, radius, middle, half], 1), (0, 0, 0, -len(parts) % fan))
    return bounds.view(-1, fan, bounds.shape[1]).transpose(1, 2).contiguous().numpy(), counts
