"""What a study shall run, out of a YAML file; everything is checked before anything runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cprec_recbole.compare.controls import ALL, CONTROLS, DerivedControl, find_controls
from cprec_recbole.compare.results import COMPRESSED, UNCOMPRESSED
from cprec_recbole.compression.budget import checked_ratio
from cprec_recbole.config import (
    SHARING_SCHEMES,
    CompressionConfig,
    CompressionError,
    is_number,
    is_whole,
    reject_unknown,
)
from cprec_recbole.host.library import read_options
from cprec_recbole.models import MODELS

# what they are does not depend on a ratio
WITHOUT_RATIO = (UNCOMPRESSED, "int8", "uncompressed-recovered")
_KEYS = (
    *("datasets", "models", "ratios", "seeds", "contenders", "sharing", "settings"),
    *("compression", "learning_rates", "options"),
)
_OWN_OPTIONS = (
    *("seed", "learning_rate", "MAX_ITEM_LIST_LENGTH", "data_path"),
    *("ranks", "cutoffs", "sharing", "softmax", "tied"),
)
SHARED_OPTIONS = ("training", "loss_memory")  # of a CompressionConfig: the same for all contenders
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_LENGTH = 50  # RecBole's


@dataclass(frozen=True)
class Cell:
    """A model on a data set, and how many items of a history it reads."""

    dataset: str
    model: str
    length: int

    def __str__(self) -> str:
        return f"{self.dataset}_{self.model}_L{self.length}"


@dataclass(frozen=True)
class Goal:
    """One run that is wanted: a contender in a cell, for a ratio or for none, with a seed."""

    cell: Cell
    contender: str
    ratio: float | None
    seed: int

    @property
    def key(self) -> str:
        """Its name, and that of its file."""
        ratio = "" if self.ratio is None else f"_r{self.ratio:g}"
        return f"{self.cell}_{self.contender}{ratio}_s{self.seed}"


@dataclass(frozen=True)
class Spec:
    """A study.

    Attributes:
        datasets: RecBole's names, in the order in which they run, and the lengths of histories.
        models: RecBole's names.
        ratios: how many times fewer parameters, for each data set.
        seeds: with the first one learning rates are searched.
        contenders: in the order in which they run.
        settings: contenders of fixed compression options, by name.
        compression: compression options of the contender `compressed` that no budget chooses.
        learning_rates: tried for each contender that is trained.
        options: RecBole options for all.
    """

    datasets: dict[str, tuple[int, ...]]
    models: tuple[str, ...]
    ratios: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    contenders: tuple[str, ...]
    settings: dict[str, dict[str, Any]]
    compression: dict[str, Any]
    learning_rates: tuple[float, ...]
    options: dict[str, Any]

    @classmethod
    def read(cls, file: str) -> Spec:
        """The study that a YAML file describes.

        Raises:
            CompressionError: no such file, or a part of it that cannot be; it is named.
        """
        given = {str(name): value for name, value in read_options(file, "study").items()}
        reject_unknown(given, _KEYS)
        schemes = _listed(given, "sharing", [], SHARING_SCHEMES)
        settings = {
            str(name) if is_whole(name) else name: value  # as in {8: {ranks: [8]}}
            for name, value in _mapping(given, "settings").items()
        }
        options = _mapping(given, "options")
        for name in _OWN_OPTIONS:
            if name in options:
                raise CompressionError(
                    f"Expected `options` to leave `{name}` to the study, but got "
                    f"{options[name]!r}; see docs/comparing.md for where it is said."
                )
        names = _listed(given, "contenders", [ALL])
        datasets = _datasets(given.get("datasets", {"ml-100k": _LENGTH}))
        return cls(
            datasets=datasets,
            models=tuple(
                _listed(given, "models", ["SASRec"], [model.spec.name for model in MODELS])
            ),
            ratios=_ratios(given, tuple(datasets)),
            seeds=_seeds(_listed(given, "seeds", [2020])),
            contenders=_contenders(names, schemes, settings),
            settings={name: _setting(name, value) for name, value in settings.items()},
            compression=_base(_mapping(given, "compression")),
            learning_rates=_rates(_listed(given, "learning_rates", [1e-3])),
            options=options,
        )

    def goals(self) -> Iterator[Goal]:
        """All runs that are wanted, the most telling ones first: by seed, then data set, then
        contender."""
        for seed, (dataset, lengths) in itertools.product(self.seeds, self.datasets.items()):
            for name, length, model in itertools.product(self.contenders, lengths, self.models):
                for ratio in self.ratios[dataset] if name in self.with_ratio else (None,):
                    yield Goal(Cell(dataset, model, length), name, ratio, seed)

    @property
    def with_ratio(self) -> tuple[str, ...]:
        """The contenders that are made for each ratio."""
        without = (*WITHOUT_RATIO, *self.settings)
        return tuple(name for name in self.contenders if name not in without)

    def rates(self, contender: str) -> tuple[float | None, ...]:
        """The learning rates that are tried for a contender; one None where none is trained."""
        control = CONTROLS.get(contender)
        if isinstance(control, DerivedControl) and not control.searches_rate:
            return (None,)
        return self.learning_rates

    def must_agree(self) -> dict[str, Any]:
        """What has to be the same for runs to stand in one folder."""
        return {
            "options": self.options,
            "learning_rates": list(self.learning_rates),
            "first seed": self.seeds[0],
            "compression": self.compression,
            **{f"settings: {name}": options for name, options in self.settings.items()},
        }


def own_options(compression: CompressionConfig) -> dict[str, Any]:
    """The compression options in which contenders may differ; the others are RecBole options of
    the study."""
    found = compression.as_dict()
    return {name: value for name, value in found.items() if name not in SHARED_OPTIONS}


def is_derived(contender: str) -> bool:
    """Whether a contender is made of the trained uncompressed model."""
    return isinstance(CONTROLS.get(contender), DerivedControl)


def scheme_of(contender: str) -> str | None:
    """The sharing scheme that a contender `compressed-SCHEME` is given; None for others."""
    scheme = contender.removeprefix(f"{COMPRESSED}-")
    return scheme if scheme in SHARING_SCHEMES and scheme != contender else None


def _contenders(names: list[Any], schemes: list[str], settings: dict[str, Any]) -> tuple[str, ...]:
    own = [UNCOMPRESSED, COMPRESSED]
    given = [f"{COMPRESSED}-{scheme}" for scheme in schemes]
    found = [UNCOMPRESSED]  # what all others are measured against
    for name in (str(name) if is_whole(name) else name for name in names):
        if name == ALL:
            found += [*own, *(control.name for control in find_controls([ALL]))]
        elif name in own or name in settings or scheme_of(str(name)):
            found.append(name)
        else:
            try:
                found.append(find_controls([str(name)])[0].name)
            except CompressionError:
                known = [ALL, *own, *CONTROLS, *settings]
                raise CompressionError(
                    f"Expected `contenders` to be out of {', '.join(known)}, but got {name!r}."
                ) from None
    return tuple(dict.fromkeys([*found, *given, *settings]))


def _listed(given: dict[str, Any], name: str, default: list[Any], known: Any = None) -> list[Any]:
    values = given.get(name, default)
    values = values if isinstance(values, list) else [values]
    for value in values:
        if isinstance(value, list | dict):
            raise CompressionError(
                f"Expected `{name}` to be a list of values, but it has {value!r}."
            )
        if known is not None and value not in known:
            raise CompressionError(
                f"Expected `{name}` to be out of {', '.join(known)}, but got {value!r}."
            )
    if default and not values:
        raise CompressionError(f"Expected `{name}` to have one value at least, but got none.")
    return list(dict.fromkeys(values))


def _mapping(given: dict[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name) or {}
    if not isinstance(value, dict):
        raise CompressionError(f"Expected `{name}` to hold names and values, but got {value!r}.")
    return value


def _datasets(given: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list):
        given = dict.fromkeys(_listed({"datasets": given}, "datasets", [None]), _LENGTH)
    if not isinstance(given, dict) or not given:
        raise CompressionError(
            f"Expected `datasets` to be names, or names and lengths, but got {given!r}."
        )
    found = {}
    for name, lengths in given.items():
        lengths = lengths if isinstance(lengths, list) else [lengths]
        if not _NAME.fullmatch(str(name)) or not lengths:
            raise CompressionError(
                f"Expected `datasets` to hold names of letters, digits, `-` and `.`, each with a "
                f"length, but got {name!r}: {lengths!r}."
            )
        for length in lengths:
            if not is_whole(length) or length < 1:
                raise CompressionError(
                    f"Expected `datasets` to give {name} a length of 1 or more, but got {length!r}."
                )
        found[str(name)] = tuple(dict.fromkeys(lengths))
    return found


def _ratios(given: dict[str, Any], datasets: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Ratios for each data set: the same for all, or by name."""
    by_name = given.get("ratios")
    if not isinstance(by_name, dict):
        by_name = dict.fromkeys(datasets, by_name if "ratios" in given else [4])
    if set(by_name) != set(datasets):
        raise CompressionError(
            f"Expected `ratios` to be a list, or a list for each of {', '.join(datasets)}, but got "
            f"{', '.join(str(name) for name in by_name)}."
        )
    found = {name: _listed({"ratios": by_name[name]}, "ratios", [4]) for name in datasets}
    checked = {name: [checked_ratio(r, "ratios") for r in each] for name, each in found.items()}
    # those that have one name are one
    return {name: tuple({f"{r:g}": r for r in each}.values()) for name, each in checked.items()}


def _seeds(seeds: list[Any]) -> tuple[int, ...]:
    for seed in seeds:
        if not is_whole(seed) or not 0 <= seed < 2**32:  # as NumPy takes them
            raise CompressionError(
                f"Expected `seeds` to be whole numbers from 0 to {2**32 - 1}, but got {seed!r}."
            )
    return tuple(seeds)


def _rates(rates: list[Any]) -> tuple[float, ...]:
    for rate in rates:
        if not is_number(rate) or not 0 < rate < 1:
            raise CompressionError(
                f"Expected `learning_rates` to be numbers between 0 and 1, but got {rate!r}."
            )
    return tuple(float(rate) for rate in rates)


def _setting(name: Any, options: Any) -> dict[str, Any]:
    taken = [UNCOMPRESSED, COMPRESSED, ALL, *CONTROLS]
    taken += [f"{COMPRESSED}-{scheme}" for scheme in SHARING_SCHEMES]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in taken:
        raise CompressionError(
            "Expected `settings` to have names of letters, digits, `-` and `.` that no other "
            f"contender has, but got {name!r}."
        )
    if not isinstance(options or {}, dict):
        raise CompressionError(
            f"Expected the setting {name} to hold options such as {{ranks: [64, 16, 4]}}, but got "
            f"{options!r}."
        )
    for shared in SHARED_OPTIONS:
        if shared in (options or {}):
            raise CompressionError(
                f"Expected the setting {name} to leave `{shared}` to the study's `options`, as it "
                f"is the same for all contenders, but got {options[shared]!r}."
            )
    options = dict(options or {})
    dtype = options.pop("dtype", None)
    if dtype not in (None, "int8"):
        raise CompressionError(
            f"Expected the setting {name} to have `dtype` int8 or none, but got {dtype!r}."
        )
    own = own_options(CompressionConfig.from_options(options))
    return own if dtype is None else {**own, "dtype": dtype}


def _base(options: dict[str, Any]) -> dict[str, Any]:
    reject_unknown(options, ("softmax", "tied", "sharing"))
    CompressionConfig(**options)
    return options
