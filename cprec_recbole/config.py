"""The options of a compression: every default and every rule is here."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeGuard

SHARING_SCHEMES = ("none", "cross_layer", "cross_block", "adjacent_layer", "adjacent_block")
SOFTMAXES = ("full", "tree")
OBJECTIVES = ("all_positions", "last_position")
ROUNDINGS = ("int8", "mixed", "int4")

DEFAULT_BLOCKS = 3  # CpRec, section 3.2: three to five blocks are enough
# d/2, d/4, d/8 from head to tail, and d/8 for further blocks: on validation above the authors' d,
# d/4, d/16 in tables of the same size, on amazon-beauty above one rank too (docs/defaults.md). In a
# large catalogue (below) the authors' stay: a head without a projection trains steadily with
# sampled negatives (docs/training.md), and the tail costs.
RANK_SHARES = (1 / 2, 1 / 4, 1 / 8)
LARGE_RANK_SHARES = (1, 1 / 4, 1 / 16)
# In int4 about the bytes of the above in int8, with which rare items come back (docs/defaults.md)
INT4_RANK_SHARES = (1, 1 / 2, 3 / 8)
# The head: a tenth of the items, since a small head is what compresses; but not below 400 items,
# which seems to cost quality where there is little to save, nor above a quarter. The figures, and
# how far they carry, are in docs/method.md, "Where to cut".
HEAD_SHARE = 0.1
HEAD_ITEMS = 400
LARGEST_HEAD_SHARE = 0.25
# From 200,000 items on, what a tree costs a step decides: the head's logits are made for every
# target, those of a block of k items for the share of targets that it holds. By Zipf's law the sum
# is about least where the roots of the cutoffs are in equal steps, and it falls with every block
# (docs/scale.md), so that the head stops growing and each doubling brings two blocks.
LARGEST_HEAD = 20_000
LARGE_CATALOGUE = 200_000  # where a tenth of the items is the largest head
LOSS_MEMORY = 256 * 2**20  # about what a step takes without the softmax of a large catalogue
LEAST_LOSS_MEMORY = 2**20  # with less, a step would be nothing but calls
LISTED = 20  # options that an error lists beside the nearest one


class CompressionError(ValueError):
    """An option, a model or an input that cannot be used; nothing has been changed."""


@dataclass(frozen=True)
class BlockPlan:
    """Ranks and cutoffs that fit one catalogue and one embedding size.

    Attributes:
        ranks: rank of each block, `[n_blocks]`, never rising.
        cutoffs: end of each block in popularity order, `[n_blocks]`; the last is `n_items`.
        dim: size `d` of an item vector.
    """

    ranks: tuple[int, ...]
    cutoffs: tuple[int, ...]
    dim: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each block, `[n_blocks]`; the head's include the padding row."""
        return tuple(end - start for start, end in zip((0, *self.cutoffs), self.cutoffs))

    @property
    def n_items(self) -> int:
        """Items of the catalogue, padding included."""
        return self.cutoffs[-1]

    @property
    def n_parameters(self) -> int:
        """Parameters of the block embedding: `sum k_j r_j + r_j d` (no projection at full rank)."""
        return sum(
            size * rank + (rank * self.dim if rank != self.dim else 0)
            for size, rank in zip(self.sizes, self.ranks)
        )


@dataclass(frozen=True)
class CompressionConfig:
    """What to compress, and how. The same words are the keys in YAML and on the command line.

    Args:
        ranks: rank of each block from head to tail, e.g. `(64, 16, 4)`; at most the embedding size
            and never rising. None: `d/2, d/4, d/8`; with a `rounding` to int4 `d, d/2, 3d/8`; above
            200,000 items `d, d/4, d/16`. Further blocks have the last of these, one block has d.
        cutoffs: where the blocks end when items are ordered by falling popularity: rows
            (`(400, 900)`, the padding row counted) or shares of the items (`(0.1, 0.3)`). The end
            of the catalogue may be left out. None: a head of 10% of the items (at least 400 items,
            at most 25% and 20,000 items), the other cutoffs in equal ratio; above 200,000 items in
            equal steps of their roots, and two blocks more for each doubling.
        sharing: which layers use the same parameters, one of `none`, `cross_layer`, `cross_block`,
            `adjacent_layer`, `adjacent_block` (CpRec, section 3.3).
        softmax: `full` (one flat softmax over the factorised table; mostly the more accurate one,
            see docs/defaults.md) or `tree` (the paper's: the head block and one cluster for
            each other block; the cheaper one on a large catalogue).
        tied: True: the softmax reads the block embedding's own factors. False: it has its own.
        training: `all_positions` predicts the next item at every position of a sequence in one
            pass, as the papers do; `last_position` is RecBole's row for every prefix, and what
            models with one hidden state for a whole history are trained with.
        negatives: how many items a training step draws as negatives for all its targets: a sampled
            softmax, corrected for how often each is drawn. 0: the softmax over all items.
        negatives_power: they are drawn by popularity to this power, from 0 to 1.
        rounding: `int8`, `mixed` or `int4`: training steps, and evaluation in between, see the
            weights as `quantize` would round them (straight-through estimation), so that little is
            lost when it does. None: training is in float; int8 loses nothing so either.
        loss_memory: bytes that the logits of a training step may take at a time, a number or text
            such as `"256MiB"`, 1 MiB or more. The loss and its gradient do not depend on it.

    Raises:
        CompressionError: an option that breaks a rule; the message names it.
    """

    ranks: tuple[int, ...] | None = None
    cutoffs: tuple[int, ...] | tuple[float, ...] | None = None
    # What they rest on, and how far that carries: docs/defaults.md.
    sharing: str = "cross_block"  # NextItNet: an eighth of the layers, for the same NDCG@20
    softmax: str = "full"  # the tree: 94 and 101% of its NDCG@20 on test (amazon-beauty)
    tied: bool = True  # untied: 85 to 94% on validation, with up to twice the parameters
    training: str = "all_positions"
    loss_memory: int | str = LOSS_MEMORY
    negatives: int = 0
    negatives_power: float = 1.0
    rounding: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", _checked_ranks(self.ranks))
        object.__setattr__(self, "cutoffs", _checked_cutoffs(self.cutoffs))
        check_choice("sharing", self.sharing, SHARING_SCHEMES)
        check_choice("softmax", self.softmax, SOFTMAXES)
        check_choice("training", self.training, OBJECTIVES)
        if not isinstance(self.tied, bool):
            raise CompressionError(f"Expected `tied` to be True or False, but got {self.tied!r}.")
        if self.rounding is not None:
            check_choice("rounding", self.rounding, ROUNDINGS)
        check_whole("negatives", self.negatives, 0)
        check_number("negatives_power", self.negatives_power, "a number from 0 to 1", 0, 1)
        if self.negatives and self.softmax == "tree":
            raise CompressionError(
                "Expected `negatives` to be 0 with `softmax: tree`, whose loss reads few items as "
                f"it is, but got {self.negatives}; use `softmax: full`."
            )
        memory = size_in_bytes(self.loss_memory)
        if memory is None or memory < LEAST_LOSS_MEMORY:
            raise CompressionError(
                "Expected `loss_memory` to be a size of 1 MiB or more, in bytes or such as "
                f'"256MiB", but got {self.loss_memory!r}.'
            )
        object.__setattr__(self, "loss_memory", memory)
        if self.ranks is not None and self.cutoffs is not None:
            _check_block_count(self.ranks, self.cutoffs)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options, as used in Python, YAML and on the command line."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> CompressionConfig:
        """Build from a mapping; an unknown name is an error that offers the nearest known one."""
        reject_unknown(options, cls.option_names())
        return cls(**options)

    @classmethod
    def uncompressed(
        cls, training: str = "all_positions", loss_memory: int | str = LOSS_MEMORY
    ) -> CompressionConfig:
        """The setting that loses nothing: one block of full rank, no sharing, tied full softmax."""
        return cls(
            cutoffs=(),
            sharing="none",
            softmax="full",
            tied=True,
            training=training,
            loss_memory=loss_memory,
        )

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values, for JSON and for `config_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def plan(self, dim: int, n_items: int) -> BlockPlan:
        """Fit ranks and cutoffs to an embedding size and a catalogue.

        Args:
            dim: size `d` of an item vector.
            n_items: items of the catalogue, padding included.

        Raises:
            CompressionError: a rank above `dim`, or blocks that do not fit the catalogue.
        """
        if self.ranks is not None:
            n_blocks = len(self.ranks)
        elif self.cutoffs is not None:
            n_blocks = len(_inner_cutoffs(self.cutoffs, n_items)) + 1
        else:
            n_blocks = _default_blocks(n_items)
        is_int4 = self.rounding in ("mixed", "int4")
        ranks = self.ranks or _default_ranks(dim, n_blocks, n_items, is_int4)
        if ranks[0] > dim:
            raise CompressionError(
                f"Expected `ranks` to be at most the embedding size {dim}, but got {list(ranks)}."
            )
        if n_items < n_blocks + 1:
            raise CompressionError(
                f"Expected `ranks` to have at most one block for each of the {n_items - 1} items, "
                f"but got {n_blocks} blocks; use fewer ranks."
            )
        return BlockPlan(ranks, self._fitted_cutoffs(n_blocks, n_items), dim)

    def _fitted_cutoffs(self, n_blocks: int, n_items: int) -> tuple[int, ...]:
        if self.cutoffs is None:
            return (*_rows_of_shares(_default_shares(n_blocks, n_items), n_items), n_items)
        inner = _inner_cutoffs(self.cutoffs, n_items)
        if len(inner) != n_blocks - 1:
            raise CompressionError(
                f"Expected `cutoffs` to have {n_blocks - 1} entries below the {n_items} items for "
                f"{n_blocks} ranks, but got {list(self.cutoffs)}."
            )
        return (*inner, n_items)


def _default_blocks(n_items: int) -> int:
    more = max(0, math.floor(2 * math.log2(max(1, n_items - 1) / LARGE_CATALOGUE)))
    return max(1, min(DEFAULT_BLOCKS + more, n_items - 1))


def _default_ranks(dim: int, n_blocks: int, n_items: int, is_int4: bool) -> tuple[int, ...]:
    if n_blocks == 1:
        return (dim,)  # no blocks: nothing is factorised
    shares = INT4_RANK_SHARES if is_int4 else RANK_SHARES
    if n_items - 1 > LARGE_CATALOGUE:
        shares = LARGE_RANK_SHARES
    return tuple(max(1, int(dim * shares[min(j, len(shares) - 1)])) for j in range(n_blocks))


def _default_shares(n_blocks: int, n_items: int) -> list[float]:
    """Where all blocks but the last end, as shares of the items."""
    parts = [j / (n_blocks - 1) for j in range(n_blocks - 1)]
    if n_items - 1 > LARGE_CATALOGUE:
        root = math.sqrt(LARGEST_HEAD / (n_items - 1))
        return [(root + part * (1 - root)) ** 2 for part in parts]
    head = min(LARGEST_HEAD_SHARE, max(HEAD_SHARE, HEAD_ITEMS / (n_items - 1)))
    return [head ** (1 - part) for part in parts]


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size_in_bytes(size: object) -> int | None:
    """A size such as `"2MB"`, `"512 KiB"` or a whole number of bytes, `2e6` too; None where it is
    none of them, or less than a byte."""
    if isinstance(size, float) and size.is_integer():
        size = int(size)
    if is_whole(size):
        return int(size) if size >= 1 else None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", size) if isinstance(size, str) else None
    if not found or found[2].lower() not in _UNITS:
        return None
    return int(float(found[1]) * _UNITS[found[2].lower()]) or None


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(name: str, value: object, lowest: int = 1) -> int:
    """The option `name` as a whole number, `lowest` or more; else a CompressionError."""
    if not is_whole(value) or not lowest <= value < 2**63:
        raise CompressionError(
            f"Expected `{name}` to be a whole number, {lowest} or more, but got {value!r}."
        )
    return int(value)


def check_number(name: str, value: object, words: str, lowest: float, highest: float) -> float:
    """The option `name` as a number within bounds, which `words` say; else a CompressionError."""
    if not is_number(value) or not lowest <= value <= highest:
        raise CompressionError(f"Expected `{name}` to be {words}, but got {value!r}.")
    return float(value)


def is_near(name: str, known: Sequence[str]) -> bool:
    """Whether a name looks like a misspelling of a known one."""
    return bool(difflib.get_close_matches(name, known, n=1, cutoff=0.8))


def reject_unknown(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise a CompressionError for the first name that is not among the known ones."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else "."
            # RecBole's and a model's are a hundred: a list in which the typing error would be lost
            whole = not near or len(known) <= LISTED
            out_of = ", ".join(known) if whole else f"the {len(known)} known"
            raise CompressionError(f"Expected an option out of {out_of}, but got `{name}`{hint}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a CompressionError where the option `name` is none of the texts that it may be."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise CompressionError(
            f"Expected `{name}` to be one of {', '.join(choices)}, but got {value!r}.{hint}"
        )


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise CompressionError(f"Expected `{name}` to be a list of numbers, but got {value!r}.")
    return tuple(value)


def _checked_ranks(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    ranks = _as_tuple("ranks", value)
    if not ranks:
        raise CompressionError("Expected `ranks` to have an entry for each block, but got [].")
    for rank in ranks:
        if not is_whole(rank) or rank < 1:
            raise CompressionError(
                f"Expected `ranks` to be positive whole numbers, but got {list(ranks)}."
            )
    if any(later > earlier for earlier, later in pairwise(ranks)):
        raise CompressionError(
            f"Expected `ranks` not to rise from head to tail, but got {list(ranks)}; popular items "
            "come first and have the highest rank."
        )
    return tuple(int(rank) for rank in ranks)


def _checked_cutoffs(value: object) -> tuple[int, ...] | tuple[float, ...] | None:
    if value is None:
        return None
    cutoffs = _as_tuple("cutoffs", value)
    whole = all(is_whole(c) for c in cutoffs)
    shares = all(isinstance(c, Real) and not isinstance(c, Integral) for c in cutoffs)
    if not (whole or shares):
        raise CompressionError(
            "Expected `cutoffs` to be whole numbers of rows or shares between 0 and 1, but got "
            f"{list(cutoffs)}."
        )
    if any(later <= earlier for earlier, later in pairwise(cutoffs)):
        raise CompressionError(f"Expected `cutoffs` to rise, but got {list(cutoffs)}.")
    if whole:
        if cutoffs and cutoffs[0] < 2:
            raise CompressionError(
                "Expected `cutoffs` to start at 2 or above (the padding row and one item), but got "
                f"{list(cutoffs)}."
            )
        return tuple(int(c) for c in cutoffs)
    if cutoffs and cutoffs[-1] == 1:
        cutoffs = cutoffs[:-1]  # the end of the catalogue, which may be left out
    if not all(0 < c < 1 for c in cutoffs):  # also refuses NaN
        raise CompressionError(
            f"Expected `cutoffs` given as shares to lie between 0 and 1, but got {list(cutoffs)}."
        )
    return tuple(float(c) for c in cutoffs)


def _check_block_count(ranks: Sequence[int], cutoffs: Sequence[float]) -> None:
    allowed = {len(ranks) - 1} if _are_shares(cutoffs) else {len(ranks) - 1, len(ranks)}
    if len(cutoffs) not in allowed:
        raise CompressionError(
            f"Expected `cutoffs` to have {len(ranks) - 1} entries for {len(ranks)} ranks (the end "
            f"of the catalogue may be left out), but got {list(cutoffs)}."
        )


def _are_shares(cutoffs: Sequence[float]) -> bool:
    return any(isinstance(c, float) for c in cutoffs)


def _inner_cutoffs(cutoffs: Sequence[float], n_items: int) -> tuple[int, ...]:
    """The cutoffs before the end of the catalogue, as rows."""
    if _are_shares(cutoffs):
        return _rows_of_shares(cutoffs, n_items)
    rows = tuple(int(c) for c in cutoffs)
    if rows and rows[-1] > n_items:
        raise CompressionError(
            f"Expected `cutoffs` to end at most at the {n_items} items of the catalogue (padding "
            f"included), but got {list(rows)}."
        )
    return rows[:-1] if rows and rows[-1] == n_items else rows


def _rows_of_shares(shares: Sequence[float], n_items: int) -> tuple[int, ...]:
    """Shares of the real items as rows; every block keeps at least one item."""
    rows: list[int] = []
    for j, share in enumerate(shares):
        lowest = rows[-1] + 1 if rows else 2
        highest = n_items - (len(shares) - j)
        rows.append(max(lowest, min(highest, 1 + math.floor(share * (n_items - 1) + 0.5))))
    return tuple(rows)
