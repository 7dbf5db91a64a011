"""The catalogue's own tokens, and RecBole's ids for them."""

from __future__ import annotations

import hashlib
import warnings
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cprec_recbole.config import CompressionError

UNKNOWN = ("warn", "error", "skip")


class Vocabulary:
    """Tokens of the items by id; id 0 is padding and has none. It does not change.

    A million texts in a list and a dict take 130 MiB. One text of all tokens, where each ends, and
    the ids sorted by the hashes of their tokens take 12 bytes a token besides its own.

    Args:
        tokens: the token of each id from 1 on, `[n_items - 1]`.

    Raises:
        CompressionError: a token that is no text, is empty, or stands for two items.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._text, self._ends, hashes = bytearray(), array("I", [0]), array("I")
        for token in tokens:
            self._text += _encoded(token)
            self._ends.append(len(self._text))
            hashes.append(_hash(token))
        self._order = np.frombuffer(hashes, np.uint32).argsort().astype(np.int32)
        self._hashes = np.frombuffer(hashes, np.uint32)[self._order]
        same = self._hashes[1:] == self._hashes[:-1]
        for place in self._order[1:][same].tolist():
            token = self.token(place + 1)
            if self._id(token) != place + 1:  # not only the same hash
                raise CompressionError(
                    f"Expected `tokens` to be different from each other, but {token!r} stands for "
                    "two."
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return Vocabulary, (self.tokens,)  # Python's hashes of texts are another process's own

    def __deepcopy__(self, memo: dict[int, Any]) -> Vocabulary:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    @classmethod
    def of_dataset(cls, dataset: Any) -> Vocabulary:
        """The item tokens of a RecBole dataset."""
        return cls(_texts(dataset.field2id_token[dataset.iid_field]))

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, token: object) -> bool:
        return isinstance(token, str) and self._id(token) != 0

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token of each id from 1 on, `[n_items - 1]`: made anew from what is kept."""
        return tuple(self.token(item) for item in range(1, len(self) + 1))

    def token(self, item: int) -> str:
        """The token of an id from 1 on."""
        return self._text[self._ends[item - 1] : self._ends[item]].decode()

    def _id(self, token: str) -> int:
        """The id of a token, 0 where it is none."""
        place = bisect_left(self._hashes, _hash(token))
        while place < len(self) and self._hashes[place] == _hash(token):
            item = int(self._order[place]) + 1
            if self.token(item) == token:
                return item
            place += 1
        return 0

    def ids(
        self, tokens: Iterable[object], unknown: str = "error", name: str = "a history"
    ) -> list[int]:
        """The ids of tokens.

        Args:
            tokens: texts, or whole numbers that stand for their digits.
            unknown: what to do about those that are not in the catalogue: `error`, or leave them
                out, with a warning (`warn`) or without (`skip`).
            name: what messages call the tokens.
        Raises:
            CompressionError: an unknown token, where that is an error; something that is no token.
        """
        if unknown not in UNKNOWN:
            raise CompressionError(
                f"Expected `unknown` to be one of {', '.join(UNKNOWN)}, but got {unknown!r}."
            )
        if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
            raise CompressionError(f"Expected {name} to be a list of tokens, but got {tokens!r}.")
        texts = [_as_text(token, name) for token in tokens]
        found = [self._id(text) for text in texts]
        missing = [text for text, item in zip(texts, found) if not item]
        if missing and unknown != "skip":
            shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
            few = f"{len(missing)} of {len(texts)} tokens"
            if unknown == "error":
                raise CompressionError(
                    f"Expected {name} to hold tokens of the {len(self):,} items of the catalogue, "
                    f"but {few} are not in it: {shown}; leave them out."
                )
            warnings.warn(
                f"{few} of {name} are not in the catalogue: {shown}; they are left out.",
                stacklevel=3,
            )
        return [item for item in found if item]

    def extended(self, tokens: Sequence[str]) -> Vocabulary:
        """With more tokens behind, for the ids that follow."""
        return Vocabulary((*self.tokens, *tokens))


def as_vocabulary(tokens: Any, n_items: int) -> Vocabulary:
    """A vocabulary out of one, a RecBole dataset or a list of tokens by id from 1 on; a
    CompressionError for anything else, or where there is not one token for each item."""
    if hasattr(tokens, "field2id_token"):
        tokens = Vocabulary.of_dataset(tokens)
    elif isinstance(tokens, Sequence | np.ndarray) and not isinstance(tokens, str | bytes):
        tokens = Vocabulary(tokens)
    if not isinstance(tokens, Vocabulary) or len(tokens) != n_items - 1:
        got = f"{len(tokens)} of them" if isinstance(tokens, Vocabulary) else repr(tokens)[:60]
        raise CompressionError(
            f"Expected `tokens` to be a RecBole dataset or {n_items - 1} texts, one for each item "
            f"id from 1 on, but got {got}."
        )
    return tokens


def check_numbering(model: Any, data: Any, argument: str) -> None:
    """Raise a CompressionError where a model and data call an item by different ids, or a user, of
    models that know users.

    RecBole numbers both by their first appearance, so the same interactions in another order of
    rows have other ids. Nothing is compared where either does not know its tokens.

    Args:
        model: one of ours, or one of RecBole's that was built after `import cprec_recbole`.
        data: RecBole's data set or data loader; whatever else is left alone.
        argument: the name that the data was given by.
    """
    dataset = getattr(data, "_dataset", data)
    if not hasattr(dataset, "field2id_token"):
        return
    vocabulary = getattr(model, "vocabulary", None)
    items, users = getattr(model, "item_tokens", None), getattr(model, "user_tokens", None)
    for kind, field, own in (
        ("item", dataset.iid_field, items if vocabulary is None else ("", *vocabulary.tokens)),
        ("user", dataset.uid_field, users if hasattr(model, "user_embedding") else None),
    ):
        if own is None:
            continue
        own, tokens = _texts(own), _texts(dataset.field2id_token[field])
        if own == tokens:
            continue
        if len(own) != len(tokens):
            difference = f"the model has {len(own)} {kind}s and the data {len(tokens)}"
        else:
            i = next(i for i, (a, b) in enumerate(zip(own, tokens)) if a != b)
            difference = f"{kind} {i + 1} is {own[i]!r} in the model and {tokens[i]!r} in the data"
        raise CompressionError(
            f"Expected `{argument}` to number its {kind}s as the model does, but {difference}. "
            "RecBole counts them by first appearance: keep the rows that the model was trained on "
            "first, in their order and with the same filters, new ones behind them, and give items "
            "that the model does not know to `add_items` in the order of their ids."
        )


def remember(model: Any, config: Any, dataset: Any) -> None:
    """Let a model know the tokens that it is built with, and its checkpoints a checksum of them."""
    for name, field in (("item", dataset.iid_field), ("user", dataset.uid_field)):
        if field in dataset.field2id_token:
            setattr(model, f"{name}_tokens", dataset.field2id_token[field])
            if hasattr(config, "final_config_dict"):  # which is what a checkpoint keeps
                config.final_config_dict[f"{name}_numbering"] = numbering(dataset, field)


def numbering(dataset: Any, field: str) -> str:
    """A checksum of the tokens of a field of a RecBole data set, in the order of their ids."""
    tokens = "\0".join(_texts(dataset.field2id_token[field]))
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


def check_checkpoint_numbering(
    file: Any, options: Mapping[str, Any], dataset: Any, kind: str = "item"
) -> None:
    """Raise a CompressionError where a data set numbers its items, or users, otherwise than the one
    that a checkpoint's model was trained on; an older checkpoint does not say."""
    expected = options.get(f"{kind}_numbering")
    field = dataset.iid_field if kind == "item" else dataset.uid_field
    if expected is not None and expected != numbering(dataset, field):
        raise CompressionError(
            f"Expected `data_path` to hold the data that {file} was trained on, but the {kind}s of "
            f"{dataset.dataset_name} in {dataset.dataset_path} have other numbers: RecBole numbers "
            "them in the order of their first appearance, and the rows, their order or the filters "
            "have changed."
        )


def _hash(token: str) -> int:
    """32 bits: tokens are compared too, and a million have some hundred pairs of the same."""
    return hash(token) & 0xFFFFFFFF


def _texts(tokens: Iterable[object]) -> list[str]:
    """Tokens by id, without the first, which is padding's."""
    return [str(token) for token in tokens][1:]


def _encoded(token: object) -> bytes:
    if not isinstance(token, str) or not token:
        raise CompressionError(
            f"Expected `tokens` to be texts of one character or more, but got {token!r}."
        )
    try:
        return token.encode()
    except UnicodeEncodeError as error:
        raise CompressionError(
            "Expected `tokens` to be text that can be written as UTF-8, but got "
            f"{error.object[error.start : error.end]!r}."
        ) from error


def _as_text(token: object, name: str) -> str:
    if isinstance(token, str):
        return token
    if isinstance(token, int | np.integer) and not isinstance(token, bool):
        return str(token)
    raise CompressionError(
        f"Expected {name} to hold tokens, which are texts or whole numbers, but got {token!r}."
    )
