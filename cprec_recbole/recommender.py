"""CompressedRecommender: RecBole's methods on a block embedding, a backbone and a softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.backbones import Backbone, Reading, SequentialRecommender, build_host
from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.embedding import Block, BlockEmbedding
from cprec_recbole.fields import NEXT_ITEMS
from cprec_recbole.int8 import not_trained
from cprec_recbole.item_tables import Host, MaskedLookUp
from cprec_recbole.outcome import Choice, WarmStart
from cprec_recbole.parallel.exchange import Group
from cprec_recbole.parallel.shards import ShardedBlock, own_state, spread_parameters
from cprec_recbole.parallel.spread import own_rows
from cprec_recbole.partition import Partition
from cprec_recbole.saving.vocabulary import Vocabulary
from cprec_recbole.serving.servable import Servable
from cprec_recbole.sharing import share, sharing_plan
from cprec_recbole.softmax import FullSoftmax, build_softmax
from cprec_recbole.training.optimizers import steps_sparsely

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

_HOST_ATTRIBUTES = (
    *("USER_ID", "ITEM_ID", "ITEM_SEQ", "ITEM_SEQ_LEN", "POS_ITEM_ID", "NEG_ITEM_ID"),
    *("max_seq_length", "n_items", "device"),
)


class CompressedRecommender(Servable, SequentialRecommender):
    """A sequential recommender whose table, softmax and layers are compressed (CpRec).

    Made of three parts: `backbone` (RecBole's own model, its item table replaced by a
    BlockEmbedding, its layers shared), that `table`, and the softmax `head`. Built by RecBole from
    a config and a dataset, or by `compress()` from a model.

    Raises:
        CompressionError: an option that does not fit; the message names it.
    """

    record: ClassVar[Backbone]
    reads_last_column: bool  # of a padded batch, as its host does, even where that is padding
    train_item_counts: np.ndarray | None = None  # interactions of each item id, [n_items]
    item_tokens: np.ndarray | None = None  # RecBole's token of each item id, [n_items]
    vocabulary: Vocabulary | None = None  # the same, once it was asked for
    choice: Choice | None = None  # where compress() was given a budget
    warm_start: WarmStart | None = None  # where compress() was given a trained model
    int8_scales: Mapping[str, Tensor] = MappingProxyType({})  # of matrices that quantize() rounded

    def __init__(self, config: Any, dataset: Any) -> None:
        from cprec_recbole.data.sequences import item_counts

        super().__init__(config, dataset)
        self.compression = compression_of(config)
        self.record.check_objective(self.compression.training)
        plan = self.compression.plan(self.record.dim(config[self.record.size_option]), self.n_items)
        check_objective(self.compression, config["loss_type"], self.record)
        if config["loss_type"] == "BPR" and self.n_items < 3:
            raise CompressionError(
                "Expected `loss_type` to be CE for a catalogue of one item, which has no negative, "
                "but got BPR."
            )
        _check_negatives(self.compression, config)
        self.reads_last_column = (
            self.record.reads_last_column and self.compression.training == "last_position"
        )
        counts = item_counts(dataset)
        host = build_host(self.record, config, dataset)
        host.n_items = self.n_items
        group = _group_of(config)
        tail = Block if group is None else partial(ShardedBlock, group=group)
        partition = Partition.from_counts(counts, plan.cutoffs)
        table = BlockEmbedding(partition, plan.ranks, plan.dim, tail)
        std = self.record.table_std(host, self.n_items)
        table.reset_parameters(std)
        self.assemble(host, table, tail)
        if self.head.table is not table:
            self.head.table.reset_parameters(std)
        self._look_up_sparsely(config)
        self.train_item_counts = counts

    @classmethod
    def from_host(
        cls,
        host: Host,
        table: BlockEmbedding,
        compression: CompressionConfig,
        make_block: Callable[[int, int, int], Block] = Block,
    ) -> CompressedRecommender:
        """Build around a model and the table that replaces its own.

        Args:
            host: a RecBole model of this class's record, without a table; it becomes a part.
            table: the block embedding that takes the table's place.
            compression: the options; layers that share keep the first of each set.
            make_block: what makes the blocks of an untied softmax.
        """
        model = cls.__new__(cls)
        torch.nn.Module.__init__(model)  # parts only: there is no config to read
        for name in _HOST_ATTRIBUTES:
            setattr(model, name, getattr(host, name))
        model.compression = compression
        model.reads_last_column = cls.record.reads_last_column
        model.assemble(host, table, make_block, make_block)
        return model

    def assemble(
        self,
        host: Host,
        table: BlockEmbedding,
        tail: Callable[[int, int, int], Block] = Block,
        first: Callable[[int, int, int], Block] = Block,
    ) -> None:
        """Put the parts together: table into host, layers shared, softmax on top.

        Args:
            host: a RecBole model without a table.
            table: the block embedding that takes the table's place.
            tail: what makes the tail blocks of an untied softmax.
            first: what makes its head.
        """
        self.record.table.put(host, table)
        layers = self.record.layers(host)
        plan = sharing_plan(self.compression.sharing, len(layers), self.record.group)
        share(layers, plan)
        self.loss_type = host.loss_type
        self.backbone = host
        softmax_table = table
        if not self.compression.tied:
            softmax_table = BlockEmbedding(table.partition, table.ranks, table.dim, first)
        memory = int(self.compression.loss_memory)
        self.head = build_softmax(self.compression.softmax, softmax_table, memory)

    def _look_up_sparsely(self, config: Any) -> None:
        """Sparse gradients for the item table where RecBole's `learner` takes them and nothing but
        look-ups reads it: neither a softmax over all items nor a penalty on all weights."""
        looked_up = self.head.table is not self.table or self.loss_type == "BPR"
        sparsely = steps_sparsely(str(config["learner"]), config["weight_decay"] or 0.0)
        if looked_up and sparsely and self.record.penalty is None:
            self.table.look_up_sparsely()

    def sharded_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters of which each process has a part (`shard_tails`); none in one process."""
        return spread_parameters(self)

    @property
    def table(self) -> BlockEmbedding:
        """The item table: what the backbone looks items up in."""
        look_up = self.backbone.item_embedding
        return look_up.table if isinstance(look_up, MaskedLookUp) else look_up

    @property
    def reading(self) -> Reading:
        """The backbone and the hidden states that it predicts from."""
        return Reading(self.record, self.backbone, self.reads_last_column)

    def hidden_states(self, item_seq: Tensor) -> Tensor:
        """Hidden state at every position, `[B, L] -> [B, L, d]`; position t sees items up to t.

        Raises:
            CompressionError: a model with one state for a whole history.
        """
        return self.reading.everywhere(item_seq)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Hidden state that predicts the next item, `[B, L], [B] -> [B, d]`."""
        return self.reading.last(item_seq, item_seq_len)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Training loss of a batch, `[]`: every position of a window, or the last of a prefix.

        Raises:
            CompressionError: a model in int8, which cannot be trained.
        """
        if self.table.is_int8:
            raise not_trained()
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        if NEXT_ITEMS in interaction:
            longest = int(lengths.max())
            targets = interaction[NEXT_ITEMS][:, :longest]
            real = targets != 0
            hidden = self.hidden_states(item_seq[:, :longest])[real]  # [N, d]
            loss = self.position_loss(hidden, targets[real])
        elif self.record.training_states is not None:
            hidden, target, negative = self.record.training_states(self.backbone, interaction)
            # where RecBole's masks hid nothing, there is nothing to learn, and no loss that is NaN
            loss = self.position_loss(hidden, target, negative) if len(target) else hidden.sum()
        else:
            drawn = interaction[self.NEG_ITEM_ID] if self.loss_type == "BPR" else None
            target = interaction[self.POS_ITEM_ID]
            loss = self.position_loss(self.forward(item_seq, lengths), target, drawn)
        if self.record.penalty is not None:
            loss = loss + self.record.penalty(self.backbone)
        return loss

    def position_loss(
        self, hidden: Tensor, target: Tensor, negative: Tensor | None = None
    ) -> Tensor:
        """Loss of hidden states and the items that came next, `[N, d], [N] -> []`: the softmax's,
        or with `loss_type: BPR` that of pairs, with negatives drawn where none are given."""
        if self.loss_type == "BPR" and isinstance(self.head, FullSoftmax):
            drawn = self._negatives(target) if negative is None else negative
            return self.head.pairwise_loss(hidden, target, drawn)
        return self.head.loss(hidden, target)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As nn.Module does, but a state of a model that shares less is refused.

        Raises:
            CompressionError: places that share a parameter here hold different values there, rows
                that are in int8 on one side alone, or `assign=True`, which would replace the
                shared parameter in each place.
        """
        if assign:
            raise CompressionError(
                "Expected `assign` to be False, but got True, which would undo tying and sharing."
            )
        state_dict = own_state(self, state_dict)
        first: dict[int, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            given = state_dict.get(name, parameter)
            if isinstance(given, Tensor) and given.dtype.is_floating_point != (
                parameter.dtype.is_floating_point
            ):
                raise CompressionError(
                    f"Expected `state_dict` to have {name} in {parameter.dtype}, but got "
                    f"{given.dtype}; make the model with `quantize` or `dtype` as the state's was."
                )
            other = first.setdefault(id(parameter), name)
            both = name in state_dict and other in state_dict
            if both and not _same(state_dict[name], state_dict[other]):
                raise CompressionError(
                    "Expected `state_dict` to be of a model with the same `sharing` and `tied`, "
                    f"but {other} and {name}, one parameter here, differ there."
                )
        for name, module in self.named_modules():  # before anything is changed
            if isinstance(module, Partition):
                module.check_state(state_dict, f"{name}.")
        return super().load_state_dict(state_dict, strict=strict)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Score of every item in RecBole's id order, `[B, n_items]`."""
        return self.head.scores(self.last_hidden(interaction))

    def predict(self, interaction: Interaction) -> Tensor:
        """Score of one item for each row, `[B]`."""
        items = interaction[self.ITEM_ID].unsqueeze(1)
        return self.head.score(self.last_hidden(interaction), items).squeeze(1)

    def last_hidden(self, interaction: Interaction) -> Tensor:
        """Hidden state that predicts the next item of each row, `[B, d]`."""
        return self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])

    def _negatives(self, target: Tensor) -> Tensor:
        """One item for each target, uniform over all others, as RecBole's sampler draws them."""
        drawn = torch.randint(1, self.n_items - 1, target.shape, device=target.device)
        return drawn + (drawn >= target)


def compression_of(config: Any) -> CompressionConfig:
    """The compression options of a RecBole config; what it does not name keeps its default."""
    names = CompressionConfig.option_names()
    return CompressionConfig(**{name: config[name] for name in names if name in config})


def _group_of(config: Any) -> Group | None:
    """The processes over which the tail is spread: those of the run, where `shard_tails` asks."""
    wanted = config["shard_tails"]
    if wanted not in (None, False, True):
        raise CompressionError(f"Expected `shard_tails` to be true or false, but got {wanted!r}.")
    return Group.current() if wanted else None


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; numbers that are none are equal to each other."""
    if one is other:
        return True
    same_shape = one.shape == other.shape
    one, other = own_rows(one), own_rows(other)
    return same_shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _check_negatives(compression: CompressionConfig, config: Any) -> None:
    """Negatives at every position are drawn by the model, and only as RecBole does by default."""
    wanted = config["train_neg_sample_args"]
    plain = (wanted["distribution"], wanted["sample_num"], bool(wanted["dynamic"]))
    drawn_here = config["loss_type"] == "BPR" and compression.training == "all_positions"
    if drawn_here and plain != ("uniform", 1, False):
        raise CompressionError(
            "Expected `train_neg_sample_args` to be one uniform negative with `training: "
            f"all_positions`, but got {wanted}; use `training: last_position`."
        )
    if config["loss_type"] == "BPR" and not drawn_here and plain[0] in (None, "none"):
        raise CompressionError(
            f"Expected `train_neg_sample_args` to draw negatives for BPR, but got {wanted}."
        )


def check_objective(compression: CompressionConfig, loss_type: str, record: Backbone) -> None:
    """Raise a CompressionError where model, softmax and loss contradict each other."""
    if loss_type not in record.losses:
        raise CompressionError(
            f"Expected `loss_type` to be {' or '.join(record.losses)}, but got {loss_type!r}."
        )
    if loss_type == "BPR" and compression.softmax == "tree":
        raise CompressionError(
            "Expected `loss_type` to be CE with `softmax: tree`, which is a probability and has no "
            "pairwise score, but got BPR; use `softmax: full` for BPR."
        )
