"""Modes of a model that hold for a while and are then put back as they were."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

P = ParamSpec("P")
T = TypeVar("T")

_LOCK = threading.Lock()
# of models in `in_eval_mode`: how many callers there are, and each module's mode before the first
_USERS: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]]
_USERS = weakref.WeakKeyDictionary()


def can_be_trained(make: Callable[P, T]) -> Callable[P, T]:
    """A function of a model whose result can be trained, even if it is called in torch's inference
    mode; but not if the model itself was made there."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        model = next((x for x in (*args, *kwargs.values()) if isinstance(x, nn.Module)), None)
        parameters = [] if model is None else model.parameters()
        stays = torch.is_inference_mode_enabled() and any(p.is_inference() for p in parameters)
        with torch.inference_mode(stays):
            return make(*args, **kwargs)

    return made


@contextmanager
def in_eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Within: no dropout in any of the models; afterwards each module is in the mode it had.

    Several threads may be within at a time: the last one to leave puts the modes back.
    """
    changed = []
    with _LOCK:
        for model in (model for model in models if model is not None):
            if model in _USERS or _trains(model):
                n_users, modes = _USERS.get(model, (0, []))
                modes = modes or [(module, module.training) for module in model.modules()]
                _USERS[model] = n_users + 1, modes
                changed.append(model)
                for module, _ in modes:
                    module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for model in changed:
                n_users, modes = _USERS.pop(model)
                if n_users > 1:
                    _USERS[model] = n_users - 1, modes
                    continue
                for module, was_training in modes:
                    module.training = was_training


def _trains(model: nn.Module) -> bool:
    """Whether any part is in train mode; `modules()` takes ten times as long to say so."""
    parts: list[nn.Module | None] = [model]
    while parts:
        part = parts.pop()
        if part is not None:
            if part.training:
                return True
            parts += part._modules.values()
    return False


def with_gradients(model: nn.Module) -> Any:
    """Within, a model in eval mode has gradients of its recurrent layers too: cuDNN has them in
    train mode alone, so they are in that mode, without dropout."""
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    changes = [(module, "training", True) for module in recurrent]
    return _with_attributes([*changes, *((module, "dropout", 0.0) for module in recurrent)])


def without_dropout(model: nn.Module) -> Any:
    """Within, nothing is dropped out in train mode either, in any kind of layer."""
    kinds = {_DropoutNd: "p", nn.RNNBase: "dropout", nn.MultiheadAttention: "dropout"}
    changes = [
        (module, name, 0.0)
        for kind, name in kinds.items()
        for module in model.modules()
        if isinstance(module, kind)
    ]
    return _with_attributes(changes)


def with_dense_gradients(model: nn.Module) -> Any:
    """Within, look-ups give dense gradients: where a loss reads the table too, the sum of both is
    dense, which no sparse optimizer takes."""
    sparse = [module for module in model.modules() if getattr(module, "sparse", False)]
    return _with_attributes([(module, "sparse", False) for module in sparse])


@contextmanager
def _with_attributes(changes: list[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, name, value in changes:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield
