"""RecBole's `learner` for the compressed models: PyTorch's optimizers in their quickest forms, with
sparse steps for rows that are only looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, SparseAdam

from cprec_recbole.config import CompressionError, check_choice
from cprec_recbole.embedding import Block

_DENSE: dict[str, type[Optimizer]] = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "sparse_adam": Adam,  # for parameters whose gradient is dense, which SparseAdam refuses
}
# The share of the learning rate at which `sparse_adam` steps projections: every step moves them,
# and with them the vectors of rare items, whose rows wait for long (docs/training.md)
PROJECTION_RATE = 0.1
_SPARSE: dict[str, type[Optimizer]] = {"sgd": SGD, "adagrad": Adagrad, "sparse_adam": SparseAdam}


def sparse_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model whose gradients hold the rows that were looked up alone."""
    blocks = (module for module in model.modules() if isinstance(module, Block))
    return list({id(block.weight): block.weight for block in blocks if block.sparse}.values())


def _projections(model: nn.Module) -> list[nn.Parameter]:
    blocks = (module.projection for module in model.modules() if isinstance(module, Block))
    return list({id(each): each for each in blocks if each is not None}.values())


def build_optimizer(
    model: nn.Module, learner: str, learning_rate: float, weight_decay: float
) -> Optimizer:
    """The optimizer that RecBole's options name; blocks that are marked `sparse` are stepped
    sparsely; `sparse_adam` then steps projections at a tenth of the rate. A CompressionError where
    it is none, or `sparse_adam` with weight decay."""
    name = learner.lower()
    check_choice("learner", name, tuple(_DENSE))
    if name == "sparse_adam" and weight_decay:
        raise CompressionError(
            f"Expected `weight_decay` to be 0 with `learner: sparse_adam`, but got {weight_decay}; "
            "it moves every row."
        )
    sparse = sparse_parameters(model)
    slow = _projections(model) if sparse and name == "sparse_adam" else []
    known = {id(parameter) for parameter in (*sparse, *slow)}
    dense = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    # fused: one pass over parameters, moments and gradients instead of a dozen
    devices = {"adagrad": ("cpu",), "rmsprop": ()}.get(name, ("cpu", "cuda"))
    if all(p.is_floating_point() and p.device.type in devices for p in (*dense, *slow)):
        options["fused"] = True
    slowly = {"params": slow, "lr": PROJECTION_RATE * learning_rate}
    groups: Any = [{"params": dense}, slowly] if slow else dense
    main = _DENSE[name](groups, **options)
    if not sparse:
        return main
    return Both(main, _SPARSE[name](sparse, lr=learning_rate))  # type: ignore[call-arg]


class Both(Optimizer):
    """Two optimizers that step together, one of them for parameters with sparse gradients."""

    def __init__(self, dense: Optimizer, sparse: Optimizer) -> None:
        self.parts = {"dense": dense, "sparse": sparse}
        super().__init__([*dense.param_groups, *sparse.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step both; there is no closure, which RecBole's trainers never give."""
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of both; a CompressionError for one of another kind of optimizer."""
        if set(state_dict) != set(self.parts):
            raise CompressionError(
                "Expected the state of an optimizer with sparse and dense parts, but got one with "
                f"{', '.join(sorted(state_dict))}; it was saved under another `learner`."
            )
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def clip_gradients(
    parameters: list[nn.Parameter], max_norm: float, norm_type: float = 2.0, **options: Any
) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` does, for sparse gradients too."""
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        if not float(value) > 0:
            raise CompressionError(
                f"Expected the {name} of `clip_grad_norm` to be above 0, but got {value}."
            )
    clipped: list[Tensor] = []
    for parameter in parameters:
        stand_in: Tensor = parameter
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # each row once
            rows = parameter.grad._values()
            stand_in = torch.empty_like(rows)  # torch's function takes no sparse gradients
            stand_in.grad = rows
        clipped.append(stand_in)
    return nn.utils.clip_grad_norm_(clipped, max_norm, norm_type, **options)
