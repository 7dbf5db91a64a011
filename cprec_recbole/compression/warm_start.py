"""Where a compressed model starts: its hidden states and clusters fitted to the original's.

Cutting the table to a low rank moves what the layers read, and layers that share cannot all keep
what they had. What is left free is fitted by least squares on the hidden states of the original,
over a few histories: no softmax, and no label, is needed for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.compression.histories import Histories
from cprec_recbole.compression.original import Original
from cprec_recbole.models.eval_mode import in_eval_mode, with_gradients
from cprec_recbole.models.item_tables import RecBoleModel
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
    histories: Histories,
    *,
    descend: bool = True,
    look_at: int = LOOK_HISTORIES,
    seed: int = 0,
) -> WarmStart:
    """Fit the layers of a compressed model to the hidden states of the original.

    In three steps, each kept only where it helps: each set of shared layers takes the parameters of
    the member that serves the set best (or their mean); normalisation and linear layers that are
    not shared are solved for by least squares, each to give what it gave in the original; then all
    layers are fitted by gradient. The table is left alone.

    Args:
        small: the compressed model; its layers hold the original's weights, shared or not.
        original: what it was made from.
        histories: what to fit on; a few thousand are enough.
        descend: whether to do the last step, which takes longest.
        look_at: histories on which starts are compared and norms are refitted.
        seed: of the order of the batches. The process's own random state is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    look = histories.sample(look_at, generator)
    fit = Fit(small, original)
    with in_eval_mode(small, original.model):
        kept, copied, refitted = fit.choose_start(look)
        if fit.shares and descend:
            fit.descend(histories.sample(FIT_HISTORIES, generator), look, generator)
        return WarmStart(kept, copied, refitted, fit.error(look))


class Fit:
    """A compressed model and its original on the same histories."""

    def __init__(self, small: CompressedRecommender, original: Original) -> None:
        self.small, self.original = small, original
        self.layers, sets = small.spec.sharing(small.inner, small.compression.sharing)
        self.originals = small.spec.layers(original.inner)
        self.sets = [members for members in sets if len(members) > 1]
        self.shares = bool(self.sets)
        shared = {
            id(getattr(module, name))
            for members in self.sets
            for module, name in self.layers[members[0]]
        }
        self.affine = {
            name: module
            for name, module in small.inner.named_modules()
            if isinstance(module, nn.LayerNorm | nn.Linear)
            and module.weight is not None  # of a norm without parameters of its own
            and not any(id(p) in shared for p in module.parameters())
        }
        own = {id(p) for p in small.table.parameters()}
        self.free = [p for p in small.inner.parameters() if id(p) not in own]

    def read(self, histories: Histories) -> Tensor:
        """Histories on the model's device, without columns that are padding for all."""
        items = histories.items.to(self.small.table.partition.item_at.device)
        if self.small.reads_last_column:
            return items
        return items[:, : int((items != PADDING).sum(1).max())]

    @torch.no_grad()
    def error(self, histories: Histories) -> float:
        """Relative squared error of the hidden states."""
        items = self.read(histories)
        target = self.original.encoder.all_states(items)
        return float(_relative_error(self.small.encoder.all_states(items), target))

    @torch.no_grad()
    def choose_start(self, look: Histories) -> tuple[int | None, float, float]:
        """Take the best parameters for each set, then refit what is not shared."""
        copied = [p.clone() for p in self.free]
        starts: list[int | None] = [None]
        if self.shares:
            starts += range(max(len(members) for members in self.sets))
        found = []
        for start in starts:
            self._restore(copied)
            self._take(start)
            before = self.error(look)
            plain = [p.clone() for p in self.free]
            self._refit(look)
            after = self.error(look)
            if not after < before:  # also where a refit met numbers that it could not solve
                self._restore(plain)
                after = before
            found.append((after, before, start, [p.clone() for p in self.free]))
        after, before, start, parameters = min(found, key=lambda each: each[0])
        self._restore(parameters)
        return start, before, after

    def descend(self, histories: Histories, look: Histories, generator: torch.Generator) -> None:
        """A few passes of gradient descent on the error of the hidden states."""
        before, plain = self.error(look), [p.detach().clone() for p in self.free]
        optimizer = torch.optim.Adam(self.free, lr=_LEARNING_RATE)
        n_steps = _PASSES * -(-len(histories) // _BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, n_steps)
        for _ in range(_PASSES):
            for batch in histories.batches(_BATCH, generator):
                items = self.read(batch)
                with torch.no_grad():
                    target = self.original.encoder.all_states(items)
                with torch.enable_grad(), with_gradients(self.small):
                    error = _relative_error(self.small.encoder.all_states(items), target)
                    gradients = torch.autograd.grad(error, self.free, allow_unused=True)
                for parameter, gradient in zip(self.free, gradients):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
        for parameter in self.free:
            parameter.grad = None
        if not self.error(look) < before:
            self._restore(plain)

    @torch.no_grad()
    def _restore(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.free, values):
            parameter.copy_(value)

    def _take(self, start: int | None) -> None:
        """Set shared parameters to those of one member of each set, or to the mean of them."""
        for members in self.sets:
            shared = [getattr(module, name) for module, name in self.layers[members[0]]]
            for parameter, *slots in zip(shared, *(self.originals[i] for i in members)):
                values = [getattr(module, name) for module, name in slots]
                value = torch.stack(values).mean(0) if start is None else values[start % len(slots)]
                parameter.copy_(value)

    def _refit(self, look: Histories) -> None:
        """Solve for each free norm and linear map, in the order in which they run, so that it gives
        what it gave in the original; each sees what those before it now give. One that runs more
        than once, or whose input comes by name, stays as it is."""
        items = self.read(look)
        real = torch.ones_like(items, dtype=torch.bool)
        if not self.small.reads_last_column:
            real = items != PADDING
        wanted: dict[str, Tensor] = {}
        runs: Counter[str] = Counter()

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                runs[name] += 1
                if inputs:
                    wanted[name] = _rows(output, real)

            return hook

        def solve(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                _solve(module, _rows(inputs[0], real), _rows(output, real), wanted[name])
                return _apply(module, inputs[0])

            return hook

        with _hooked(self.original.inner, list(self.affine), keep):
            self.original.encoder.all_states(items)
        with _hooked(self.small.inner, [n for n in wanted if runs[n] == 1], solve):
            self.small.encoder.all_states(items)


def _rows(states: Tensor, real: Tensor) -> Tensor:
    """What a layer reads or gives as rows, `[..., d] -> [N, d]`: where it has a state for each
    position, of those that count; of models that read whole histories, all it has."""
    return states[real] if states.shape[:-1] == real.shape else states.flatten(0, -2)


def _relative_error(hidden: Tensor, target: Tensor) -> Tensor:
    """Squared error over the variance of what was wanted, `[N, d], [N, d] -> []`."""
    spread = (target - target.mean(0)).square().sum()
    return (hidden - target).square().sum() / spread.clamp(min=torch.finfo(target.dtype).tiny)


@contextmanager
def _hooked(model: RecBoleModel, names: Sequence[str], make: Any) -> Iterator[None]:
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(make(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _apply(module: nn.Module, inputs: Tensor) -> Tensor:
    """A norm or linear layer without its hooks."""
    return type(module).forward(module, inputs)


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
