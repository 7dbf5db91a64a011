"""Sharing layers under a scheme (CpRec, section 3.3): a pure plan, then shared parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from cprec_recbole.config import SHARING_SCHEMES, check_choice

# One layer is a list of parameter slots: the module that owns a parameter, and its name there.
Slot = tuple[nn.Module, str]
Layer = Sequence[Slot]


def sharing_plan(scheme: str, n_layers: int, layers_per_block: int) -> tuple[int, ...]:
    """The parameter set s(i) that each layer of a stack uses, `[n_layers]`, under a scheme.

    >>> sharing_plan("cross_block", n_layers=8, layers_per_block=2)
    (0, 1, 0, 1, 0, 1, 0, 1)
    """
    g = layers_per_block
    rules = {
        "none": lambda i: i,
        "cross_layer": lambda i: 0,
        "cross_block": lambda i: i % g,
        "adjacent_layer": lambda i: i // 2,
        "adjacent_block": lambda i: (i // (2 * g)) * g + i % g,
    }
    check_choice("sharing", scheme, SHARING_SCHEMES)
    return tuple(rules[scheme](i) for i in range(n_layers))


def sharing_sets(layers: Sequence[Layer], plan: Sequence[int]) -> list[list[int]]:
    """Layers that will use one set of parameters, as lists of layer indices. A layer joins only
    layers of its own shape: a first GRU layer with a narrower input keeps its own parameters."""
    sets: dict[tuple, list[int]] = defaultdict(list)
    for index, (layer, key) in enumerate(zip(layers, plan)):
        shapes = tuple(getattr(module, name).shape for module, name in layer)
        sets[key, shapes].append(index)
    return list(sets.values())


def share(layers: Sequence[Layer], plan: Sequence[int]) -> int:
    """Make the layers of each set use the very same `nn.Parameter` objects, those of the set's
    first layer, so that a step moves all of them; returns how many sets are left.

    Args:
        layers: the parameter slots of each layer; normalisation layers are not among them.
        plan: the set of each layer, from `sharing_plan`.
    """
    sets = sharing_sets(layers, plan)
    for members in sets:
        for slots in zip(*(layers[i] for i in members)):
            shared = getattr(*slots[0])
            for module, name in slots:
                setattr(module, name, shared)
    return len(sets)
