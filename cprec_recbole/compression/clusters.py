"""Where the clusters of a tree softmax start: at the original's probabilities of its blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.compression.histories import sample
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.warm_start import LOOK_HISTORIES, trimmed
from cprec_recbole.models.eval_mode import in_eval_mode
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.partition import PADDING, Partition
from cprec_recbole.softmax import TreeSoftmax

_ROWS = 2048  # hidden states that clusters are fitted on
_LOGITS = 2**24  # of the original's scores at a time: 64 MiB
_STEPS = 50


@torch.no_grad()
def fit_clusters_to(small: CompressedRecommender, original: Original, histories: Tensor) -> None:
    """Fit the clusters of a tree softmax to the original's probabilities of the blocks; with a full
    softmax there is nothing to do."""
    if not isinstance(small.softmax, TreeSoftmax):
        return
    generator = torch.Generator().manual_seed(0)
    items = trimmed(small, sample(histories, LOOK_HISTORIES, generator))
    with in_eval_mode(small, original.model):
        wanted, given = original.encoder.all_states(items), small.encoder.all_states(items)
    rows = torch.randperm(len(wanted), generator=generator)[:_ROWS].to(items.device)
    probabilities = block_probabilities(small.table.partition, original, wanted[rows])
    fit_clusters(small.softmax, given[rows], probabilities)


def block_probabilities(partition: Partition, original: Original, hidden: Tensor) -> Tensor:
    """The original's probability of each block, given its hidden states, a few rows at a time,
    `[N, d] -> [N, n_blocks]`. Padding has no probability."""
    by_position = original.table[partition.item_at.long()]
    parts = []
    for rows in hidden.split(max(1, _LOGITS // original.n_items)):
        logits = rows @ by_position.T
        logits[:, PADDING] = -torch.inf
        blocks = logits.split(partition.sizes, dim=1)
        parts.append(torch.stack([block.logsumexp(1) for block in blocks], dim=1).softmax(1))
    return torch.cat(parts)


@torch.no_grad()
def fit_clusters(softmax: TreeSoftmax, hidden: Tensor, probabilities: Tensor) -> None:
    """Fit the cluster vectors so that each block gets the probability that the original gave it.

    A softmax regression on branches (the head as a whole, and each cluster): convex, solved by
    L-BFGS from where the clusters stand. Of the compressed model's hidden states `[N, d]` and the
    original's probabilities `[N, n_blocks]`.
    """
    if not softmax.tails:
        return
    exact = hidden.double()
    head = softmax.head_block.logits(hidden)[:, 1:].double().logsumexp(1, keepdim=True)
    clusters = softmax.clusters.detach().double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([clusters], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        with torch.enable_grad():
            logits = torch.cat([head, exact @ clusters.T], dim=1)
            loss = -(probabilities.double() * F.log_softmax(logits, dim=1)).sum(1).mean()
            loss = loss + 1e-6 * clusters.square().sum()
            (clusters.grad,) = torch.autograd.grad(loss, [clusters])
        return loss

    optimizer.step(closure)
    if torch.isfinite(clusters).all():
        softmax.clusters.copy_(clusters)
