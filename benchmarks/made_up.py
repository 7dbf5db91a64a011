"""A made-up catalogue with structure, and a small sequential model trained on it.

What a search can skip depends on the weights, so benchmarks need trained ones; no public data set
has ten million items. Here popularity follows Zipf's law, every item belongs to one of about
`sqrt(n_items)` topics, and a user moves between a few topics. A GRU over a block embedding learns
to predict the next item by a sampled softmax (with the correction for popularity), each step
touching only the rows that it uses, so that ten million items train in minutes.

    python benchmarks/made_up.py full|tree ITEMS ...    # train them into benchmarks/cache/
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.partition import Partition
from cprec_recbole.softmax import Softmax, TreeSoftmax, build_softmax

DIM, RANKS = 64, (64, 16, 4)
STEPS, BATCH, N_NEGATIVES = 2000, 256, 1024
N_STATES = 4096  # hidden states that are kept
CACHE = Path(__file__).parent / "cache"
LENGTH = 12  # items of a session
STAY, SWITCH = 0.75, 0.15  # of steps that stay in the topic, or move to another of the user's


def cutoffs_of(n_items: int) -> list[int]:
    """Cutoffs at 2% and 20% of the items."""
    return [n_items // 50, n_items // 5, n_items]


@dataclass
class Catalogue:
    """Items 1 .. n_items - 1 in popularity order; topic t holds every n_topics-th of a shuffle."""

    n_items: int
    by_topic: Tensor  # item ids, topic after topic, popular ones first, [n_items - 1]
    starts: Tensor  # first of each topic in `by_topic`, [n_topics + 1]
    cumulative: Tensor  # popularity summed along `by_topic`, [n_items]

    @classmethod
    def of_size(cls, n_items: int, generator: torch.Generator) -> Catalogue:
        """A catalogue with topics drawn at random."""
        n_topics = round(math.sqrt(n_items))
        topic = torch.randint(n_topics, (n_items - 1,), generator=generator)
        by_topic = topic.argsort(stable=True)
        popularity = 1.0 / (by_topic.double() + 10)
        starts = F.pad(torch.bincount(topic, minlength=n_topics).cumsum(0), (1, 0))
        return cls(n_items, by_topic + 1, starts, F.pad(popularity.cumsum(0), (1, 0)))

    @property
    def n_topics(self) -> int:
        """How many topics there are."""
        return len(self.starts) - 1

    def sessions(self, n: int, generator: torch.Generator) -> Tensor:
        """Histories of `LENGTH` items, `[n, LENGTH]`."""
        weights = self.cumulative[self.starts].diff()
        favourites = torch.multinomial(weights, n * 3, True, generator=generator).view(n, 3)
        current, columns = favourites[:, 0], []
        for _ in range(LENGTH):
            luck = torch.rand(n, generator=generator)
            other = favourites[torch.arange(n), torch.randint(3, (n,), generator=generator)]
            current = torch.where(luck > 1 - SWITCH, other, current)
            low, high = (
                self.cumulative[self.starts[current]],
                self.cumulative[self.starts[current + 1]],
            )
            anywhere = (luck > STAY) & (luck <= 1 - SWITCH)
            low = torch.where(anywhere, 0.0, low)
            high = torch.where(anywhere, self.cumulative[-1], high)
            at = low + (high - low) * torch.rand(n, dtype=torch.float64, generator=generator)
            index = torch.searchsorted(self.cumulative, at, right=True) - 1
            columns.append(self.by_topic[index.clamp(0, self.n_items - 2)])
        return torch.stack(columns, dim=1)


class Encoder(nn.Module):
    """GRU4Rec's layers: vectors of a history to hidden states, `[B, L, d] -> [B, L, d]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, 2 * dim, bias=False, batch_first=True)
        self.dense = nn.Linear(2 * dim, dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """Hidden states at every position."""
        return self.dense(self.gru(vectors)[0])


class RowAdagrad:
    """Adagrad with one rate a row, which touches only the rows of a step."""

    def __init__(self, weight: Tensor, lr: float) -> None:
        self.weight, self.lr = weight, lr
        self.squares = torch.zeros(len(weight))

    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """Move some rows, `[m], [m, r]`."""
        self.squares[rows] += gradient.square().mean(1)
        rate = self.lr / (self.squares[rows].sqrt() + 1e-8)
        self.weight.data.index_add_(0, rows, gradient * rate.unsqueeze(1), alpha=-1.0)


class Trainer:
    """Trains a head and an encoder on sessions of a catalogue with sampled negatives."""

    def __init__(self, catalogue: Catalogue, head: Softmax) -> None:
        self.catalogue, self.softmax, self.table = catalogue, head, head.table
        self.encoder = Encoder(head.table.dim)
        self.rows = [RowAdagrad(block.weight, lr=0.05) for block in self.table.blocks]
        small = [b.projection for b in self.table.blocks if b.projection is not None]
        small += [head.clusters] if isinstance(head, TreeSoftmax) else []
        self.adam = torch.optim.Adam([*self.encoder.parameters(), *small], lr=2e-3)

    def step(self, sessions: Tensor, generator: torch.Generator) -> float:
        """One step on `[B, LENGTH]` sessions; returns the loss."""
        partition = self.table.partition
        negatives = [
            self._draw(start, end, N_NEGATIVES, generator)
            for start, end in zip(partition.starts, partition.cutoffs)
        ]
        used, inverse = torch.cat([sessions.flatten(), *negatives]).unique(return_inverse=True)
        blocks = partition.blocks(used)
        vectors, leaves = self._vectors(used, blocks)
        inputs, *drawn = inverse.split([sessions.numel(), *[N_NEGATIVES] * len(negatives)])
        inputs = inputs.view(sessions.shape)
        hidden = self.encoder(F.embedding(inputs[:, :-1], vectors)).flatten(0, 1)
        target = inputs[:, 1:].flatten()
        loss = self._loss(hidden, vectors, target, drawn, used, blocks)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        for optimizer, (rows, leaf) in zip(self.rows, leaves):
            if leaf.grad is not None:
                optimizer.step(rows, leaf.grad)
        return float(loss.detach())

    def _vectors(self, used: Tensor, blocks: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Vectors of the used items, and each block's rows as leaves of the graph."""
        parts, leaves = [], []
        for j, block in enumerate(self.table.blocks):  # `used` is sorted, so blocks are runs
            rows = used[blocks == j] - self.table.partition.starts[j]
            leaf = block.weight.detach()[rows].requires_grad_()
            leaves.append((rows, leaf))
            parts.append(block.out_of_rank(leaf))
        return torch.cat(parts), leaves

    def _loss(
        self,
        hidden: Tensor,
        vectors: Tensor,
        target: Tensor,
        drawn: list[Tensor],
        used: Tensor,
        blocks: Tensor,
    ) -> Tensor:
        positive = (hidden * vectors[target]).sum(1)
        if not isinstance(self.softmax, TreeSoftmax):
            logits = [
                self._corrected(hidden, vectors, used, target, some, j)
                for j, some in enumerate(drawn)
            ]
            return (
                torch.logsumexp(torch.cat([positive[:, None], *logits], 1), 1) - positive
            ).mean()
        inside = blocks[target]
        clusters = hidden @ self.softmax.clusters.T
        top = self._corrected(hidden, vectors, used, target, drawn[0], 0)
        is_tail = (inside > 0).unsqueeze(1)
        own = torch.where(is_tail, -torch.inf, positive.unsqueeze(1))
        branch = torch.logsumexp(torch.cat([own, clusters, top], 1), 1)
        chosen = torch.where(
            is_tail, clusters.gather(1, (inside - 1).clamp(min=0).unsqueeze(1)), own
        ).squeeze(1)
        loss = (branch - chosen).sum()
        for j in range(1, len(drawn)):
            rows = (inside == j).nonzero().squeeze(1)
            logits = self._corrected(hidden[rows], vectors, used, target[rows], drawn[j], j)
            own = positive[rows]
            loss = loss + (torch.logsumexp(torch.cat([own[:, None], logits], 1), 1) - own).sum()
        return loss / len(target)

    def _corrected(
        self, hidden: Tensor, vectors: Tensor, used: Tensor, target: Tensor, drawn: Tensor, j: int
    ) -> Tensor:
        """Logits of negatives less the log of how often they are drawn; the target left out."""
        logits = hidden @ vectors[drawn].T
        start, end = self.table.partition.starts[j], self.table.partition.cutoffs[j]
        total = math.log((end + 9) / (max(start, 1) + 9))
        expected = len(drawn) / (used[drawn].double() + 9) / total  # of each item, in this draw
        logits = logits - expected.log().to(logits.dtype)
        return logits.masked_fill(target.unsqueeze(1) == drawn, -torch.inf)

    def _draw(self, start: int, end: int, n: int, generator: torch.Generator) -> Tensor:
        """Positions of a block by Zipf's law, `[n]`."""
        low, high = math.log(max(start, 1) + 9), math.log(end + 9)
        at = torch.rand(n, dtype=torch.float64, generator=generator)
        return (torch.exp(low + (high - low) * at) - 9).long().clamp(max(start, 1), end - 1)


@dataclass
class Trained:
    """A trained head, and hidden states of sessions that it was not trained on.

    Attributes:
        softmax: over blocks of `cutoffs_of`, ranks 64, 16 and 4.
        hidden: hidden state before the last item of each session, `[N, d]`.
        last: that item, `[N]`.
    """

    softmax: Softmax
    hidden: Tensor
    last: Tensor

    def hit_rate(self, k: int = 20, n: int = 512) -> float:
        """HR@k of the head on `n` of the sessions."""
        return hit_rate(self.softmax.topk(self.hidden[:n], k).items, self.last[:n])


def hit_rate(items: Tensor, last: Tensor) -> float:
    """Share of rows whose list holds the item that came, `[N, k], [N]`."""
    return float((items == last.unsqueeze(1)).any(1).float().mean())


@lru_cache
def trained(kind: str, n_items: int, steps: int | None = None, seed: int = 2020) -> Trained:
    """A head of that size, from `CACHE` or trained now."""
    steps = STEPS if steps is None else steps
    file = CACHE / f"{kind}-{n_items}-{steps}-{seed}.pt"
    partition = Partition(torch.arange(n_items), cutoffs_of(n_items))
    head = build_softmax(kind, BlockEmbedding(partition, RANKS, DIM))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_train(head, kind, n_items, steps, seed), file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
    saved = torch.load(file)
    head.load_state_dict(saved["head"])
    return Trained(head.eval(), saved["hidden"], saved["last"])


@torch.enable_grad()  # whoever asks may be within no_grad
def _train(head: Softmax, kind: str, n_items: int, steps: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    catalogue = Catalogue.of_size(n_items, generator)
    head.table.reset_parameters(std=1 / math.sqrt(DIM))
    trainer = Trainer(catalogue, head)
    losses: list[float] = []
    for step in range(steps):
        losses.append(trainer.step(catalogue.sessions(BATCH, generator), generator))
        if (step + 1) % 200 == 0:
            mean = sum(losses[-200:]) / 200
            print(f"{kind}, {n_items:,} items: step {step + 1}, loss {mean:.3f}", flush=True)
    sessions = catalogue.sessions(N_STATES, generator)
    with torch.no_grad():
        hidden = trainer.encoder(head.table(sessions[:, :-1]))[:, -1].contiguous()
    return {"head": head.state_dict(), "hidden": hidden, "last": sessions[:, -1]}


if __name__ == "__main__":
    for size in sys.argv[2:]:
        result = trained(sys.argv[1], int(size))
        print(f"{sys.argv[1]}, {size} items: HR@20 {result.hit_rate():.4f}", flush=True)
