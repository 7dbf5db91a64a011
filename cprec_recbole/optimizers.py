"""RecBole's `learner` for the compressed models: the same optimizers, their quickest forms, and
sparse steps for rows that are only looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, SparseAdam

from cprec_recbole.config import CompressionError
from cprec_recbole.embedding import Block

_DENSE: dict[str, type[Optimizer]] = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "sparse_adam": Adam,  # for parameters whose gradient is dense, which SparseAdam refuses
}
_SPARSE: dict[str, type[Optimizer]] = {"sgd": SGD, "adagrad": Adagrad, "sparse_adam": SparseAdam}
_FUSED = ("adam", "adamw", "sgd", "adagrad", "sparse_adam")
_FUSED_SPREAD = ("adam", "adamw", "sparse_adam")


def steps_sparsely(learner: str, weight_decay: float) -> bool:
    """Whether rows that are only looked up may have sparse gradients under RecBole's options.

    With `learner: sgd` or `adagrad` the result is the same. `sparse_adam` asks for it: a row's
    averages then move only when the row is looked up. Weight decay moves every row.
    """
    return learner.lower() in _SPARSE and not weight_decay


def build_optimizer(
    model: nn.Module, learner: str, learning_rate: float, weight_decay: float
) -> Optimizer:
    """The optimizer that RecBole's options name.

    Args:
        model: whose parameters it moves; blocks that are marked `sparse` are stepped sparsely.
        learner: `adam`, `adamw`, `sgd`, `adagrad`, `rmsprop` or `sparse_adam`.
        learning_rate: of all parameters.
        weight_decay: L2 weight.

    Raises:
        CompressionError: an unknown `learner`, or weight decay with `sparse_adam`.
    """
    name = learner.lower()
    if name not in _DENSE:
        raise CompressionError(
            f"Expected `learner` to be one of {', '.join(_DENSE)}, but got {learner!r}."
        )
    if name == "sparse_adam" and weight_decay:
        raise CompressionError(
            f"Expected `weight_decay` to be 0 with `learner: sparse_adam`, but got {weight_decay}; "
            "it moves every row."
        )
    looked_up = {
        id(m.weight): m.weight for m in model.modules() if isinstance(m, Block) and m.sparse
    }
    dense = [p for p in model.parameters() if p.requires_grad and id(p) not in looked_up]
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    main = _DENSE[name](_groups(dense, name), **options)
    if not looked_up:
        return main
    return Both(main, _SPARSE[name](list(looked_up.values()), lr=learning_rate))  # type: ignore[call-arg]


class Both(Optimizer):
    """Two optimizers that step together, one of them for parameters with sparse gradients."""

    def __init__(self, dense: Optimizer, sparse: Optimizer) -> None:
        self.parts = {"dense": dense, "sparse": sparse}
        super().__init__([*dense.param_groups, *sparse.param_groups], {})
        # the very groups of both, so that what a schedule sets is what is used
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for part in self.parts.values():
            part.step()
        return result

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of both.

        Raises:
            CompressionError: a state of another kind of optimizer.
        """
        if set(state_dict) != set(self.parts):
            raise CompressionError(
                "Expected the state of an optimizer with sparse and dense parts, but got one with "
                f"{', '.join(sorted(state_dict))}; it was saved under another `learner`."
            )
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def _groups(parameters: Iterable[Tensor], learner: str) -> list[dict[str, Any]]:
    """Parameters that may be stepped in one call: those spread over processes on their own.

    Fused: one pass over parameters, moments and gradients instead of a dozen, equal but for
    rounding. Of parameters that are spread, torch can so step Adam's only.
    """
    kinds: dict[bool, list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault(type(parameter.data) is Tensor, []).append(parameter)
    groups: list[dict[str, Any]] = []
    for whole, some in kinds.items():
        fusing = _FUSED if whole else _FUSED_SPREAD
        # on a GPU not every torch has Adagrad's
        devices = ("cpu",) if learner == "adagrad" else ("cpu", "cuda")
        known = all(p.is_floating_point() and p.device.type in devices for p in some)
        fused = {"fused": True} if learner in fusing and known else {}
        groups.append({"params": some, **fused})
    return groups
