"""Train and eval mode, and how gradients come, put back as they were."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

P = ParamSpec("P")
T = TypeVar("T")


def can_be_trained(make: Callable[P, T]) -> Callable[P, T]:
    """A function of a model whose result can be trained, also where it is called in torch's
    inference mode; but of a model that was itself made there, which cannot."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        models = [each for each in (*args, *kwargs.values()) if isinstance(each, nn.Module)]
        parameters = models[0].parameters() if models else ()
        stays = torch.is_inference_mode_enabled() and any(p.is_inference() for p in parameters)
        with torch.inference_mode(stays):
            return make(*args, **kwargs)

    return made


@contextmanager
def in_eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Within: no dropout in any of the models; afterwards each part is in the mode it had. Several
    threads may be within at a time: the last to leave puts the modes back."""
    roots = [model for model in models if model is not None]
    changed = [root for root in roots if _enter_eval(root)]
    try:
        yield
    finally:
        for root in changed:
            _leave_eval(root)


_LOCK = threading.Lock()
# of models that were not in eval mode: how many are within, and the modes before the first
_WITHIN: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]]
_WITHIN = weakref.WeakKeyDictionary()


def _enter_eval(model: nn.Module) -> bool:
    """Whether the model has to be left again: not where all of it is in eval mode anyway."""
    with _LOCK:
        if model in _WITHIN:
            n_within, before = _WITHIN[model]
            _WITHIN[model] = n_within + 1, before
            return True
        before = [(module, module.training) for module in model.modules()]
        if not any(training for _, training in before):
            return False
        _WITHIN[model] = 1, before
        for module, _ in before:
            module.training = False
        return True


def _leave_eval(model: nn.Module) -> None:
    with _LOCK:
        n_within, before = _WITHIN.pop(model)
        if n_within > 1:
            _WITHIN[model] = n_within - 1, before
            return
        for module, training in before:
            module.training = training


@contextmanager
def with_gradients(model: nn.Module) -> Iterator[None]:
    """Within, for a model in eval mode: its recurrent layers in train mode, without dropout of
    theirs, as cuDNN has gradients of them in no other."""
    recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    before = [(m, m.training, m.dropout) for m in recurrent]
    for module in recurrent:
        module.training, module.dropout = True, 0.0
    try:
        yield
    finally:
        for module, training, dropout in before:
            module.training, module.dropout = training, dropout


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within, nothing is dropped out in train mode either: by layers of dropout, nor between those
    of a recurrent layer, nor by attention."""
    names = {_DropoutNd: "p", nn.RNNBase: "dropout", nn.MultiheadAttention: "dropout"}
    before = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for kind, name in names.items()
        if isinstance(module, kind)
    ]
    for module, name, _ in before:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in before:
            setattr(module, name, rate)


@contextmanager
def with_dense_gradients(model: nn.Module) -> Iterator[None]:
    """Within, look-ups give dense gradients, also of a model that is trained with sparse ones:
    where a loss reads the table too, the sum of both is dense, which no sparse optimizer takes."""
    sparse = [m for m in model.modules() if getattr(m, "sparse", False)]
    for module in sparse:
        module.sparse = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in sparse:
            module.sparse = True  # type: ignore[assignment]
