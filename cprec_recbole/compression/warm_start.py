"""Where a compressed model starts: its hidden states and clusters fitted to the original's.

Cutting the table to a low rank moves what the layers read, and layers that share cannot all keep
what they had. What is left free is fitted by least squares on the hidden states of the original,
over a few histories: no softmax, and no label, is needed for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.compression.histories import sample
from cprec_recbole.compression.original import Original
from cprec_recbole.models.eval_mode import in_eval_mode, with_gradients
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.partition import PADDING
from cprec_recbole.results import WarmStart

FIT_HISTORIES = 2048  # what the layers are fitted on
LOOK_HISTORIES = 256  # what starts are compared on, in one batch
_PASSES = 3
_BATCH = 32
_LEARNING_RATE = 1e-3
_RIDGE = 1e-3  # of a feature's mean square: how strongly a refit clings to what was there


def warm_start(
    small: CompressedRecommender,
    original: Original,
    histories: Tensor,
    *,
    descend: bool = True,
    look_at: int = LOOK_HISTORIES,
) -> WarmStart:
    """Fit the layers of a compressed model to the hidden states of the original.

    In three steps, each kept only where it helps: each set of shared layers takes the parameters of
    the member that serves the set best (or their mean); normalisation and linear layers that are
    not shared are solved for by least squares, each to give what it gave in the original; then all
    layers are fitted by gradient. The table is left alone.

    Args:
        small: the compressed model; its layers hold the original's weights, shared or not.
        original: what it was made from.
        histories: what to fit on, `[N, L]`; a few thousand are enough.
        descend: whether to do the last step, which takes longest.
        look_at: histories on which starts are compared and norms are refitted.
    """
    generator = torch.Generator().manual_seed(0)
    look = trimmed(small, sample(histories, look_at, generator))
    with in_eval_mode(small, original.model):
        fit = _Fit(small, original, look)
        kept, copied, refitted = fit.choose_start()
        if fit.sets and descend:
            fit.descend(sample(histories, FIT_HISTORIES, generator), generator)
        return WarmStart(kept, copied, refitted, fit.error())


class _Fit:
    """A compressed model and its original on the same histories, `look` `[N, L]`."""

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

    @torch.no_grad()
    def choose_start(self) -> tuple[int | None, float, float]:
        """Take the best parameters for each set, then refit what is not shared. Gives the member
        that was taken, and the error with its parameters and after the refit."""
        copied = [p.clone() for p in self.free]
        members: list[int | None] = [None]
        if self.sets:
            members += range(max(map(len, self.sets)))
        starts = []
        for member in members:
            fill(self.free, copied)
            self._take(member)
            before, plain = self.error(), [p.clone() for p in self.free]
            self._refit()
            after = self.error()
            if not after < before:  # also where a refit met numbers that it could not solve
                fill(self.free, plain)
                after = before
            starts.append((after, before, member, [p.clone() for p in self.free]))
        after, before, member, best = min(starts, key=lambda start: start[0])
        fill(self.free, best)
        return member, before, after

    def descend(self, histories: Tensor, generator: torch.Generator) -> None:
        """A few passes of gradient descent on the error of the hidden states."""
        before, plain = self.error(), [p.detach().clone() for p in self.free]
        optimizer = torch.optim.Adam(self.free, lr=_LEARNING_RATE)
        n_steps = _PASSES * -(-len(histories) // _BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, n_steps)
        for _ in range(_PASSES):
            order = torch.randperm(len(histories), generator=generator)
            for rows in order.split(_BATCH):
                items = trimmed(self.small, histories[rows])
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
        if not self.error() < before:
            fill(self.free, plain)

    def _take(self, member: int | None) -> None:
        """Set shared parameters to those of one member of each set, or to the mean of them."""
        originals = self.small.spec.layers(self.original.inner)
        for members in self.sets:
            layers = [originals[i] for i in members]
            for (module, name), *slots in zip(self.layers[members[0]], *layers):
                values = [getattr(*slot) for slot in slots]
                mean = torch.stack(values).mean(0)
                value = mean if member is None else values[member % len(values)]
                getattr(module, name).copy_(value)

    def _refit(self) -> None:
        """Solve for each free norm and linear map, in the order in which they run, so that it gives
        what it gave in the original; each sees what those before it now give. One that runs more
        than once, or whose input comes by name, stays as it is."""
        real = torch.ones_like(self.look, dtype=torch.bool)
        if not self.small.reads_last_column:
            real = self.look != PADDING
        outputs: dict[str, list[Tensor | None]] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                outputs.setdefault(name, []).append(_rows(output, real) if inputs else None)

            return hook

        def solve(wanted: Tensor) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                _solve(module, _rows(inputs[0], real), _rows(output, real), wanted)
                return type(module).forward(module, inputs[0])  # without this hook

            return hook

        free = self._affine_layers()
        modules = dict(self.original.inner.named_modules())
        with ExitStack() as hooks:
            for name in free:
                hooks.enter_context(modules[name].register_forward_hook(keep(name)))
            self.original.encoder.all_states(self.look)
        with ExitStack() as hooks:
            for name, (wanted, *others) in outputs.items():
                if wanted is not None and not others:
                    hooks.enter_context(free[name].register_forward_hook(solve(wanted)))
            self.small.encoder.all_states(self.look)

    def _affine_layers(self) -> dict[str, nn.Module]:
        """Norms and linear maps that are not shared, by name."""
        shared = {id(getattr(*slot)) for members in self.sets for slot in self.layers[members[0]]}
        return {
            name: module
            for name, module in self.small.inner.named_modules()
            if isinstance(module, nn.LayerNorm | nn.Linear)
            and module.weight is not None  # of a norm without parameters of its own
            and not any(id(p) in shared for p in module.parameters())
        }


def trimmed(small: CompressedRecommender, histories: Tensor) -> Tensor:
    """Histories on the model's device, without columns that are padding for all."""
    items = histories.to(small.table.partition.item_at.device)
    return items if small.reads_last_column else items[:, : int((items != PADDING).sum(1).max())]


@torch.no_grad()
def fill(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy values into parameters."""
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)


def _rows(states: Tensor, real: Tensor) -> Tensor:
    """What a layer reads or gives as rows, `[..., d] -> [N, d]`: where it has a state for each
    position, of those that count; of models that read whole histories, all it has."""
    return states[real] if states.shape[:-1] == real.shape else states.flatten(0, -2)


def _relative_error(hidden: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over the variance of what was wanted, `[N, d], [N, d] -> []`."""
    variance = (wanted - wanted.mean(0)).square().sum()
    return (hidden - wanted).square().sum() / variance.clamp(min=torch.finfo(wanted.dtype).tiny)


def _solve(module: Any, inputs: Tensor, output: Tensor, wanted: Tensor) -> None:
    """Change a norm or a linear map so that its outputs `[N, d]` come nearest to what is wanted.

    Ridge regression of what is missing, so that with nothing missing nothing changes.
    """
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
