"""The catalogue's own tokens, and RecBole's ids for them."""

from __future__ import annotations

import itertools
import warnings
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cprec_recbole.config import CompressionError

UNKNOWN = ("warn", "error", "skip")
_PIECE = 2**12  # tokens that are texts of their own at a time


class Vocabulary:
    """Tokens of the items by id; id 0 is padding and has none. It does not change.

    Kept as one text and three arrays, 12 bytes a token besides its own: a seventh of what a list
    and a dict of as many texts take.

    Args:
        tokens: the token of each id from 1 on, `[n_items - 1]`.

    Raises:
        CompressionError: a token that is no text, is empty, or stands for two items.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        text, lengths, hashes = bytearray(), array("I"), array("I")
        rest = iter(tokens)
        while piece := list(itertools.islice(rest, _PIECE)):
            encoded = _encoded(piece)
            text += b"".join(encoded)
            lengths.extend(map(len, encoded))
            hashes.extend(map(_hash, piece))
        wide = len(text) >= 2**31
        self._text = text
        self._ends = np.zeros(len(lengths) + 1, dtype=np.int64 if wide else np.int32)
        np.cumsum(np.frombuffer(lengths, np.uint32), out=self._ends[1:])
        order = np.frombuffer(hashes, np.uint32).argsort().astype(np.int32)
        self._hashes, self._by_hash = np.frombuffer(hashes, np.uint32)[order], order + 1
        self._check_different()

    def _check_different(self) -> None:
        same = self._hashes[1:] == self._hashes[:-1]
        seen = set()
        for place in np.union1d(same.nonzero()[0], same.nonzero()[0] + 1).tolist():
            token = self.token(self._by_hash[place])
            if token in seen:
                raise CompressionError(
                    f"Expected `tokens` to be different from each other, but {token!r} stands for "
                    "two."
                )
            seen.add(token)

    def __reduce__(self) -> tuple[Any, ...]:
        return Vocabulary, (self.tokens,)  # Python's hashes of texts are another process's own

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self._text == other._text and np.array_equal(self._ends, other._ends)

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Vocabulary:
        return self

    @classmethod
    def of_dataset(cls, dataset: Any) -> Vocabulary:
        """The item tokens of a RecBole dataset."""
        return cls([str(token) for token in dataset.field2id_token[dataset.iid_field][1:]])

    def __len__(self) -> int:
        return len(self._by_hash)

    def __contains__(self, token: object) -> bool:
        return isinstance(token, str) and self._found([token]) != [0]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token of each id from 1 on, `[n_items - 1]`: made anew from what is kept."""
        return tuple(self.token(item) for item in range(1, len(self) + 1))

    def token(self, item: int) -> str:
        """The token of an id from 1 on."""
        return self._text[self._ends[item - 1] : self._ends[item]].decode()

    def _found(self, texts: Sequence[str]) -> list[int]:
        """The id of each text, 0 where it is no token."""
        hashes = np.fromiter(map(_hash, texts), np.uint32, len(texts))
        first = np.searchsorted(self._hashes, hashes)
        last = np.searchsorted(self._hashes, hashes, side="right")
        return [
            next((item for item in self._by_hash[i:j].tolist() if self.token(item) == text), 0)
            for text, i, j in zip(texts, first.tolist(), last.tolist())
        ]

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
        found = self._found(texts)
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

    def same_as(self, tokens: Sequence[str]) -> bool:
        """Whether these are the tokens of the ids from 1 on, in their order."""
        encoded = [token.encode() for token in tokens]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.array_equal(np.diff(self._ends), lengths) and b"".join(encoded) == self._text

    def extended(self, tokens: Sequence[str]) -> Vocabulary:
        """With more tokens behind, for the ids that follow."""
        return Vocabulary(itertools.chain(self.tokens, tokens))


def as_vocabulary(tokens: Any, n_items: int) -> Vocabulary:
    """A vocabulary out of one, a RecBole dataset or a list of tokens by id from 1 on.

    Raises:
        CompressionError: none of these, or not one token for each item.
    """
    if isinstance(tokens, np.ndarray):
        tokens = tokens.tolist()
    if hasattr(tokens, "field2id_token"):
        tokens = Vocabulary.of_dataset(tokens)
    elif isinstance(tokens, Sequence) and not isinstance(tokens, str | bytes):
        tokens = Vocabulary(tokens)
    if not isinstance(tokens, Vocabulary) or len(tokens) != n_items - 1:
        got = f"{len(tokens)} of them" if isinstance(tokens, Vocabulary) else repr(tokens)[:60]
        raise CompressionError(
            f"Expected `tokens` to be a RecBole dataset or {n_items - 1} texts, one for each item "
            f"id from 1 on, but got {got}."
        )
    return tokens


def _hash(text: str) -> int:
    """32 bits: texts are compared too, and a million have some hundred pairs of the same."""
    return hash(text) & 0xFFFFFFFF


def _encoded(tokens: Sequence[str]) -> list[bytes]:
    for token in tokens:
        if not isinstance(token, str) or not token:
            raise CompressionError(
                f"Expected `tokens` to be texts of one character or more, but got {token!r}."
            )
    try:
        return [token.encode() for token in tokens]
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
