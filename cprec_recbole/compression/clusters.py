"""Where the clusters of a tree softmax start: at the original's probabilities of its blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.compression.histories import Histories
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.warm_start import LOOK_HISTORIES, Fit
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.models.eval_mode import in_eval_mode
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.partition import PADDING
from cprec_recbole.softmax import TreeSoftmax

_ROWS = 2048  # hidden states that clusters are fitted on
_LOGITS = 2**24  # of the original's scores at a time: 64 MiB


@torch.no_grad()
def block_masses(table: BlockEmbedding, original: Original, hidden: Tensor) -> Tensor:
    """The original's probability of each block, `[N, d] -> [N, n_blocks]`, a few rows at a time.

    Args:
        table: whose blocks they are.
        original: whose softmax; padding has no probability.
        hidden: its hidden states.
    """
    partition = table.partition
    by_position = original.table[partition.item_at.long()]
    parts = []
    for rows in hidden.split(max(1, _LOGITS // original.n_items)):
        logits = rows @ by_position.T
        logits[:, PADDING] = -torch.inf
        pieces = zip(partition.starts, partition.cutoffs)
        sums = torch.stack([logits[:, a:b].logsumexp(1) for a, b in pieces], dim=1)
        parts.append(sums.softmax(1))
    return torch.cat(parts)


@torch.no_grad()
def fit_clusters(softmax: TreeSoftmax, hidden: Tensor, masses: Tensor, steps: int = 50) -> None:
    """Fit the cluster vectors so that each block gets the probability that the original gave it.

    A softmax regression on branches (the head as a whole, and each cluster): convex, solved by
    L-BFGS from where the clusters stand.

    Args:
        softmax: the tree softmax.
        hidden: hidden states of the compressed model, `[N, d]`.
        masses: the original's probability of each block, `[N, n_blocks]`.
        steps: iterations at most.
    """
    if not len(softmax.tails):
        return
    exact = hidden.double()
    items = softmax.head_block.logits(hidden)[:, 1:].double()
    in_head = items.logsumexp(1, keepdim=True)
    clusters = softmax.clusters.detach().double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([clusters], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        with torch.enable_grad():
            logits = torch.cat([in_head, exact @ clusters.T], dim=1)
            loss = -(masses.double() * F.log_softmax(logits, dim=1)).sum(1).mean()
            loss = loss + 1e-6 * clusters.square().sum()
            (clusters.grad,) = torch.autograd.grad(loss, [clusters])
        return loss

    optimizer.step(closure)
    if torch.isfinite(clusters).all():
        softmax.clusters.copy_(clusters)


@torch.no_grad()
def fit_clusters_to(
    small: CompressedRecommender, original: Original, histories: Histories, seed: int = 0
) -> None:
    """Fit the clusters of a tree softmax to the original's probabilities of the blocks; with a full
    softmax there is nothing to do."""
    if not isinstance(small.softmax, TreeSoftmax):
        return
    generator = torch.Generator().manual_seed(seed)
    look = histories.sample(LOOK_HISTORIES, generator)
    fit = Fit(small, original)
    with in_eval_mode(small, original.model):
        items = fit.read(look)
        wanted, given = original.encoder.all_states(items), small.encoder.all_states(items)
        rows = torch.randperm(len(wanted), generator=generator)[:_ROWS].to(items.device)
        fit_clusters(
            small.softmax, given[rows], block_masses(small.softmax.table, original, wanted[rows])
        )
