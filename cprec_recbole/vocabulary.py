"""The catalogue's own tokens, and RecBole's ids for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cprec_recbole.config import CompressionError

UNKNOWN = ("warn", "error", "skip")


class Vocabulary:
    """Tokens of the items by id; id 0 is padding and has none.

    Args:
        tokens: the token of each id from 1 on, `[n_items - 1]`.

    Raises:
        CompressionError: a token that is no text, is empty, or stands for two items.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = list(tokens)
        for token in self._tokens:
            if not isinstance(token, str) or not token:
                raise CompressionError(
                    f"Expected `tokens` to be texts of one character or more, but got {token!r}."
                )
        try:
            "".join(self._tokens).encode()
        except UnicodeEncodeError as error:
            raise CompressionError(
                "Expected `tokens` to be text that can be written as UTF-8, but got "
                f"{error.object[error.start : error.end]!r}."
            ) from error
        if len(self._ids) < len(self._tokens):
            twice = next(t for i, t in enumerate(self._tokens, 1) if self._ids[t] != i)
            raise CompressionError(
                f"Expected `tokens` to be different from each other, but {twice!r} stands for two."
            )

    @classmethod
    def of_dataset(cls, dataset: Any) -> Vocabulary:
        """The item tokens of a RecBole dataset."""
        return cls([str(token) for token in dataset.field2id_token[dataset.iid_field][1:]])

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: item for item, token in enumerate(self._tokens, start=1)}

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token of each id from 1 on, `[n_items - 1]`."""
        return tuple(self._tokens)

    def token(self, item: int) -> str:
        """The token of an id from 1 on."""
        return self._tokens[item - 1]

    def ids(self, tokens: Iterable[object], unknown: str = "error") -> list[int]:
        """The ids of tokens.

        Args:
            tokens: texts, or whole numbers that stand for their digits.
            unknown: what to do about those that are not in the catalogue: `error`, or leave them
                out, with a warning (`warn`) or without (`skip`).

        Raises:
            CompressionError: an unknown token, where that is an error; something that is no token.
        """
        if unknown not in UNKNOWN:
            raise CompressionError(
                f"Expected `unknown` to be one of {', '.join(UNKNOWN)}, but got {unknown!r}."
            )
        if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
            raise CompressionError(f"Expected a list of tokens, but got {tokens!r}.")
        texts = [_as_text(token) for token in tokens]
        missing = [text for text in texts if text not in self._ids]
        if missing and unknown != "skip":
            shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
            message = f"{len(missing)} of {len(texts)} tokens are not in the catalogue: {shown}"
            if unknown == "error":
                raise CompressionError(
                    f"Expected tokens of the {len(self):,} items of the catalogue, but {message}. "
                    'Leave them out with unknown="warn".'
                )
            warnings.warn(f"{message}; they are left out.", stacklevel=3)
        return [self._ids[text] for text in texts if text in self._ids]

    def extended(self, tokens: Sequence[str]) -> Vocabulary:
        """With more tokens behind, for the ids that follow."""
        return Vocabulary([*self._tokens, *tokens])


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


def _as_text(token: object) -> str:
    if isinstance(token, str):
        return token
    if isinstance(token, int | np.integer) and not isinstance(token, bool):
        return str(token)
    raise CompressionError(
        f"Expected a history of tokens, which are texts or whole numbers, but got {token!r}."
    )
