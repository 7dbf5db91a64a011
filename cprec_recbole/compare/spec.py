"""What is compared: a YAML file or arguments in, the trials that are needed out."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cprec_recbole.compare.contenders import (
    ALL,
    COMPRESSED,
    CONTROLS,
    STOCK,
    UNCOMPRESSED,
    Recipe,
    find_controls,
    own_options,
)
from cprec_recbole.compression.budget import checked_ratio
from cprec_recbole.config import (
    SHARING_SCHEMES,
    CompressionConfig,
    CompressionError,
    check_whole,
    is_number,
    is_whole,
    reject_unknown,
)
from cprec_recbole.host.library import known_options, read_options, recbole_config
from cprec_recbole.models import MODELS

SETTINGS = Path(__file__).with_name("settings.yaml")  # what RecBole is asked unless told otherwise
QUALITY = "ndcg@20"  # what contenders are judged by
_WITHOUT_RATIO = (UNCOMPRESSED, "int8", "uncompressed-recovered", STOCK)
_KEYS = (
    *("datasets", "models", "ratios", "seeds", "contenders", "sharing", "settings"),
    *("compression", "learning_rates", "options"),
)
_OWN_OPTIONS = ("seed", "learning_rate", "MAX_ITEM_LIST_LENGTH", "data_path")
_COMPRESSION = ("ranks", "cutoffs", "sharing", "softmax", "tied")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_LENGTH = 50  # RecBole's

Record = dict[str, Any]  # what is kept of a trial: its results, or its `error`
Plan = dict[str, Any]  # what the contenders of a cell are, see Study
Ratio = float | None


class Cell(NamedTuple):
    """A model on a data set, and how many items of a history it reads."""

    dataset: str
    model: str
    length: int

    def __str__(self) -> str:
        return f"{self.dataset}_{self.model}_L{self.length}"


class Goal(NamedTuple):
    """A run that is wanted: a contender in a cell, for a ratio or for none, with a seed."""

    cell: Cell
    contender: str
    ratio: Ratio
    seed: int

    @property
    def name(self) -> str:
        """Contender and ratio."""
        return self.contender + ("" if self.ratio is None else f"_r{self.ratio:g}")

    @property
    def key(self) -> str:
        """All of it, for `--only`."""
        return f"{self.cell}_{self.name}_s{self.seed}"


@dataclass(frozen=True)
class Trial:
    """One training, or one thing made of a trained model, and all that determines it.

    Attributes:
        cell: where it is trained.
        rows: checksum of the interactions.
        recipe: how it is made.
        options: RecBole's, the same for all contenders.
        rate: learning rate; None where nothing is trained.
        seed: of the training.
        parent: what it is made of: the name of that trial, and what it reached on validation,
            since another machine may reach something else; None for what starts afresh.
        contender: that asks for it; not part of its name.
    """

    cell: Cell
    rows: str
    recipe: Recipe
    options: dict[str, Any]
    rate: float | None
    seed: int
    parent: tuple[str, float] | None = None
    contender: str = ""

    @property
    def name(self) -> str:
        """Its name and that of its file; equal trials have equal names, whoever asks for them."""
        content = json.dumps({**asdict(self), "contender": ""}, sort_keys=True, default=str)
        rate = "" if self.rate is None else f"_lr{self.rate:g}"
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        return f"{self.cell}_{self.recipe.kind}-{digest}{rate}_s{self.seed}"

    @property
    def words(self) -> str:
        """What is being done, for a display."""
        rate = "" if self.rate is None else f" rate {self.rate:g}"
        where = f"{self.cell.dataset} {self.cell.model} L{self.cell.length}"
        return f"{where} {self.contender}{rate} seed {self.seed}"


@dataclass(frozen=True)
class Spec:
    """What is asked for.

    Attributes:
        datasets: RecBole's names, in the order in which they run, and the lengths of histories.
        models: RecBole's names.
        ratios: how many times fewer parameters, for each data set; None: `compression` says what
            the contender `compressed` is.
        seeds: with the first one learning rates are searched.
        contenders: in the order in which they run.
        settings: contenders of fixed compression options, by name.
        compression: compression options of the contender `compressed` that no budget chooses.
        learning_rates: tried for each contender that is trained.
        options: RecBole options for all.
    """

    datasets: dict[str, tuple[int, ...]]
    models: tuple[str, ...]
    ratios: dict[str, tuple[Ratio, ...]]
    seeds: tuple[int, ...]
    contenders: tuple[str, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    compression: dict[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-3,)
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str) -> Spec:
        """The study that a YAML file describes.

        Raises:
            CompressionError: no such file, or a part of it that cannot be; it is named.
        """
        given = {str(name): value for name, value in read_options(file, "study").items()}
        reject_unknown(given, _KEYS)
        models = [model.spec.name for model in MODELS]
        seed_text = f"whole numbers from 0 to {2**32 - 1}"  # as NumPy takes them
        schemes = _values(given, "sharing", [], *_out_of(SHARING_SCHEMES))
        settings = {
            str(name) if is_whole(name) else name: value  # as in {8: {ranks: [8]}}
            for name, value in _mapping(given, "settings").items()
        }
        options = _mapping(given, "options")
        for name in options.keys() & {*_OWN_OPTIONS, *_COMPRESSION}:
            raise CompressionError(
                f"Expected `options` to leave `{name}` to the study, but got {options[name]!r}; "
                "see docs/comparing.md for where it is said."
            )
        rates = _values(
            *(given, "learning_rates", [1e-3], "numbers between 0 and 1"),
            lambda rate: is_number(rate) and 0 < rate < 1,
        )
        compression = _mapping(given, "compression")
        reject_unknown(compression, ("softmax", "tied", "sharing"))
        CompressionConfig(**compression)
        datasets = _datasets(given.get("datasets", {"ml-100k": _LENGTH}))
        names = _values(given, "contenders", [ALL])
        return cls(
            datasets=datasets,
            models=_values(given, "models", ["SASRec"], *_out_of(models)),
            ratios=_ratios(given, datasets),
            seeds=_values(
                *(given, "seeds", [2020], seed_text),
                lambda seed: is_whole(seed) and 0 <= seed < 2**32,
            ),
            contenders=_contenders(names, schemes, settings),
            settings={name: _setting(name, value) for name, value in settings.items()},
            compression=compression,
            learning_rates=tuple(map(float, rates)),
            options=options,
        )

    @classmethod
    def single(
        cls,
        model: str,
        dataset: str,
        compression: CompressionConfig | None = None,
        *,
        controls: Sequence[str] = (),
        with_stock: bool = False,
        seeds: int = 1,
        options: dict[str, Any] | None = None,
        config_files: Sequence[str] = (),
    ) -> Spec:
        """The comparison of one model on one data set.

        Args:
            model: RecBole's name of it.
            dataset: RecBole's name.
            compression: of the contender `compressed`; its objective is that of all.
            controls: further contenders, by name; `all` for every one.
            with_stock: also RecBole's own model, dataset and objective.
            seeds: how many; they count up from RecBole's `seed`.
            options: RecBole's, for all contenders.
            config_files: RecBole's YAML files, which may hold options of other models too; the
                options win over them.

        Raises:
            CompressionError: an option that RecBole does not know or refuses.
        """
        chosen = CompressionConfig() if compression is None else compression
        given = {"training": chosen.training, "loss_memory": chosen.loss_memory, **(options or {})}
        config = recbole_config(f"Cp{model}", dataset, given, [str(SETTINGS), *config_files])
        known = {*known_options(config)} - {"model", "dataset", *CompressionConfig.option_names()}
        for file in reversed(config_files):
            given = {k: v for k, v in read_options(file).items() if k in known} | given
        first = check_whole("seed", config["seed"], 0)
        own = (*_OWN_OPTIONS, "checkpoint_dir")
        return cls(
            datasets={dataset: (config["MAX_ITEM_LIST_LENGTH"],)},
            models=(model,),
            ratios={dataset: (None,)},
            seeds=tuple(first + i for i in range(check_whole("seeds", seeds))),
            contenders=(UNCOMPRESSED, COMPRESSED, *find_controls(controls), *[STOCK] * with_stock),
            compression=own_options(chosen),
            learning_rates=(config["learning_rate"],),
            options={k: v for k, v in given.items() if k not in own},
        )

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Spec:
        """The spec that `dataclasses.asdict` and JSON made this of."""
        made: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        for name in ("datasets", "ratios"):
            made[name] = {key: tuple(values) for key, values in given[name].items()}
        return cls(**made)

    @property
    def is_single(self) -> bool:
        """Whether it is the comparison of one model on one data set, without ratios."""
        return list(self.ratios.values()) == [(None,)]

    def goals(self) -> list[Goal]:
        """All runs that are wanted, the most telling ones first: by seed, then data set, then
        contender."""
        without = (*_WITHOUT_RATIO, *self.settings)
        return [
            Goal(Cell(dataset, model, length), name, ratio, seed)
            for seed, (dataset, lengths) in itertools.product(self.seeds, self.datasets.items())
            for name, length, model in itertools.product(self.contenders, lengths, self.models)
            for ratio in ((None,) if name in without else self.ratios[dataset])
        ]


class Failed(Exception):
    """Why there is no run of a goal."""


class Choice(NamedTuple):
    """The trial that is a contender's run, what was found, and all that were tried for it."""

    trial: Trial
    record: Record
    tried: list[tuple[Trial, Record]]


@dataclass
class Study:
    """A spec and the plans of its cells: which trials are needed, and which of them count.

    Nothing is chosen for good: each answer is computed from the trials that were found.

    Attributes:
        spec: what is asked for.
        plans: of each cell, by its name: `rows`, a checksum of the interactions; `asked`, what the
            plan followed from; `about`, of the data; `contenders`, by `Goal.name` the fields of a
            Recipe, or a text, why there is none, or None for the same model as `compressed`.
        command: what asks for it.
    """

    spec: Spec
    plans: dict[str, Plan] = field(default_factory=dict)
    command: str = ""

    def recipe(self, goal: Goal) -> Recipe:
        """How a contender is made.

        Raises:
            Failed: there is none.
        """
        made = self.plans[str(goal.cell)]["contenders"][goal.name]
        if not isinstance(made, dict):
            raise Failed(made or f"it would be the same model as {COMPRESSED}")
        return Recipe(**made)

    def trials(
        self, goal: Goal, found: Mapping[str, Record], *, partly: bool = False
    ) -> list[Trial] | None:
        """The trials of which the best on validation is the run: one for each learning rate with
        the first seed, one at the best rate with the others.

        Args:
            goal: the run.
            found: records by the names of their trials.
            partly: the best is that of the trials that are there; else all have to be.

        Returns:
            None where trials that come first are not there yet.

        Raises:
            Failed: there can be no run.
        """
        recipe, parent = self.recipe(goal), None
        if recipe.is_derived:
            original = goal._replace(contender=UNCOMPRESSED, ratio=None)
            try:
                chosen = self.choose(original, found, partly=partly)
            except Failed as error:
                raise Failed(f"there is no {original.key}: {error}") from None
            if chosen is None:
                return None
            parent = chosen.trial.name, chosen.record["valid"][QUALITY]
        rates: Sequence[float | None] = self.spec.learning_rates if recipe.has_rate else (None,)
        if recipe.has_rate and goal.seed != self.spec.seeds[0]:
            first = self.choose(goal._replace(seed=self.spec.seeds[0]), found, partly=partly)
            if first is None:
                return None
            rates = (first.trial.rate,)
        same = goal.cell, self.plans[str(goal.cell)]["rows"], recipe, self.spec.options
        return [Trial(*same, rate, goal.seed, parent, goal.contender) for rate in rates]

    def choose(
        self, goal: Goal, found: Mapping[str, Record], *, partly: bool = False
    ) -> Choice | None:
        """The best on validation of a run's trials, of equal ones the first; None where they are
        not all there (`partly`: where none is).

        Raises:
            Failed: no trial came to anything.
        """
        trials = self.trials(goal, found, partly=partly)
        if trials is None:
            return None
        tried = [(trial, found[trial.name]) for trial in trials if trial.name in found]
        whole = [(trial, record) for trial, record in tried if "error" not in record]
        if not whole and len(tried) == len(trials):
            raise Failed(tried[0][1]["error"])
        if not whole or (len(tried) < len(trials) and not partly):
            return None
        return Choice(*max(whole, key=lambda pair: pair[1]["valid"][QUALITY]), tried)


def scheme_of(contender: str) -> str | None:
    """The sharing scheme that a contender `compressed-SCHEME` is given; None for others."""
    scheme = contender.removeprefix(f"{COMPRESSED}-")
    return scheme if scheme in SHARING_SCHEMES and scheme != contender else None


def _contenders(names: Sequence[Any], schemes: Sequence[str], settings: Any) -> tuple[str, ...]:
    found = [UNCOMPRESSED]  # what all others are measured against
    known = (UNCOMPRESSED, COMPRESSED, *CONTROLS, *settings)
    for name in (str(name) if is_whole(name) else name for name in names):
        if name not in (ALL, *known) and not scheme_of(str(name)):
            raise CompressionError(
                f"Expected `contenders` to be out of {', '.join((ALL, *known))}, but got {name!r}."
            )
        found += [COMPRESSED, *CONTROLS] if name == ALL else [name]
    given = [f"{COMPRESSED}-{scheme}" for scheme in schemes]
    return tuple(dict.fromkeys([*found, *given, *settings]))


def _out_of(known: Sequence[str]) -> tuple[str, Callable[[Any], bool]]:
    return f"out of {', '.join(known)}", lambda value: value in known


def _values(
    given: dict[str, Any],
    name: str,
    default: list[Any],
    expected: str = "",
    is_one: Callable[[Any], bool] = lambda value: True,
) -> tuple[Any, ...]:
    """The values of a key, each once: a list, or one alone."""
    values = given.get(name, default)
    values = values if isinstance(values, list) else [values]
    for value in values:
        if isinstance(value, list | dict):
            raise CompressionError(
                f"Expected `{name}` to be a list of values, but it has {value!r}."
            )
        if not is_one(value):
            raise CompressionError(f"Expected `{name}` to be {expected}, but got {value!r}.")
    if default and not values:
        raise CompressionError(f"Expected `{name}` to have one value at least, but got none.")
    return tuple(dict.fromkeys(values))


def _mapping(given: dict[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name) or {}
    if not isinstance(value, dict):
        raise CompressionError(f"Expected `{name}` to hold names and values, but got {value!r}.")
    return value


def _datasets(given: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(given, str | list):
        given = dict.fromkeys(_values({"datasets": given}, "datasets", [None]), _LENGTH)
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


def _ratios(given: dict[str, Any], datasets: Mapping[str, Any]) -> dict[str, tuple[Ratio, ...]]:
    """Ratios for each data set: the same for all, or by name."""
    by_name = given.get("ratios", [4])
    by_name = by_name if isinstance(by_name, dict) else dict.fromkeys(datasets, by_name)
    if set(by_name) != set(datasets):
        raise CompressionError(
            f"Expected `ratios` to be a list, or a list for each of {', '.join(datasets)}, but got "
            f"{', '.join(str(name) for name in by_name)}."
        )
    found: dict[str, tuple[Ratio, ...]] = {}
    for name in datasets:
        ratios = [
            checked_ratio(r, "ratios") for r in _values({"ratios": by_name[name]}, "ratios", [4])
        ]
        found[name] = tuple({f"{r:g}": r for r in ratios}.values())  # of one name are one
    return found


def _setting(name: Any, options: Any) -> dict[str, Any]:
    taken = (UNCOMPRESSED, COMPRESSED, ALL, *CONTROLS)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in taken or scheme_of(name):
        raise CompressionError(
            "Expected `settings` to have names of letters, digits, `-` and `.` that no other "
            f"contender has, but got {name!r}."
        )
    if not isinstance(options or {}, dict):
        raise CompressionError(
            f"Expected the setting {name} to hold options such as {{ranks: [64, 16, 4]}}, but got "
            f"{options!r}."
        )
    options = dict(options or {})
    dtype = options.pop("dtype", None)
    if dtype not in (None, "int8"):
        raise CompressionError(
            f"Expected the setting {name} to have `dtype` int8 or none, but got {dtype!r}."
        )
    own = own_options(CompressionConfig.from_options(options))
    # how a contender is trained may differ, what it is trained for may not
    own |= {n: options[n] for n in ("negatives", "negatives_power") if n in options}
    for shared in options.keys() - own.keys():
        raise CompressionError(
            f"Expected the setting {name} to leave `{shared}` to the study's `options`, as it "
            f"is the same for all contenders, but got {options[shared]!r}."
        )
    return own if dtype is None else {**own, "dtype": dtype}
