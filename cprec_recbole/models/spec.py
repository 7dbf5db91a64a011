"""What compression has to know of a RecBole model: its table, its layers, its hidden states."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.config import OBJECTIVES, CompressionConfig, CompressionError
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.models.item_tables import PlainTable, RecBoleModel
from cprec_recbole.partition import PADDING
from cprec_recbole.sharing import Layer, sharing_plan, sharing_sets

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


# Of rows that are read together on a CPU: the share of real items from which that is so without
# sorting, how many groups are made otherwise, and how many rows each has at least
_MOSTLY_REAL, _GROUPS, _FEWEST_ROWS = 0.8, 8, 16


def pick(states: Tensor, lengths: Tensor) -> Tensor:
    """The states of the last items, `[B, L, ...], [B] -> [B, ...]`."""
    rows = torch.arange(states.shape[0], device=states.device) * states.shape[1] + lengths - 1
    return states.flatten(0, 1).index_select(0, rows)


@dataclass(frozen=True)
class ModelSpec:
    """What compression has to know of one RecBole model.

    Attributes:
        model_class: RecBole's class. Its `item_embedding` turns ids into vectors, and an item's
            score is the product of a hidden state with the item's vector.
        size_option: the RecBole option that is the embedding size.
        table_std: `(model, n_items) -> float`, the spread that the model gives a fresh table.
        architecture: the options by which an equal model can be built: names of attributes of the
            model that are called as the options, or pairs (option, attribute).
        layers: `(model)` to the stack's layers as parameter slots, normalisation layers left out;
            for a model without such a stack, nothing is shared.
        layers_per_block: layers `g` of one residual block.
        hidden_states: `(model, item_seq [B, L]) -> [B, L, d]`; position t sees items up to t only.
            None for a model that has no such states: it has one for a whole history, and is trained
            with `training: last_position`.
        last_state: `(model, item_seq [B, L], lengths [B]) -> [B, d]`. Left out, it is the last of
            `hidden_states`; for a model without them the model's `forward`, of batches as wide as
            `MAX_ITEM_LIST_LENGTH`.
        table: how the model keeps its items.
        training_states: `(model, batch) -> hidden [N, d], target [N], negative [N]`, where the
            model is not trained on the next item of RecBole's rows.
        penalty: `(model) -> []`, what the model adds to its loss; None for nothing.
        losses: what `loss_type` may be; every one but BPR is the softmax's, plus the penalty.
        reads_last_column: the model predicts from the last column of a padded batch, even where a
            short history has padding there.
    """

    model_class: type[Any]
    size_option: str
    table_std: Callable[[RecBoleModel, int], float]
    architecture: Sequence[str | tuple[str, str]]
    layers: Callable[[RecBoleModel], list[Layer]] = lambda model: []  # no stack
    layers_per_block: int = 1
    hidden_states: Callable[[RecBoleModel, Tensor], Tensor] | None = None
    last_state: Callable[[RecBoleModel, Tensor, Tensor], Tensor] | None = None
    table: PlainTable = field(default_factory=PlainTable)
    training_states: Callable[[RecBoleModel, Interaction], tuple[Tensor, Tensor, Tensor]] | None = (
        None
    )
    penalty: Callable[[RecBoleModel], Tensor | float] | None = None
    losses: tuple[str, ...] = ("CE", "BPR")
    reads_last_column: bool = False

    @property
    def name(self) -> str:
        """RecBole's name of the model."""
        return self.model_class.__name__

    @property
    def objectives(self) -> tuple[str, ...]:
        """What `training` may be, the default first."""
        return OBJECTIVES if self.hidden_states is not None else ("last_position",)

    def check_training(self, training: str) -> None:
        """Raise a CompressionError for a `training` that this model cannot do."""
        if training not in self.objectives:
            raise CompressionError(
                f"Expected `training` to be last_position for {self.name}, which has one hidden "
                f"state for a whole history, but got {training}; leave it out."
            )

    def check_loss(self, compression: CompressionConfig, loss_type: str) -> None:
        """Raise a CompressionError where model, softmax and loss contradict each other."""
        if loss_type not in self.losses:
            raise CompressionError(
                f"Expected `loss_type` to be {' or '.join(self.losses)}, but got {loss_type!r}."
            )
        if loss_type == "BPR" and compression.softmax == "tree":
            raise CompressionError(
                "Expected `loss_type` to be CE with `softmax: tree`, which is a probability and "
                "has no pairwise score, but got BPR; use `softmax: full` for BPR."
            )

    def dim(self, size: int) -> int:
        """Size `d` of an item's vector for an embedding size."""
        return size + self.table.n_more

    def sharing(self, model: RecBoleModel, scheme: str) -> tuple[list[Layer], list[list[int]]]:
        """The layers of a model, and which of them use one set of parameters under a scheme."""
        layers = self.layers(model)
        plan = sharing_plan(scheme, len(layers), self.layers_per_block)
        return layers, sharing_sets(layers, plan)

    def build_inner(self, config: Any, dataset: Any = None) -> RecBoleModel:
        """RecBole's model without its table, by a RecBole config, and a dataset (or anything with
        `iid_field` and `num(field)`) for its other fields."""
        return self.model_class(config, _OneItemCatalogue(dataset))

    def architecture_of(self, model: RecBoleModel) -> dict[str, Any]:
        """The RecBole options by which an equal model can be built, without its table."""
        pairs = [(name, name) if isinstance(name, str) else name for name in self.architecture]
        return {option: getattr(model, attribute) for option, attribute in pairs} | {
            "MAX_ITEM_LIST_LENGTH": model.max_seq_length,
            "USER_ID_FIELD": model.USER_ID,
            "ITEM_ID_FIELD": model.ITEM_ID,
            "LIST_SUFFIX": model.ITEM_SEQ.removeprefix(model.ITEM_ID),
            "ITEM_LIST_LENGTH_FIELD": model.ITEM_SEQ_LEN,
            "NEG_PREFIX": model.NEG_ITEM_ID.removesuffix(model.ITEM_ID),
        }


@dataclass(frozen=True)
class Encoder:
    """The hidden states that a model predicts from, of RecBole's model with whatever table."""

    spec: ModelSpec
    model: RecBoleModel
    reads_last_column: bool  # even where there is padding

    @property
    def has_one_state(self) -> bool:
        """Whether a history gives one state alone: earlier targets need rows of their own."""
        return self.reads_last_column or self.spec.hidden_states is None

    def every_position(self, item_seq: Tensor) -> Tensor:
        """Hidden state at every position, `[B, L] -> [B, L, d]`; an error where it has none."""
        if self.spec.hidden_states is None:
            raise CompressionError(
                f"Expected a model with a hidden state at every position, but {self.spec.name} "
                "has one for a whole history."
            )
        return self.spec.hidden_states(self.model, item_seq)

    def at_targets(self, item_seq: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and the targets of every position, `[B, L], [B, L] -> [N, d], [N]`, in some
        order; where the target is padding, the state is any. On a CPU rows of about one length are
        read together, so that little of what is read is padding."""
        parts = [(item_seq, targets)]
        groups = _of_like_lengths((item_seq != PADDING).sum(1), item_seq)
        if groups:
            parts = [(item_seq[rows, :width], targets[rows, :width]) for rows, width in groups]
        states = [self.every_position(items).flatten(0, 1) for items, _ in parts]
        wanted = [target.flatten() for _, target in parts]
        return (states[0], wanted[0]) if len(parts) == 1 else (torch.cat(states), torch.cat(wanted))

    def last_state(self, item_seq: Tensor, lengths: Tensor) -> Tensor:
        """Hidden state that predicts the next item, `[B, L], [B] -> [B, d]`."""
        if self.spec.hidden_states is None:
            item_seq = F.pad(item_seq, (0, self.model.max_seq_length - item_seq.shape[1]))
        elif self.reads_last_column:  # as RecBole trains and reads this model
            lengths = torch.full_like(lengths, item_seq.shape[1])
        else:
            item_seq = item_seq[:, : int(lengths.max())]  # what follows is padding: nobody sees it
            groups = _of_like_lengths(lengths, item_seq)
            if groups:
                parts = [self.state_of(item_seq[i, :width], lengths[i]) for i, width in groups]
                return torch.cat(parts)[torch.cat([i for i, _ in groups]).argsort()]
        return self.state_of(item_seq, lengths)

    def state_of(self, item_seq: Tensor, lengths: Tensor) -> Tensor:
        """The same of a batch as wide as the model reads it."""
        if self.spec.last_state is not None:
            return self.spec.last_state(self.model, item_seq, lengths)
        if self.spec.hidden_states is None:
            self.model.device = item_seq.device  # some put their own tensors there
            return self.model.forward(item_seq, lengths)
        return pick(self.every_position(item_seq), lengths)

    def all_states(self, item_seq: Tensor) -> Tensor:
        """Every hidden state that predicts something, `[B, L] -> [N, d]`."""
        real = item_seq != PADDING
        if self.spec.hidden_states is None:
            return self.last_state(item_seq, real.sum(1))
        states = self.every_position(item_seq)
        return states.flatten(0, 1) if self.reads_last_column else states[real]


def _of_like_lengths(lengths: Tensor, item_seq: Tensor) -> list[tuple[Tensor, int]]:
    """Rows of `[B, L]` that are better read apart, by rising length, and how wide each group is;
    empty where that saves nothing."""
    n_groups = min(_GROUPS, len(lengths) // _FEWEST_ROWS)
    if n_groups < 2 or item_seq.device.type != "cpu":  # on a GPU starting operations costs more
        return []
    if int(lengths.sum()) >= _MOSTLY_REAL * item_seq.numel():
        return []
    lengths, order = lengths.sort()
    widths = [max(1, int(part[-1])) for part in lengths.tensor_split(n_groups)]
    return list(zip(order.tensor_split(n_groups), widths))


@dataclass(frozen=True)
class Parts:
    """What a compressed model is made of."""

    inner: RecBoleModel  # without an item table
    table: BlockEmbedding  # what takes the table's place
    softmax_table: BlockEmbedding  # the factors that the softmax reads; tied: `table` itself
    compression: CompressionConfig  # layers that share keep the parameters of the first of each set
    reads_last_column: bool  # see ModelSpec
    item_counts: np.ndarray | None = None  # training interactions of each id, `[n_items]`, if known


class _OneItemCatalogue:
    """A dataset as a RecBole model sees it that must not allocate its `[n_items, d]` table."""

    item_num = 1
    user_num = 1  # asked for, and not used, by a model without a user table

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def num(self, field: str) -> int:
        is_item = self._dataset is None or field == self._dataset.iid_field
        return 1 if is_item else self._dataset.num(field)


# -- names of version 0.1, which still work with a warning and go in 0.3 ---------------------------


def backbone(**fields: Any) -> ModelSpec:
    """A ModelSpec by the names that its fields had as a `Backbone`."""
    new = {"host": "model_class", "group": "layers_per_block"}
    return ModelSpec(**{new.get(name, name): value for name, value in fields.items()})


def renamed(old: str, new: str) -> Any:
    """A property for the old name of an attribute."""

    def get(self: Any) -> Any:
        warnings.warn(
            f"`{old}` is called `{new}` since 0.2; the old name goes in 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(self, new)

    return property(get)
