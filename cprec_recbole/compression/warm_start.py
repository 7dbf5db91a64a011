"""Where a compressed model starts: its hidden states and clusters fitted to the original's, over a
few histories, without a label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.compression.histories import sample
from cprec_recbole.compression.original import Original
from cprec_recbole.models.eval_mode import in_eval_mode, with_gradients
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.partition import PADDING, Partition
from cprec_recbole.results import WarmStart
from cprec_recbole.softmax import TreeSoftmax

FIT_HISTORIES = 2048  # what the layers are fitted on
_LOOK_HISTORIES, _QUICK_HISTORIES = 256, 64  # what starts are compared on, in one batch
_PASSES = 3
_BATCH = 32
_LEARNING_RATE = 1e-3
_RIDGE = 1e-3  # of a feature's mean square: how strongly a refit clings to what was there
_ROWS = 2048  # hidden states that clusters are fitted on
_LOGITS = 2**24  # of the original's scores at a time: 64 MiB
_STEPS = 50


def warm_start(
    small: CompressedRecommender, original: Original, histories: Tensor, quickly: bool = False
) -> WarmStart:
    """Fit the layers of a compressed model, which hold the original's weights, to the original's
    hidden states over some histories `[N, L]`, in three steps, each kept only where it helps: each
    set of shared layers takes the parameters of its best member (or their mean); norms and linear
    maps that are not shared are solved for by least squares; then, unless `quickly`, all are fitted
    by gradient."""
    generator = torch.Generator().manual_seed(0)
    n_compared = _QUICK_HISTORIES if quickly else _LOOK_HISTORIES
    look = _trimmed(small, sample(histories, n_compared, generator))
    with in_eval_mode(small, original.model):
        fit = _Fit(small, original, look)
        kept, copied, refitted = fit.choose_start()
        fitted = refitted
        if fit.sets and not quickly:
            some = sample(histories, FIT_HISTORIES, generator)
            fitted = fit.improved(refitted, lambda: fit.descend(some, generator))
        return WarmStart(kept, copied, refitted, fitted)


class _Fit:
    """A compressed model and its original on the same histories `[N, L]`."""

    def __init__(self, small: CompressedRecommender, original: Original, look: Tensor) -> None:
        self.small, self.original, self.look = small, original, look
        with torch.no_grad():
            self.wanted = original.encoder.all_states(look)
        self.layers, sets = small.spec.sharing(small.inner, small.compression.sharing)
        self.sets = [members for members in sets if len(members) > 1]
        of_table = {id(p) for p in small.table.parameters()}
        self.free = [p for p in small.inner.parameters() if id(p) not in of_table]

    @torch.no_grad()
    def error(self) -> float:
        """Relative squared error of the hidden states."""
        return float(_relative_error(self.small.encoder.all_states(self.look), self.wanted))

    def improved(self, before: float, change: Callable[[], None]) -> float:
        """Make a change and give the error after it; undo it where that is not less than before."""
        plain = [p.detach().clone() for p in self.free]
        change()
        after = self.error()
        if after < before:
            return after
        fill(self.free, plain)
        return before

    @torch.no_grad()
    def choose_start(self) -> tuple[int | None, float, float]:
        """Take the best parameters for each set, then refit what is not shared. Gives the member
        that was taken, and the error before and after the refit."""
        copied = [p.clone() for p in self.free]
        starts = []
        for member in (None, *range(max(map(len, self.sets), default=0))):
            fill(self.free, copied)
            self._take(member)
            before = self.error()
            after = self.improved(before, self._refit)
            starts.append((after, before, member, [p.clone() for p in self.free]))
        after, before, member, best = min(starts, key=lambda start: start[0])
        fill(self.free, best)
        return member, before, after

    def descend(self, histories: Tensor, generator: torch.Generator) -> None:
        """Fit by gradient."""
        optimizer = torch.optim.Adam(self.free, lr=_LEARNING_RATE)
        n_steps = _PASSES * -(-len(histories) // _BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, n_steps)
        for _ in range(_PASSES):
            order = torch.randperm(len(histories), generator=generator)
            for rows in order.split(_BATCH):
                items = _trimmed(self.small, histories[rows])
                with torch.no_grad():
                    wanted = self.original.encoder.all_states(items)
                with torch.enable_grad(), with_gradients(self.small):
                    error = _relative_error(self.small.encoder.all_states(items), wanted)
                    gradients = torch.autograd.grad(error, self.free, allow_unused=True)
                for parameter, gradient in zip(self.free, gradients):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()

    def _take(self, member: int | None) -> None:
        """Set shared parameters to those of one member of each set, or to their mean."""
        originals = self.small.spec.layers(self.original.inner)
        for members in self.sets:
            layers = [originals[i] for i in members]
            for (module, name), *slots in zip(self.layers[members[0]], *layers):
                values = torch.stack([getattr(*slot) for slot in slots])
                value = values.mean(0) if member is None else values[member % len(values)]
                getattr(module, name).copy_(value)

    def _refit(self) -> None:
        """Solve for each free norm and linear map, in the order in which they run, so that it gives
        what it gave in the original; each sees what those before it now give. One that runs more
        than once, or whose input comes by name, stays as it is."""
        real = self.look != PADDING
        if self.small.reads_last_column:
            real = torch.ones_like(real)
        outputs: dict[str, list[Any]] = defaultdict(list)

        def keep(name: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name].append(_rows(output, real) if inputs else None)

        def solve(name: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            _solve(module, _rows(inputs[0], real), _rows(output, real), outputs[name][0])
            return type(module).forward(module, inputs[0])  # without this hook

        shared = {id(getattr(*slot)) for members in self.sets for slot in self.layers[members[0]]}
        free = {
            name: module
            for name, module in self.small.inner.named_modules()
            if isinstance(module, nn.LayerNorm | nn.Linear)
            and module.weight is not None  # of a norm without parameters of its own
            and not any(id(p) in shared for p in module.parameters())
        }
        modules = dict(self.original.inner.named_modules())
        with _hooked(keep, {name: modules[name] for name in free}):
            self.original.encoder.all_states(self.look)
        once = [name for name, (first, *more) in outputs.items() if first is not None and not more]
        with _hooked(solve, {name: free[name] for name in once}):
            self.small.encoder.all_states(self.look)


def _hooked(hook: Callable[..., Any], modules: Mapping[str, nn.Module]) -> ExitStack:
    """Within, modules call `hook(name, module, inputs, output)` after they ran."""
    stack = ExitStack()
    for name, module in modules.items():
        stack.enter_context(module.register_forward_hook(partial(hook, name)))
    return stack


def _trimmed(small: CompressedRecommender, histories: Tensor) -> Tensor:
    """Histories on the model's device, without columns that are padding for all."""
    items = histories.to(small.table.partition.item_at.device)
    return items if small.reads_last_column else items[:, : int((items != PADDING).sum(1).max())]


@torch.no_grad()
def fill(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy values into parameters."""
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)


def _rows(states: Tensor, real: Tensor) -> Tensor:
    """What a layer reads or gives, `[..., d] -> [N, d]`, at positions that count if it has any."""
    return states[real] if states.shape[:-1] == real.shape else states.flatten(0, -2)


def _relative_error(hidden: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over the variance of what was wanted, `[N, d], [N, d] -> []`."""
    variance = (wanted - wanted.mean(0)).square().sum()
    return (hidden - wanted).square().sum() / variance.clamp(min=torch.finfo(wanted.dtype).tiny)


def _solve(module: Any, inputs: Tensor, output: Tensor, wanted: Tensor) -> None:
    """Bring the outputs `[N, d]` of a norm or a linear map nearest to what is wanted, by ridge
    regression of what is missing: with nothing missing nothing changes."""
    if len(inputs) < 2:
        return
    missing = (wanted - output).double()
    is_norm = isinstance(module, nn.LayerNorm)
    if is_norm:
        inputs = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    centre = inputs.double().mean(0)
    features = inputs.double() - centre
    if is_norm:
        slope = (features * missing).sum(0) / (features.square().sum(0) + _RIDGE * len(inputs))
        shift = missing.mean(0) - slope * centre
    else:
        gram = features.T @ features
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=1e-12))
        slope = torch.linalg.solve(gram, features.T @ missing).T
        shift = missing.mean(0) - slope @ centre
    module.weight += slope.to(module.weight.dtype)
    if module.bias is not None:
        module.bias += shift.to(module.bias.dtype)


@torch.no_grad()
def fit_clusters_to(small: CompressedRecommender, original: Original, histories: Tensor) -> None:
    """Fit the clusters of a tree softmax, if any, to the original's probabilities of the blocks."""
    if not isinstance(small.softmax, TreeSoftmax) or not small.softmax.tails:
        return
    generator = torch.Generator().manual_seed(0)
    items = _trimmed(small, sample(histories, _LOOK_HISTORIES, generator))
    with in_eval_mode(small, original.model):
        wanted, given = original.encoder.all_states(items), small.encoder.all_states(items)
    rows = torch.randperm(len(wanted), generator=generator)[:_ROWS].to(items.device)
    probabilities = block_probabilities(small.table.partition, original, wanted[rows])
    fit_clusters(small.softmax, given[rows], probabilities)


def block_probabilities(partition: Partition, original: Original, hidden: Tensor) -> Tensor:
    """The original's probability of each block, given its hidden states, `[N, d] -> [N, n_blocks]`,
    a few rows at a time."""
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
    """Fit the cluster vectors so that each block gets the original's probability `[N, n_blocks]` at
    the compressed model's hidden states `[N, d]`: a softmax regression, solved by L-BFGS."""
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
