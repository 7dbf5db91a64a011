"""The softmax over a factorised table, flat or as a two-level tree (CpRec, section 3.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.config import LOSS_MEMORY, CompressionError
from cprec_recbole.embedding import Block, BlockEmbedding
from cprec_recbole.losses import LogitBlock, Workspace, cross_entropy
from cprec_recbole.partition import PADDING
from cprec_recbole.sampling import NegativeSampler, sampled_cross_entropy
from cprec_recbole.search.compiled import compiled_search
from cprec_recbole.search.exact import search
from cprec_recbole.search.table import SearchTable
from cprec_recbole.search.topk import Found, Ids, TopK, check_limits
from cprec_recbole.versions import Version


class Softmax(nn.Module, ABC):
    """Scores, probabilities and loss over a block embedding.

    The padding item is never a target and has no probability.

    Args:
        table: the factors that the softmax reads; the model's own block embedding when tied.
        loss_memory: bytes that the logits of a loss may take at a time.
    """

    def __init__(self, table: BlockEmbedding, loss_memory: int = LOSS_MEMORY) -> None:
        super().__init__()
        self.table = table
        self.loss_memory = loss_memory
        self.sampler: NegativeSampler | None = None
        self._search_table: SearchTable | None = None

    @property
    def head_block(self) -> Block:
        """The block of the most popular items."""
        return self.table.blocks[0]

    @property
    def tails(self) -> list[Block]:
        """The other blocks, in popularity order."""
        return self.table.blocks[1:]

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean negative log-likelihood of target ids, `[N, d], [N] -> []`; rows whose target is
        padding do not count. 0 for no targets.

        Value and gradient are computed together, in pieces that take at most `loss_memory`.
        """
        workspace, counts = Workspace(self.loss_memory), target != PADDING
        is_small = workspace.holds(len(target), self.table.partition.n_items, hidden)
        if is_small and not workspace.is_cached(hidden):  # choosing rows takes longer than all do
            total = self._summed_loss(hidden, target, counts, workspace)
            return total / counts.sum().clamp(min=1)
        rows = counts.nonzero().squeeze(1)
        hidden, target = hidden.index_select(0, rows), target.index_select(0, rows)
        return self._summed_loss(hidden, target, None, workspace) / max(1, len(rows))

    @abstractmethod
    def _summed_loss(
        self, hidden: Tensor, target: Tensor, counts: Tensor | None, workspace: Workspace
    ) -> Tensor:
        """The loss summed over the rows that count, `[N]`, `[]`. Where that is said, logits of all
        rows and items fit the workspace, and the device is not waited for."""

    @abstractmethod
    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log-probability of every item in id order, `[B, d] -> [B, n_items]`; -inf for padding."""

    @abstractmethod
    def scores(self, hidden: Tensor) -> Tensor:
        """Score of every item in id order, `[B, d] -> [B, n_items]`; ranks as `log_prob` does."""

    @abstractmethod
    def score(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Scores of given ids, `[B, d], [B, m] -> [B, m]`; equal to those columns of `scores`."""

    def topk(
        self,
        hidden: Tensor,
        k: int,
        exclude: Ids | None = None,
        allowed: Ids | None = None,
    ) -> TopK:
        """The k best items of each row, exact, with their `scores`; equal scores by lower item id.

        Never builds `[B, n_items]` of a large catalogue. With an index it skips groups of rows that
        cannot hold one of the best, else it reads every row of the table in pieces.

        Args:
            hidden: hidden states, `[B, d]`.
            k: how many items to return.
            exclude: item ids that must not be returned, `[B, m]`, or `[m]` for all rows; 0 excludes
                nothing.
            allowed: the only item ids that may be returned, `[m]`; every item if left out.

        Raises:
            CompressionError: hidden states that are not finite numbers, ids outside the catalogue,
                nothing allowed, or k above what is left for some row.
        """
        return self.search(hidden, k, exclude, allowed).topk

    def search(
        self,
        hidden: Tensor,
        k: int,
        exclude: Ids | None = None,
        allowed: Ids | None = None,
    ) -> Found:
        """As `topk`, and what it took: the share of the tail's rows that were read."""
        if torch.is_autocast_enabled(hidden.device.type):  # half precision would not be exact
            with torch.autocast(hidden.device.type, enabled=False):
                return self.search(hidden, k, exclude, allowed)
        table = self._current()
        if hidden.ndim != 2 or hidden.shape[1] != table.dim or not hidden.is_floating_point():
            raise CompressionError(
                f"Expected `hidden` to be real numbers of shape [B, {table.dim}], but got "
                f"{hidden.dtype} of {list(hidden.shape)}."
            )
        limits = check_limits(len(hidden), k, exclude, allowed, table.partition)
        return search(table, hidden, limits)

    def build_index(self) -> None:
        """Make the index of a large catalogue now: tail rows in groups with bounds, of which `topk`
        reads few. Without this call it is made by itself, after some hundreds of searches.

        It takes seconds for a million items and about as much memory as the tail. It is no part of
        the model's state, and dropped when weights change. Changes that are written through
        `.data` are not noticed: call this or `drop_index` after them. Only searches on a CPU have
        an index, where numba is installed.

        Raises:
            CompressionError: weights that are not finite numbers.
        """
        self._search_table = None
        compiled = compiled_search(self._current())
        if compiled is not None:
            compiled.build_index()

    @property
    def is_indexed(self) -> bool:
        """Whether there is an index of the weights as they are."""
        table = self._search_table
        if table is None or table.compiled is None or not table.version.is_current():
            return False
        return table.compiled.is_indexed

    def drop_index(self) -> None:
        """Forget the index and free its memory."""
        self._search_table = None

    @property
    def _tree(self) -> TreeSoftmax | None:
        return None

    def _current(self) -> SearchTable:
        table = self._search_table
        if table is None or not table.version.is_current():
            blocks = self.table.blocks
            self._search_table = table = SearchTable(
                self.table.partition,
                [block.rows() for block in blocks],
                [block.projection for block in blocks],
                None if self._tree is None else self._tree.clusters,
                Version(self),
            )
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_search_table": None}  # copies and pickles have no index


class FullSoftmax(Softmax):
    """One flat softmax over all items: `softmax(h . W_j[g] P_j)`.

    Computed as `(h P_j^T) W_j^T`, never through a materialised table. Its scores are the logits,
    so that with one block of full rank they equal RecBole's own.

    Attributes:
        sampler: draws the negatives of a training step, where the loss is sampled; None: it is of
            all items.
    """

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """See Softmax.loss; while the model is trained with a sampler, the sampled loss."""
        if self.sampler is None or not self.training:
            return super().loss(hidden, target)
        return self.sampled_loss(hidden, target, *self.sampler())

    def sampled_loss(
        self, hidden: Tensor, target: Tensor, negatives: Tensor, log_expected: Tensor
    ) -> Tensor:
        """Mean loss of targets among negatives that all of them share, rising, `[N, d], [N], [m],
        [m] -> []`; rows whose target is padding do not count. With every item drawn once it is the
        loss over all items; see `sampled_cross_entropy`."""
        rows = (target != PADDING).nonzero().squeeze(1)
        hidden, target = hidden.index_select(0, rows), target.index_select(0, rows)
        hit = (hidden * self.table(target)).sum(1)
        drawn = self.table(negatives), negatives, log_expected
        total = sampled_cross_entropy(hidden, hit, target, *drawn, self.loss_memory)
        return total / max(1, len(rows))

    def logit_blocks(self, hidden: Tensor) -> list[LogitBlock]:
        """The columns of the softmax by position, as a loss reads them, of `[N, d]`."""
        return [block.logit_block(hidden) for block in self.table.blocks]

    def _summed_loss(
        self, hidden: Tensor, target: Tensor, counts: Tensor | None, workspace: Workspace
    ) -> Tensor:
        positions = self.table.partition.positions(target)
        blocks = self.logit_blocks(hidden)
        return cross_entropy(blocks, positions, workspace, padded=True, counts=counts)

    def pairwise_loss(self, hidden: Tensor, target: Tensor, negative: Tensor) -> Tensor:
        """RecBole's BPR: mean `-log sigmoid(target - negative)`, `[N, d], [N], [N] -> []`; rows
        whose target is padding do not count."""
        pair = self.score(hidden, torch.stack([target, negative], dim=1))
        counts = target != PADDING
        losses = F.logsigmoid(pair[:, 0] - pair[:, 1]) * counts
        return -losses.sum() / counts.sum().clamp(min=1)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """See Softmax.log_prob."""
        real = F.log_softmax(self._logits(hidden)[:, 1:], dim=1)
        return self.table.partition.by_item(F.pad(real, (1, 0), value=-torch.inf))

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits of every item in id order, `[B, d] -> [B, n_items]`, padding included."""
        return self.table.partition.by_item(self._logits(hidden))

    def score(self, hidden: Tensor, items: Tensor) -> Tensor:
        """See Softmax.score."""
        return torch.einsum("bd,bmd->bm", hidden, self.table(items))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits in popularity order, `[B, d] -> [B, n_items]`."""
        blocks = [self.head_block, *self.tails]
        return torch.cat([block.logits(hidden) for block in blocks], dim=1)


class TreeSoftmax(Softmax):
    """The paper's two-level softmax: the head's items and one cluster for each other block.

    With p the softmax over head items and clusters, a head item has `log p(x)` and an item of
    block j has `log p(cluster_j) + log softmax_j(x)`. A target's loss reads the head and at most
    one more block. Equal to `torch.nn.AdaptiveLogSoftmaxWithLoss` given the same weights. Its
    scores are the log-probabilities.

    Args:
        table: the factors that the softmax reads; the model's own block embedding when tied.
        loss_memory: bytes that the logits of a loss may take at a time.
    """

    def __init__(self, table: BlockEmbedding, loss_memory: int = LOSS_MEMORY) -> None:
        super().__init__(table, loss_memory)
        self.clusters = nn.Parameter(torch.empty(len(self.tails), table.dim))
        nn.init.normal_(self.clusters, std=0.02)

    @property
    def _tree(self) -> TreeSoftmax:
        return self

    @torch.no_grad()
    def average_clusters(self, counts: Tensor) -> None:
        """Point each cluster at the count-weighted mean of its items, `counts [n_items]` by id."""
        partition = self.table.partition
        order = partition.item_at.long().to(counts.device)
        for j, block in enumerate(self.tails, start=1):
            rows = order[partition.starts[j] : partition.cutoffs[j]]
            weights = counts[rows].double().clamp(min=1)  # sums of counts overflow half precision
            mean = (weights / weights.sum()).to(block.weight.device) @ block.weight.double()
            self.clusters[j - 1] = block.out_of_rank(mean.to(block.weight.dtype))

    def _summed_loss(
        self, hidden: Tensor, target: Tensor, counts: Tensor | None, workspace: Workspace
    ) -> Tensor:
        """See Softmax. Reads the head, and each of the other blocks for the targets that are in it;
        for all where the device would have to be waited for."""
        partition = self.table.partition
        positions = partition.positions(target)
        blocks = partition.blocks(positions)
        if counts is None:
            order = blocks.argsort(stable=True)  # the targets of a block beside each other
            hidden, positions, blocks = hidden[order], positions[order], blocks[order]
        numbers = torch.arange(len(partition.sizes), device=blocks.device).unsqueeze(1)
        here = blocks == numbers  # [blocks, N]
        branch = torch.where(here[0], positions, len(self.head_block.weight) - 1 + blocks)
        total = cross_entropy(self._branches(hidden), branch, workspace, padded=True, counts=counts)
        if counts is None:
            n_targets = here.sum(1).tolist()  # one wait for the device, not one a block
            rows = zip(hidden.split(n_targets), positions.split(n_targets), repeat(None))
        else:
            rows = zip(repeat(hidden), repeat(positions), here)
        starts, sizes = partition.starts, partition.sizes
        for block, start, size, (own, position, share) in zip(
            self.table.blocks, starts, sizes, rows
        ):
            if start and len(own):
                column = (position - start).clamp(0, size - 1)
                logits = [block.logit_block(own)]
                total = total + cross_entropy(logits, column, workspace, counts=share)
        return total

    def log_prob(self, hidden: Tensor) -> Tensor:
        """See Softmax.log_prob."""
        branches = F.log_softmax(self._branch_logits(hidden), dim=1)
        first_cluster = self.head_block.weight.shape[0] - 1
        parts = [F.pad(branches[:, :first_cluster], (1, 0), value=-torch.inf)]
        for j, block in enumerate(self.tails):
            cluster = branches[:, first_cluster + j, None]
            parts.append(cluster + F.log_softmax(block.logits(hidden), dim=1))
        return self.table.partition.by_item(torch.cat(parts, dim=1))

    def scores(self, hidden: Tensor) -> Tensor:
        """Log-probability of every item in id order, `[B, d] -> [B, n_items]`."""
        return self.log_prob(hidden)

    def score(self, hidden: Tensor, items: Tensor) -> Tensor:
        """See Softmax.score. Reads the head and those blocks that hold one of the items."""
        partition = self.table.partition
        positions = partition.positions(items)
        blocks = partition.blocks(positions)
        branches = F.log_softmax(self._branch_logits(hidden), dim=1)
        first_cluster = self.head_block.weight.shape[0] - 1
        branch = torch.where(blocks == 0, positions - 1, first_cluster + blocks - 1)
        scores = branches.gather(1, branch.clamp(min=0))
        for j, block in enumerate(self.tails, start=1):
            here = blocks == j
            rows = here.any(1).nonzero().squeeze(1)
            if len(rows):
                inside = F.log_softmax(block.logits(hidden[rows]), dim=1)
                column = (positions[rows] - partition.starts[j]).clamp(0, inside.shape[1] - 1)
                part = torch.where(here[rows], inside.gather(1, column), 0.0)
                scores = scores.index_add(0, rows, part)
        return scores.masked_fill(items == PADDING, -torch.inf)

    def _branches(self, hidden: Tensor) -> list[LogitBlock]:
        """Columns of the head's items, padding included, then of the clusters."""
        items = self.head_block.logit_block(hidden)
        return [items, LogitBlock(hidden, self.clusters)] if self.tails else [items]

    def _branch_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the head's items, then of the clusters, `[B, d] -> [B, k_1 - 1 + n - 1]`."""
        items = self.head_block.logits(hidden)[:, 1:]
        return torch.cat([items, hidden @ self.clusters.T], dim=1)


def build_softmax(kind: str, table: BlockEmbedding, loss_memory: int = LOSS_MEMORY) -> Softmax:
    """The softmax of that name (`full` or `tree`) over a table."""
    return {"full": FullSoftmax, "tree": TreeSoftmax}[kind](table, loss_memory)
