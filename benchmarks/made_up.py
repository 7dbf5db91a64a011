"""A made-up catalogue with structure, and a small sequential model trained on it.

What a search can skip depends on the weights, so benchmarks need trained ones; no public data set
has ten million items. Here popularity follows Zipf's law, every item belongs to one of about
`sqrt(n_items)` topics, and a user moves between a few topics. A GRU over a block embedding learns to
predict the next item by a sampled softmax (with the correction for popularity), each step touching
only the rows that it uses, so that ten million items train in minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.partition import Partition
from cprec_recbole.softmax import SoftmaxHead, TreeSoftmax, build_softmax

LENGTH = 12  # items of a session
STAY, SWITCH = 0.75, 0.15  # of steps that stay in the topic, or move to another of the user's


@dataclass
class Catalogue:
    """Items 1 .. n_items - 1 in popularity order; topic t holds every n_topics-th of a shuffle."""

    n_items: int
    by_topic: Tensor  # item ids, topic after topic, popular ones first, [n_items - 1]
    starts: Tensor  # first of each topic in `by_topic`, [n_topics + 1]
    cumulative: Tensor  # popularity summed along `by_topic`, [n_items]

    @classmethod
    def of_size(cls, n_items: int, generator: torch.Generator) -> Catalogue:
        n_topics = round(math.sqrt(n_items))
        topic = torch.randint(n_topics, (n_items - 1,), generator=generator)
        by_topic = topic.argsort(stable=True)
        popularity = 1.0 / (by_topic.double() + 10)
        starts = F.pad(torch.bincount(topic, minlength=n_topics).cumsum(0), (1, 0))
        return cls(n_items, by_topic + 1, starts, F.pad(popularity.cumsum(0), (1, 0)))

    @property
    def n_topics(self) -> int:
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
            low, high = self.cumulative[self.starts[current]], self.cumulative[self.starts[current + 1]]
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
        return self.dense(self.gru(vectors)[0])


class RowAdagrad:
    """Adagrad with one rate a row, which touches only the rows of a step."""

    def __init__(self, weight: Tensor, lr: float) -> None:
        self.weight, self.lr = weight, lr
        self.squares = torch.zeros(len(weight))

    def step(self, rows: Tensor, gradient: Tensor) -> None:
        self.squares[rows] += gradient.square().mean(1)
        rate = self.lr / (self.squares[rows].sqrt() + 1e-8)
        self.weight.data.index_add_(0, rows, gradient * rate.unsqueeze(1), alpha=-1.0)


class Trainer:
    """Trains a head and an encoder on sessions of a catalogue with sampled negatives."""

    def __init__(
        self, kind: str, catalogue: Catalogue, cutoffs: list[int], ranks: list[int], dim: int
    ) -> None:
        partition = Partition(torch.arange(catalogue.n_items), cutoffs)
        self.catalogue = catalogue
        self.table = BlockEmbedding(partition, ranks, dim)
        self.head = build_softmax(kind, self.table)
        self.encoder = Encoder(dim)
        self.rows = [RowAdagrad(block.weight, lr=0.05) for block in self.table.blocks]
        small = [b.projection for b in self.table.blocks if b.projection is not None]
        small += [self.head.clusters] if isinstance(self.head, TreeSoftmax) else []
        self.adam = torch.optim.Adam([*self.encoder.parameters(), *small], lr=2e-3)

    def step(self, sessions: Tensor, n_negatives: int, generator: torch.Generator) -> float:
        """One step on `[B, LENGTH]` sessions; returns the loss."""
        partition = self.table.partition
        negatives = [
            self._draw(start, end, n_negatives, generator)
            for start, end in zip(partition.starts, partition.cutoffs)
        ]
        used, inverse = torch.cat([sessions.flatten(), *negatives]).unique(return_inverse=True)
        blocks = partition.blocks(used)
        vectors, leaves = self._vectors(used, blocks)
        inputs, *drawn = inverse.split([sessions.numel(), *[n_negatives] * len(negatives)])
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
        return float(loss)

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
        if not isinstance(self.head, TreeSoftmax):
            logits = [self._corrected(hidden, vectors, used, target, some, j)
                      for j, some in enumerate(drawn)]
            return (torch.logsumexp(torch.cat([positive[:, None], *logits], 1), 1) - positive).mean()
        inside = blocks[target]
        clusters = hidden @ self.head.clusters.T
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


@torch.no_grad()
def hidden_states(table: BlockEmbedding, encoder: Encoder, sessions: Tensor) -> Tensor:
    """Hidden state after the last but one item of each session, `[B, LENGTH] -> [B, d]`."""
    return encoder(table(sessions[:, :-1]))[:, -1].contiguous()


def train(
    kind: str, n_items: int, cutoffs: list[int], ranks: list[int], dim: int = 64,
    steps: int = 2000, batch: int = 256, n_negatives: int = 1024, seed: int = 2020,
    progress: bool = True,
) -> tuple[SoftmaxHead, Encoder, Catalogue]:
    """Train on made-up sessions; returns the head, the encoder and the catalogue."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    catalogue = Catalogue.of_size(n_items, generator)
    trainer = Trainer(kind, catalogue, cutoffs, ranks, dim)
    losses = []
    for step in range(steps):
        losses.append(trainer.step(catalogue.sessions(batch, generator), n_negatives, generator))
        if progress and (step + 1) % 200 == 0:
            print(f"{kind} {n_items}: step {step + 1}, loss {sum(losses[-200:]) / 200:.3f}", flush=True)
    return trainer.head, trainer.encoder, catalogue
