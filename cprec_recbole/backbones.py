"""What compression has to know of a RecBole model: its table, its layers, its hidden states.

The records themselves are in `records.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.config import OBJECTIVES, CompressionError
from cprec_recbole.host.registration import importing_models
from cprec_recbole.item_tables import PLAIN, Host, PlainTable
from cprec_recbole.partition import PADDING
from cprec_recbole.sharing import Layer

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

with importing_models():
    from recbole.model.abstract_recommender import SequentialRecommender


def no_layers(model: Host) -> list[Layer]:
    """No stack of layers of one shape: nothing to share."""
    return []


def by_forward(model: Host, item_seq: Tensor, lengths: Tensor) -> Tensor:
    """What most of RecBole's models call `forward`, `[B, L], [B] -> [B, d]`."""
    model.device = item_seq.device  # some put their own tensors there
    return model.forward(item_seq, lengths)


@dataclass(frozen=True)
class Backbone:
    """What compression has to know of one RecBole model.

    Attributes:
        host: the model's class. Its `item_embedding` turns ids into vectors, and an item's score is
            the product of a hidden state with the item's vector.
        size_option: the RecBole option that is the embedding size.
        table_std: `(model, n_items) -> float`, the spread that the host gives a fresh table.
        architecture: the options by which an equal host can be built: names of attributes of the
            host that are called as the options, or pairs (option, attribute).
        layers: `(model)` to the stack's layers as parameter slots, normalisation layers left out;
            for a model without such a stack, nothing is shared.
        group: layers `g` of one residual block.
        hidden_states: `(model, item_seq [B, L]) -> [B, L, d]`; position t sees items up to t only.
            None for a model that has no such states: it has one for a whole history, and is trained
            with `training: last_position`.
        last_state: `(model, item_seq [B, L], lengths [B]) -> [B, d]`, for those models, of batches
            as wide as `MAX_ITEM_LIST_LENGTH`; the host's `forward` if left out.
        table: how the host keeps its items.
        training_states: `(model, batch) -> hidden [N, d], target [N], negative [N]`, where the host
            is not trained on the next item of RecBole's rows.
        penalty: `(model) -> []`, what the host adds to its loss; None for nothing.
        losses: what `loss_type` may be; every one but BPR is the softmax's, plus the penalty.
        reads_last_column: the host predicts from the last column of a padded batch, even where a
            short history has padding there.
    """

    host: type[SequentialRecommender]
    size_option: str
    table_std: Callable[[Host, int], float]
    architecture: Sequence[str | tuple[str, str]]
    layers: Callable[[Host], list[Layer]] = no_layers
    group: int = 1
    hidden_states: Callable[[Host, Tensor], Tensor] | None = None
    last_state: Callable[[Host, Tensor, Tensor], Tensor] = by_forward
    table: PlainTable = PLAIN
    training_states: Callable[[Host, Interaction], tuple[Tensor, Tensor, Tensor]] | None = None
    penalty: Callable[[Host], Tensor | float] | None = None
    losses: tuple[str, ...] = ("CE", "BPR")
    reads_last_column: bool = False

    @property
    def objectives(self) -> tuple[str, ...]:
        """What `training` may be, the default first."""
        return OBJECTIVES if self.hidden_states is not None else ("last_position",)

    def check_objective(self, training: str) -> None:
        """Raise a CompressionError for a `training` that this model cannot do."""
        if training not in self.objectives:
            raise CompressionError(
                f"Expected `training` to be last_position for {self.host.__name__}, which has one "
                f"hidden state for a whole history, but got {training}; leave it out."
            )

    def dim(self, size: int) -> int:
        """Size `d` of an item's vector for an embedding size."""
        return size + self.table.n_more


@dataclass(frozen=True)
class Reading:
    """A host with its record, and the hidden states that it predicts from.

    Attributes:
        record: what is known of the host.
        host: RecBole's model, with whatever table.
        last_column: it is read at the last column of a padded batch, even at padding.
    """

    record: Backbone
    host: Host
    last_column: bool

    @property
    def one_state(self) -> bool:
        """A history gives one state, whatever came before: earlier ones need their own rows."""
        return self.last_column or self.record.hidden_states is None

    def everywhere(self, item_seq: Tensor) -> Tensor:
        """Hidden state at every position, `[B, L] -> [B, L, d]`.

        Raises:
            CompressionError: a model that has none.
        """
        if self.record.hidden_states is None:
            raise CompressionError(
                f"Expected a model with a hidden state at every position, but "
                f"{self.record.host.__name__} has one for a whole history."
            )
        return self.record.hidden_states(self.host, item_seq)

    def last(self, item_seq: Tensor, lengths: Tensor) -> Tensor:
        """Hidden state that predicts the next item, `[B, L], [B] -> [B, d]`."""
        if self.record.hidden_states is None:
            missing = self.host.max_seq_length - item_seq.shape[1]
            return self.record.last_state(self.host, F.pad(item_seq, (0, missing)), lengths)
        if self.last_column:
            return self.everywhere(item_seq)[:, -1]  # as RecBole trains and reads this model
        longest = int(lengths.max())  # what follows is padding, and no position sees it
        states = self.everywhere(item_seq[:, :longest])
        return states[torch.arange(len(states), device=states.device), lengths - 1]

    def all(self, item_seq: Tensor) -> Tensor:
        """Every hidden state that predicts something, `[B, L] -> [N, d]`: one for each item, or
        one for each history."""
        real = item_seq != PADDING
        if self.record.hidden_states is None:
            return self.last(item_seq, real.sum(1))
        states = self.everywhere(item_seq)
        return states.flatten(0, 1) if self.last_column else states[real]


def build_host(record: Backbone, config: Any, dataset: Any) -> Host:
    """RecBole's model without its table: built for a catalogue of one item.

    Args:
        record: the model's record.
        config: a RecBole config.
        dataset: a RecBole dataset, or anything with `iid_field` and `num(field)`.
    """
    return record.host(config, _OneItemCatalogue(dataset))


def architecture(record: Backbone, host: Host) -> dict[str, Any]:
    """The RecBole options by which an equal host can be built, without its table.

    Args:
        record: the model's record.
        host: RecBole's model.
    """
    pairs = [(name, name) if isinstance(name, str) else name for name in record.architecture]
    options = {option: getattr(host, attribute) for option, attribute in pairs}
    return options | {
        "MAX_ITEM_LIST_LENGTH": host.max_seq_length,
        "USER_ID_FIELD": host.USER_ID,
        "ITEM_ID_FIELD": host.ITEM_ID,
        "LIST_SUFFIX": host.ITEM_SEQ.removeprefix(host.ITEM_ID),
        "ITEM_LIST_LENGTH_FIELD": host.ITEM_SEQ_LEN,
        "NEG_PREFIX": host.NEG_ITEM_ID.removesuffix(host.ITEM_ID),
    }


class _OneItemCatalogue:
    """A dataset as a host sees it that must not allocate its `[n_items, d]` table."""

    item_num = 1
    user_num = 1  # asked for, and not used, by a model without a user table

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def num(self, field: str) -> int:
        return 1 if field == self._dataset.iid_field else self._dataset.num(field)
