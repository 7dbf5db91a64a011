"""Whether modules still hold the numbers that something was made from."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_changes: Any = Tensor._version.__get__  # type: ignore[attr-defined]  # faster than the attribute


class Version:
    """A module and all within it as they are now: which parts and tensors it has, and their
    numbers. Changes that are written through `.data` are not noticed."""

    def __init__(self, module: nn.Module) -> None:
        kinds: list[Any] = [(m._modules, m._parameters, m._buffers) for m in module.modules()]
        self._held = [held for kind in kinds for held in kind if held]  # a part's, by name
        self._parts = self._now()
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._storages = [tensor.detach() for tensor in self._tensors]  # no address is used again
        # those of inference mode have no count of changes
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._marks = self._numbers()

    def is_current(self) -> bool:
        """Whether it has the same parts and tensors still, with the same numbers."""
        # by iterators alone: each answer asks
        parts = self._now()
        same = len(parts) == len(self._parts) and all(map(is_, parts, self._parts))
        return same and self._numbers() == self._marks

    def _now(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._held))]

    def _numbers(self) -> list[int]:
        """What changes with the numbers: where they lie, and PyTorch's counts of changes."""
        return [*map(Tensor.data_ptr, self._tensors), *map(_changes, self._counted)]


def _count_fused_step(optimizer: Optimizer, *_: Any) -> None:
    """Count a fused step among the changes of its parameters, which PyTorch does not."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                increment_version(parameter)


register_optimizer_step_post_hook(_count_fused_step)
