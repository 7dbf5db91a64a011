"""Whether tensors still hold the numbers that something was made from."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_changes: Any = Tensor._version.__get__  # type: ignore[attr-defined]  # faster than the attribute


class Version:
    """The numbers of some tensors as they are now. Changes that are written through `.data` are not
    noticed."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._storages = [tensor.detach() for tensor in self._tensors]  # no address is used again
        # those of inference mode have no count of changes
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._marks = self._now()

    def is_of(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same tensors, with the same numbers."""
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return same and self._now() == self._marks

    def _now(self) -> list[int]:
        """What changes with the numbers: where they lie, and PyTorch's counts of changes."""
        return [*map(Tensor.data_ptr, self._tensors), *map(_changes, self._counted)]


def _count_fused_step(optimizer: Optimizer, *_: Any) -> None:
    """Count a fused step among the changes of its parameters, which PyTorch does not."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                increment_version(parameter)


register_optimizer_step_post_hook(_count_fused_step)
