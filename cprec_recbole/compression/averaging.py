"""The average of weights along a training: better than where its last step happened to end.

Polynomial-decay averaging (Shamir and Zhang, Stochastic gradient descent for non-smooth
optimization, ICML 2013, section 4): it follows a training of any length, with no horizon to set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_ETA = 8  # of the paper: about the last ninth of the steps counts


class WeightAverage:
    """A running average of parameters, in single precision at least.

    Args:
        parameters: what a training changes in place.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        # in half precision the later, smaller shares would round to nothing
        self.averages = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in self.parameters
        ]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step."""
        self.steps += 1
        weight = (_ETA + 1) / (_ETA + self.steps)
        for average, parameter in zip(self.averages, self.parameters):
            average.lerp_(parameter.to(average.dtype), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters are the averages, to be read only; afterwards they are what they
        were, and the training can go on."""
        latest = [parameter.data for parameter in self.parameters]
        for average, parameter in zip(self.averages, self.parameters):
            parameter.data = average.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, latest):
                parameter.data = value
