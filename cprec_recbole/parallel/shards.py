"""Tail blocks whose rows are spread over the processes of a run, for catalogues that outgrow one
machine's memory.

Each process keeps an equal share of a block's rows, as one of torch's DTensors. What is exchanged
are hidden states in the block's own space (`r` numbers each), never rows: every process computes
with its rows for everybody's hidden states, so that the gradient of its rows is whole. Softmax and
look-ups are those of one process, but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.config import CompressionError
from cprec_recbole.embedding import Block, BlockEmbedding
from cprec_recbole.losses.cross_entropy import Strip, log_sum
from cprec_recbole.parallel.exchange import Group
from cprec_recbole.parallel.spread import spread_as
from cprec_recbole.partition import PADDING

_DRAWN = 2**16  # rows drawn at a time, as many as 16 divides: so the draws are those of one process


class ShardedBlock(Block):
    """A block of which this process has some rows.

    Every method but `out_of_rank` and `into_rank` must be called by all processes of the group at
    once, each with hidden states or positions of its own, as many as it has.

    Args:
        size: items `k` in the block, over all processes.
        rank: rank `r` of the block.
        dim: size `d` of an item vector.
        group: the processes.
    """

    group: Group

    def __init__(self, size: int, rank: int, dim: int, group: Group) -> None:
        nn.Module.__init__(self)
        self.sparse = False
        self.group = group
        self.own = group.rows(size)
        own = torch.empty(self.own.stop - self.own.start, rank)
        self.weight = nn.Parameter(_distributed(own, (size, rank), group))
        self.projection = nn.Parameter(torch.empty(rank, dim)) if rank != dim else None

    @property
    def own_rows(self) -> Tensor:
        """The rows that this process has, `[k / world, r]`; differentiable."""
        weight: Any = self.weight
        return weight.to_local()

    def normal_(self, std: float) -> None:
        """Draw the rows as one process would, keeping those of this one."""
        size, rank = self.weight.shape
        own = self.own_rows
        ends = [*range(_DRAWN, size - _DRAWN, _DRAWN), size]
        for start, end in zip([0, *ends], ends):
            drawn = own.new_empty(end - start, rank).normal_(0.0, std)
            first, last = max(start, self.own.start), min(end, self.own.stop)
            if first < last:
                here = slice(first - self.own.start, last - self.own.start)
                own[here] = drawn[first - start : last - start]

    @torch.no_grad()
    def whole_rows(self) -> Tensor:
        """All rows of the block on the first process, `[k, r]`; `[0, r]` on the others."""
        size, rank = self.weight.shape
        share = -(-size // self.group.world)
        own = self.own_rows.detach()
        sent = F.pad(own, (0, 0, 0, share - len(own)))
        first = self.group.rank == 0
        found = own.new_empty(self.group.world * share if first else 0, rank)
        dist.gather(sent, list(found.split(share)) if first else None, dst=0)
        return found[:size]

    def look_up(self, positions: Tensor, start: int) -> Tensor:
        """See Block.look_up."""
        size, rank = self.weight.shape
        flat = positions.flatten()
        where = ((flat >= start) & (flat < start + size)).nonzero().squeeze(1)
        most = self.group.most(len(where), positions.device)
        codes = self.own_rows.new_zeros(len(flat), rank)
        if most:
            rows = F.pad(flat[where] - start, (0, most - len(where)), value=-1)
            own, here = self._own(self.group.gather(rows))
            found = self.group.give_back(self._rows(own) * here.unsqueeze(1))
            codes = codes.index_add(0, where, found[: len(where)])
        return codes.view(*positions.shape, rank)

    def logits(self, hidden: Tensor) -> Tensor:
        """Not to be had: no process has all rows."""
        raise self._not_whole()

    def learnt(self) -> Tensor:
        """Not to be had: no process has all rows."""
        raise self._not_whole()

    def _not_whole(self) -> CompressionError:
        return CompressionError(
            "Expected a whole table for scores of all items, but its tail blocks are spread over "
            f"{self.group.world} processes; use topk or loss, or gather the model first."
        )

    def squared_norm(self) -> Tensor:
        """See Block.squared_norm."""
        own = self.own_rows
        if self.projection is None:
            return self.group.sum(own.square().sum())
        return (self.group.sum(own.T @ own) * (self.projection @ self.projection.T)).sum()

    def normaliser_and_logit(self, hidden: Tensor, rows: Tensor, memory: int) -> tuple[Tensor, ...]:
        """Logarithm of the normaliser over the block, and the logit of a row, for each state.

        Args:
            hidden: this process's hidden states, `[n, d]`.
            rows: a row of the block for each, `[n]`; below 0: none, with a logit of 0.
            memory: bytes that the logits held at a time may take.

        Returns:
            `[n]` and `[n]`.
        """
        n = len(hidden)
        most = self.group.most(n, hidden.device)
        if not most:
            return hidden.sum(1), hidden.sum(1)
        codes = self.group.gather(F.pad(self.into_rank(hidden), (0, 0, 0, most - n)))
        own, here = self._own(self.group.gather(F.pad(rows, (0, most - n), value=-1)))
        logit = (codes * self._rows(own)).sum(1) * here
        if len(self.own_rows):
            total = log_sum(Strip(codes, self.own_rows), memory)
        else:  # part of the graph all the same: the others wait for its gradient
            total = codes.sum(1) * 0 - torch.inf
        parts = self.group.swap(torch.stack([total.to(logit.dtype), logit], 1))  # [world, n, 2]
        return parts[:, :n, 0].logsumexp(0), parts[:, :n, 1].sum(0)

    def cross_entropy(self, hidden: Tensor, rows: Tensor, memory: int) -> Tensor:
        """See Block.cross_entropy."""
        normaliser, logit = self.normaliser_and_logit(hidden, rows, memory)
        return (normaliser - logit).sum()

    def _own(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the block as this process's, and which of them are."""
        here = (rows >= self.own.start) & (rows < self.own.stop)
        return torch.where(here, rows - self.own.start, 0), here

    def _rows(self, own: Tensor) -> Tensor:
        """Rows by this process's numbers, `[m] -> [m, r]`; zeros where it has none."""
        rows = self.own_rows
        if len(rows):
            return rows[own]
        return rows.new_zeros(len(own), rows.shape[1]) + rows.sum()


def full_loss(table: BlockEmbedding, hidden: Tensor, positions: Tensor, memory: int) -> Tensor:
    """Mean negative log-likelihood under one softmax over blocks in several places, `[]`.

    Args:
        table: the factors.
        hidden: this process's hidden states, `[N, d]`.
        positions: their targets, in popularity order, `[N]`.
        memory: bytes that the logits held at a time may take.
    """
    normalisers, logits = [], []
    for block, start in zip(table.blocks, table.partition.starts):
        here = (positions >= start) & (positions < start + len(block.weight))
        rows = torch.where(here, positions - start, -1)
        if isinstance(block, ShardedBlock):
            normaliser, logit = block.normaliser_and_logit(hidden, rows, memory)
        else:
            codes = block.into_rank(hidden)
            normaliser = log_sum(Strip(codes, block.weight), memory, padded=start == PADDING)
            logit = (codes * block.weight[rows.clamp(min=0)]).sum(1) * here
        normalisers.append(normaliser)
        logits.append(logit)
    whole = torch.stack(normalisers).logsumexp(0)
    return (whole - torch.stack(logits).sum(0)).sum() / max(1, len(hidden))


def spread_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of which each process has a part, whose gradients need no sum over processes."""
    return [m.weight for m in model.modules() if isinstance(m, ShardedBlock)]


def sharded_blocks(model: nn.Module) -> dict[str, ShardedBlock]:
    """The blocks of which each process has a part, by the names of their rows in a state."""
    blocks = model.named_modules(remove_duplicate=False)  # a tied table has two names
    return {f"{name}.weight": m for name, m in blocks if isinstance(m, ShardedBlock)}


def gathered_state(model: nn.Module) -> dict[str, Any]:
    """The state of a model as one process would have it; all processes must call it.

    Blocks are put together one at a time, on the first process alone, which needs the memory for
    them; the others get empty tensors in their place.
    """
    blocks = {id(block): block for block in sharded_blocks(model).values()}
    whole = {id(block.weight): block.whole_rows() for block in blocks.values()}
    names = {name: id(block.weight) for name, block in sharded_blocks(model).items()}
    return {
        name: whole[names[name]] if name in names else value
        for name, value in model.state_dict().items()
    }


def own_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of whole blocks, as `gathered_state` gives it, with this process's rows of them.

    Args:
        model: with or without spread blocks.
        state: it may hold rows that are spread already.

    Raises:
        CompressionError: blocks of another size.
    """
    found = dict(state)
    for name, block in sharded_blocks(model).items():
        rows = state.get(name)
        if rows is None or hasattr(rows, "to_local"):
            continue
        if rows.shape != block.weight.shape:
            raise CompressionError(
                f"Expected `state_dict` to hold {name} of {list(block.weight.shape)}, but got "
                f"{list(rows.shape)}."
            )
        found[name] = spread_as(rows[block.own], block.weight)
    return found


def _distributed(own: Tensor, shape: tuple[int, int], group: Group) -> Tensor:
    """This process's rows as a part of torch's DTensor of that shape."""
    try:
        from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    except ImportError as error:  # torch 2.4 has it under a private name
        raise CompressionError(
            "Expected torch 2.5 or newer for tail blocks spread over processes, but got "
            f"{torch.__version__}."
        ) from error
    mesh = init_device_mesh(own.device.type, (group.world,))
    place: Any = DTensor.from_local
    return place(
        own, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )
