"""Whether tensors still hold the numbers that something was made from."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Version:
    """The numbers of some tensors as they are now. Changes that are written through `.data` are not
    noticed."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._marks = [_mark(tensor) for tensor in self._tensors]
        self._storages = [tensor.detach() for tensor in self._tensors]  # no address is used again

    def is_of(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same tensors, with the same numbers."""
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return same and [_mark(tensor) for tensor in tensors] == self._marks


def _mark(tensor: Tensor) -> tuple[int, int]:
    """What changes with a tensor's numbers: where they lie, and PyTorch's count of changes."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _count_fused_step(optimizer: Optimizer, *_: Any) -> None:
    """Count a fused step among the changes of its parameters, which PyTorch does not."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                increment_version(parameter)


register_optimizer_step_post_hook(_count_fused_step)
