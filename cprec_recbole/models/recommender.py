"""CompressedRecommender: RecBole's methods on a block embedding, RecBole's layers and a softmax."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError, check_choice
from cprec_recbole.data import NEXT_ITEMS
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.host.numbering import check_numbering, remember
from cprec_recbole.host.provider import importing_models
from cprec_recbole.integers import not_trained, rounded
from cprec_recbole.models.engine import ENGINES, GraphLayers, NoGraph
from cprec_recbole.models.eval_mode import can_be_trained, in_eval_mode
from cprec_recbole.models.from_config import parts_of_config
from cprec_recbole.models.inputs import barred_ids, pad_histories
from cprec_recbole.models.item_tables import MaskedLookUp
from cprec_recbole.models.saving import name_in_model, save_model
from cprec_recbole.models.spec import Encoder, ModelSpec, Parts, renamed
from cprec_recbole.models.vocabulary import Vocabulary, as_vocabulary
from cprec_recbole.partition import Partition
from cprec_recbole.sampling import NegativeSampler
from cprec_recbole.search.topk import TopK
from cprec_recbole.sharing import share, sharing_plan
from cprec_recbole.softmax import FullSoftmax, Softmax, build_softmax

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from cprec_recbole.results import ChosenOptions, WarmStart

with importing_models():
    from recbole.model.abstract_recommender import AbstractRecommender, SequentialRecommender

HIDDEN_AT = "MASK_INDEX"  # RecBole's field: where a row's items were hidden, [B, m]; 0 is none

_FIELDS = ("USER_ID", "ITEM_ID", "ITEM_SEQ", "ITEM_SEQ_LEN", "POS_ITEM_ID", "NEG_ITEM_ID")
_RECBOLE_ATTRIBUTES = (*_FIELDS, "max_seq_length", "n_items", "device", "loss_type")


class TokenTopK(NamedTuple):
    """The best items of each history by their tokens, best first, `[B, k]`."""

    tokens: list[list[str]]
    scores: Tensor  # log-probabilities with a tree softmax, logits with a full one


class CompressedRecommender(SequentialRecommender):
    """A sequential recommender whose table, softmax and layers are compressed (CpRec).

    It consists of `inner`, RecBole's own model whose item table is a BlockEmbedding and whose
    layers are shared; that `table`; and the `softmax`. RecBole builds it from a config and a
    dataset, `compress()` and `load_pretrained()` from parts.

    Args:
        config: a RecBole config.
        dataset: RecBole's training data set.
        parts: what the model is made of, in place of both.

    Raises:
        CompressionError: an option that does not fit; the message names it.
    """

    spec: ClassVar[ModelSpec]
    n_items: int  # padding included
    item_tokens: np.ndarray | None = None  # RecBole's token of each item id, [n_items]
    vocabulary: Vocabulary | None = None  # the same, once it was asked for
    choice: ChosenOptions | None = None  # where compress() was given a budget
    warm_start: WarmStart | None = None  # where compress() was given a trained model
    quantized: str | None = None  # as `quantize` was asked: int8, mixed or int4
    matrix_scales: Mapping[str, Tensor] = MappingProxyType({})  # of those that quantize() rounded
    graph_file: Path | None = None  # where a folder keeps its layers as a graph
    _engine = "torch"
    _graph: GraphLayers | None = None

    def __init__(
        self, config: Any = None, dataset: Any = None, *, parts: Parts | None = None
    ) -> None:
        AbstractRecommender.__init__(self)
        parts = parts or parts_of_config(self.spec, config, dataset)
        for name in _RECBOLE_ATTRIBUTES:
            setattr(self, name, getattr(parts.inner, name))
        self.compression = compression = parts.compression
        self.reads_last_column = parts.reads_last_column
        self.train_item_counts = parts.item_counts
        self.spec.table.put(parts.inner, parts.table)
        layers = self.spec.layers(parts.inner)
        share(layers, sharing_plan(compression.sharing, len(layers), self.spec.layers_per_block))
        self.inner = parts.inner
        memory = int(compression.loss_memory)
        self.softmax: Softmax = build_softmax(compression.softmax, parts.softmax_table, memory)
        if hasattr(dataset, "inter_feat"):
            remember(self, config, dataset)

    def rounded(self, dtype: str | None) -> AbstractContextManager[None]:
        """Within: the weights are as `quantize` would round them; afterwards they are as before.
        None changes nothing."""
        if dtype is None:
            return nullcontext()
        tables = {id(block.weight) for table in self.tables for block in table.blocks}
        return rounded(self, dtype, tables)

    head = renamed("head", "softmax")
    backbone = renamed("backbone", "inner")
    record = renamed("record", "spec")

    @property
    def table(self) -> BlockEmbedding:
        """The item table: what the layers look items up in."""
        look_up = self.inner.item_embedding
        return look_up.table if isinstance(look_up, MaskedLookUp) else look_up

    @property
    def tables(self) -> list[BlockEmbedding]:
        """The item table and, where that is another, the softmax's."""
        softmax_table = self.softmax.table
        return [self.table] if softmax_table is self.table else [self.table, softmax_table]

    @property
    def encoder(self) -> Encoder:
        """The hidden states that the model predicts from."""
        return Encoder(self.spec, self.inner, self.reads_last_column)

    # -- what RecBole calls ------------------------------------------------------------------------

    def hidden_states(self, item_seq: Tensor) -> Tensor:
        """Hidden state at every position, `[B, L] -> [B, L, d]`; position t sees items up to t. A
        CompressionError for a model with one state for a whole history."""
        return self.encoder.every_position(item_seq)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Hidden state that predicts the next item, `[B, L], [B] -> [B, d]`."""
        return self.encoder.last_state(item_seq, item_seq_len)

    def last_hidden(self, interaction: Interaction) -> Tensor:
        """Hidden state that predicts the next item of each row, `[B, d]`."""
        return self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Score of every item in RecBole's id order, `[B, n_items]`."""
        return self.softmax.scores(self.last_hidden(interaction))

    def predict(self, interaction: Interaction) -> Tensor:
        """Score of one item for each row, `[B]`."""
        items = interaction[self.ITEM_ID].unsqueeze(1)
        return self.softmax.score(self.last_hidden(interaction), items).squeeze(1)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Training loss of a batch, `[]`: every position of a window, or the last of a prefix. A
        CompressionError for a quantized model, which cannot be trained."""
        if self.table.quantized:
            raise not_trained(self.table.quantized)
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        if NEXT_ITEMS in interaction:
            hidden, target = self.encoder.at_targets(item_seq, interaction[NEXT_ITEMS])
            loss = self.position_loss(hidden, target)
        elif self.spec.training_states is not None:
            hidden, target, negative = self.spec.training_states(self.inner, interaction)
            # where RecBole's masks hid nothing, there is nothing to learn, and no loss that is NaN
            loss = self.position_loss(hidden, target, negative) if len(target) else hidden.sum()
        else:
            drawn = interaction[self.NEG_ITEM_ID] if self.loss_type == "BPR" else None
            target = interaction[self.POS_ITEM_ID]
            loss = self.position_loss(self.forward(item_seq, lengths), target, drawn)
        if self.spec.penalty is not None:
            loss = loss + self.spec.penalty(self.inner)
        return loss

    def position_loss(
        self, hidden: Tensor, target: Tensor, negative: Tensor | None = None
    ) -> Tensor:
        """Loss of hidden states and the items that came next, `[N, d], [N] -> []`; rows whose item
        is padding do not count. The softmax's, or with `loss_type: BPR` that of pairs, with
        negatives drawn where none are given."""
        if self.loss_type == "BPR" and isinstance(self.softmax, FullSoftmax):
            drawn = self._negatives(target) if negative is None else negative
            return self.softmax.pairwise_loss(hidden, target, drawn)
        options, softmax = self.compression, self.softmax
        if options.negatives and isinstance(softmax, FullSoftmax) and softmax.sampler is None:
            counts = self.train_item_counts
            counts = np.ones(self.n_items) if counts is None else counts
            given = torch.as_tensor(counts), options.negatives, options.negatives_power
            softmax.sampler = NegativeSampler(*given).to(hidden.device)
        return softmax.loss(hidden, target)

    def _negatives(self, target: Tensor) -> Tensor:
        """One item for each target, uniform over all others, as RecBole's sampler draws them."""
        drawn = torch.randint(1, self.n_items - 1, target.shape, device=target.device)
        return drawn + (drawn >= target)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As nn.Module does, also of version 0.1's states, in which the parts had other names.

        Raises:
            CompressionError: places that share a parameter here hold different values there, rows
                that are quantized on one side alone, or `assign=True`, which would replace the
                shared parameter in each place.
        """
        if assign:
            raise CompressionError(
                "Expected `assign` to be False, but got True, which would undo tying and sharing."
            )
        state_dict = {name_in_model(name): value for name, value in state_dict.items()}
        first: dict[int, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            given = state_dict.get(name)
            if not isinstance(given, Tensor):
                continue
            if _kind(given) != _kind(parameter):
                raise CompressionError(
                    f"Expected `state_dict` to have {name} in {parameter.dtype}, but got "
                    f"{given.dtype}; make the model with `quantize` or `dtype` as the state's was."
                )
            other = first.setdefault(id(parameter), name)
            same_shape = given.shape == state_dict[other].shape
            if not same_shape or not given.allclose(state_dict[other], 0, 0, equal_nan=True):
                raise CompressionError(
                    "Expected `state_dict` to be of a model with the same `sharing` and `tied`, "
                    f"but {other} and {name}, one parameter here, differ there."
                )
        for name, module in self.named_modules():  # before anything is changed
            if isinstance(module, Partition):
                module.check_state(state_dict, f"{name}.")
        return super().load_state_dict(state_dict, strict=strict)

    # -- engines -----------------------------------------------------------------------------------

    @property
    def engine(self) -> str:
        """What computes hidden states in `recommend`: `torch`, or `onnx` for onnxruntime, which
        follows the layers anew after each change of weights. Set it to either, or to `auto`:
        onnxruntime where it is installed and runs the layers in float32, int8 or int4 on the CPU,
        until weights change.

        Raises:
            CompressionError: another name, or `onnx` where onnxruntime is missing or cannot run
                the layers; the message says why.
        """
        return "torch" if self._graph_layers() is None else "onnx"

    @engine.setter
    def engine(self, engine: str) -> None:
        check_choice("engine", engine, ENGINES)
        before, self._engine = self._engine, engine
        if engine == "torch":
            self._graph = None
        elif engine == "onnx":
            try:
                self._graph_layers()
            except CompressionError:
                self._engine = before
                raise

    def _graph_layers(self) -> GraphLayers | None:
        """The layers in onnxruntime, as the weights are now; None where torch answers."""
        graph = self._graph
        if self._engine == "torch" or (graph is not None and graph.version.is_current()):
            return graph
        try:
            if graph is not None and self._engine == "auto":
                raise NoGraph("the weights have changed")
            # what a folder keeps is of the weights that it was loaded with
            graph, self.graph_file = GraphLayers(self, self.graph_file), None
        except NoGraph as error:
            if self._engine == "onnx":
                raise CompressionError(
                    "Expected `engine` to be torch or auto for this model, but got onnx, which "
                    f"cannot be had: {error}."
                ) from error
            self._engine, graph = "torch", None
        self._graph = graph
        return graph

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no session, and come from no folder."""
        engine = "onnx" if self._engine == "onnx" else "torch"
        return {**self.__dict__, "graph_file": None, "_graph": None, "_engine": engine}

    # -- without RecBole's data --------------------------------------------------------------------

    def recommend(
        self,
        item_seq: Tensor | Sequence[int] | Sequence[Sequence[int]],
        k: int = 20,
        exclude_seen: bool = False,
        exclude: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        allowed: Tensor | Sequence[int] | None = None,
    ) -> TopK:
        """The k best next items, exact, best first, equal scores by lower id.

        Args:
            item_seq: one history of item ids, oldest first, or several: a list of lists of any
                lengths, or a tensor `[B, L]` with 0 as padding. Of a history longer than the
                model's limit the newest items count. One history is a batch of one.
            k: how many items.
            exclude_seen: leave out the items of the history itself, also those beyond the limit.
            exclude: item ids to leave out: one list for all histories, or one list for each.
            allowed: the only item ids to choose from; every item if left out.

        Raises:
            CompressionError: an empty history, an id outside the catalogue, nothing allowed, or k
                above what may be recommended.
        """
        histories, lengths, seen = pad_histories(item_seq, self.n_items, self.max_seq_length)
        barred = barred_ids(exclude, len(histories), self.n_items, seen if exclude_seen else None)
        graph = self._graph_layers()
        if graph is not None:
            hidden = graph(histories, lengths)
        else:
            device = self.table.partition.item_at.device
            with torch.no_grad(), in_eval_mode(self):
                hidden = self(histories.to(device), lengths.to(device))
        return self.softmax.topk(hidden, k, barred, allowed)

    def recommend_tokens(
        self,
        histories: Sequence[str | int] | Sequence[Sequence[str | int]],
        k: int = 20,
        *,
        unknown: str = "warn",
        exclude_seen: bool = False,
        exclude: Sequence[str | int] | None = None,
        allowed: Sequence[str | int] | None = None,
    ) -> TokenTopK:
        """The k best next items for histories of the catalogue's own tokens.

        Args:
            histories: one history of tokens, oldest first, or several.
            k: how many items.
            unknown: tokens that are not in the catalogue are left out with a warning (`warn`) or
                without (`skip`), or are an `error`.
            exclude_seen: leave out the items of the history itself.
            exclude: tokens to leave out for all histories.
            allowed: the only tokens to choose from.

        Raises:
            CompressionError: a model without tokens, an unknown token where that is an error, a
                history of which nothing is left, and as `recommend`.
        """
        vocabulary = self.known_vocabulary()
        if isinstance(histories, Sequence) and any(
            isinstance(row, Sequence) and not isinstance(row, str) for row in histories
        ):
            rows = enumerate(histories)
            ids = [vocabulary.ids(row, unknown, f"history {i}") for i, row in rows]  # type: ignore
        else:
            ids = [vocabulary.ids(histories, unknown, "the history")]
        barred = None if exclude is None else vocabulary.ids(exclude, unknown, "`exclude`")
        only = None if allowed is None else vocabulary.ids(allowed, unknown, "`allowed`")
        best = self.recommend(ids, k, exclude_seen, barred or None, only)
        return TokenTopK(
            [[vocabulary.token(i) for i in row] for row in best.items.tolist()], best.scores
        )

    def build_index(self) -> None:
        """Prepare `recommend` to skip most of a large catalogue; see Softmax.build_index."""
        self.softmax.build_index()

    def known_vocabulary(self) -> Vocabulary:
        """The tokens of the items; a CompressionError for a model that knows none."""
        if self.vocabulary is None and self.item_tokens is not None:
            self.vocabulary = Vocabulary([str(token) for token in self.item_tokens[1:]])
        if self.vocabulary is None:
            raise CompressionError(
                "Expected a model that knows its items' tokens, but this one was not built by "
                "RecBole; set model.vocabulary = Vocabulary(tokens) or pass `tokens` to "
                "save_pretrained."
            )
        return as_vocabulary(self.vocabulary, self.n_items)

    def save_pretrained(self, folder: str | os.PathLike[str], tokens: Any = None) -> Path:
        """Keep the model in a folder that `load_pretrained` reads, without RecBole's data set;
        returns the folder.

        Weights as safetensors, each parameter once whatever shares it; options and tokens as JSON.
        A crash at any moment leaves what was in the folder before.

        Args:
            folder: made where it is missing; a model that was in it is replaced.
            tokens: a RecBole dataset, or the token of each item id from 1 on; may be left out for a
                model that RecBole built.

        Raises:
            CompressionError: no tokens, tokens that do not fit, or a folder that cannot be written
                or that another process writes to.
        """
        check_numbering(self, tokens, "tokens")
        known = self.known_vocabulary() if tokens is None else as_vocabulary(tokens, self.n_items)
        return save_model(self, folder, known)

    @can_be_trained
    @torch.no_grad()
    def add_items(
        self,
        tokens: Sequence[str],
        like: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Append items to the last block, in place, and return their ids; every other row stays as
        it is, bit for bit.

        A new item starts at the mean vector of the items that it is like, as near as the last
        block's rank allows, or else at the mean of the last block. Use the model at once, or train
        it further; an optimizer, an index and a teacher from before know nothing of the new rows.

        Args:
            tokens: of the new items.
            like: for each new item a token, or a list of tokens, of items that it is like, or None;
                as a list in the order of `tokens`, or by token.

        Raises:
            CompressionError: a token that is there already or comes twice, or like an unknown one.
        """
        known = self.known_vocabulary()
        if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not tokens:
            raise CompressionError(
                f"Expected `tokens` to be a list of one token or more, but got {tokens!r}."
            )
        extended = known.extended(tokens)
        similar = _similar_items(tokens, like, known)
        rows = [_new_rows(table, similar) for table in self.tables]  # what can fail has been done
        partition = self.table.partition.extended(len(tokens))
        for table, new in zip(self.tables, rows):
            table.partition = partition
            table.blocks[-1].extend(new)
        ids = list(range(self.n_items, partition.n_items))
        self.n_items = self.inner.n_items = partition.n_items
        if self.train_item_counts is not None:
            self.train_item_counts = np.append(self.train_item_counts, np.zeros(len(tokens)))
        ranks, cutoffs = self.table.ranks, partition.cutoffs
        self.compression = replace(self.compression, ranks=ranks, cutoffs=cutoffs)
        self.vocabulary, self.item_tokens = extended, None
        self.softmax.drop_index()
        return ids


def _similar_items(
    tokens: Sequence[str], like: Sequence[Any] | Mapping[str, Any] | None, known: Vocabulary
) -> list[list[int]]:
    """For each new token the ids of the items that it is like."""
    if isinstance(like, Mapping):
        strangers = [token for token in like if token not in tokens]
        if strangers:
            raise CompressionError(
                f"Expected `like` to name new tokens, but got {strangers[0]!r}, which is none."
            )
        like = [like.get(token) for token in tokens]
    if like is None:
        like = [None] * len(tokens)
    if isinstance(like, str) or not isinstance(like, Sequence) or len(like) != len(tokens):
        raise CompressionError(
            f"Expected `like` to have an entry for each of the {len(tokens)} new tokens, but got "
            f"{like!r}."
        )
    lists = [[] if e is None else e if isinstance(e, list | tuple) else [e] for e in like]
    return [known.ids(entry, name="`like`") for entry in lists]


def _new_rows(table: BlockEmbedding, similar: Sequence[Sequence[int]]) -> Tensor:
    """A row of the last block for each new item, `[n, r]`: the one whose vector is nearest to the
    mean of some items', or the mean of all."""
    last, rows = table.blocks[-1], []
    skip = 1 if len(table.blocks) == 1 else 0  # of one block, row 0 is padding
    for ids in similar:
        if not ids:
            rows.append(last.rows()[skip:].mean(0))
            continue
        vector = table(torch.tensor(ids, device=last.weight.device)).mean(0)
        if last.projection is not None:
            wanted, basis = vector.double().unsqueeze(1), last.projection.T.double()
            vector = torch.linalg.lstsq(basis, wanted).solution.squeeze(1).to(vector.dtype)
        rows.append(vector)
    return torch.stack(rows)


def compressed_class(spec: ModelSpec) -> type[CompressedRecommender]:
    """The class of the compressed models of a spec, for `models` to keep."""
    about = {"spec": spec, "__doc__": f"{spec.name}, compressed."}
    return type(f"Cp{spec.name}", (CompressedRecommender,), about | {"__module__": __package__})


def copied(model: CompressedRecommender) -> CompressedRecommender:
    """A copy that shares tokens and counts."""
    known = (model.vocabulary, model.item_tokens, model.train_item_counts)
    return copy.deepcopy(model, {id(each): each for each in known if each is not None})


def _kind(values: Tensor) -> torch.dtype | None:
    return None if values.is_floating_point() else values.dtype
