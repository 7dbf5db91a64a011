"""The catalogue's own tokens, and RecBole's ids for them."""

from __future__ import annotations

import warnings
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cprec_recbole.config import CompressionError, check_choice, is_whole
from cprec_recbole.host.numbering import tokens_by_id

UNKNOWN = ("warn", "error", "skip")


class Vocabulary:
    """Tokens of the items by id; id 0 is padding and has none. It does not change.

    Args:
        tokens: the token of each id from 1 on, `[n_items - 1]`.

    Raises:
        CompressionError: a token that is no text, is empty, or stands for two items.
    """

    # a million texts in a list and a dict take 130 MiB; one text of all tokens, where each ends,
    # and the ids sorted by the hashes of their tokens 12 bytes a token besides its own
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
                    f"Expected `tokens` to stand for one item each, but {token!r} stands for two."
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
        return cls(tokens_by_id(dataset.field2id_token[dataset.iid_field]))

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
        wanted = _hash(token)
        for place in range(bisect_left(self._hashes, wanted), len(self)):
            item = int(self._order[place]) + 1
            if self._hashes[place] != wanted:
                break
            if self.token(item) == token:
                return item
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
        check_choice("unknown", unknown, UNKNOWN)
        if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
            raise CompressionError(f"Expected {name} to be a list of tokens, but got {tokens!r}.")
        texts = []
        for token in tokens:
            if not isinstance(token, str) and not is_whole(token):
                raise CompressionError(
                    f"Expected {name} to hold tokens, which are texts or whole numbers, but got "
                    f"{token!r}."
                )
            texts.append(str(token))
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


def _hash(token: str) -> int:
    """32 bits: tokens are compared too, and a million have some hundred pairs of the same."""
    return hash(token) & 0xFFFFFFFF


def _encoded(token: object) -> bytes:
    if not isinstance(token, str) or not token:
        raise CompressionError(
            f"Expected `tokens` to be texts of one character or more, but got {token!r}."
        )
    try:
        return token.encode()
    except UnicodeEncodeError as error:
        raise CompressionError(
            f"Expected `tokens` to be text that can be written as UTF-8, but got {token!r}."
        ) from error
