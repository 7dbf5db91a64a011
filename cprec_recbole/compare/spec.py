"""What is compared: a YAML file or arguments in, the trials that are needed out."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
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
# what they are does not depend on a ratio
_WITHOUT_RATIO = (UNCOMPRESSED, "int8", "uncompressed-recovered")
_KEYS = (
    *("datasets", "models", "ratios", "seeds", "contenders", "sharing", "settings"),
    *("compression", "learning_rates", "options"),
)
_OWN_OPTIONS = (
    *("seed", "learning_rate", "MAX_ITEM_LIST_LENGTH", "data_path"),
    *("ranks", "cutoffs", "sharing", "softmax", "tied"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_LENGTH = 50  # RecBole's

Record = dict[str, Any]  # what is kept of a trial: its results, or its `error`
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
    def key(self) -> str:
        """Its name, for `--only`."""
        ratio = "" if self.ratio is None else f"_r{self.ratio:g}"
        return f"{self.cell}_{self.contender}{ratio}_s{self.seed}"


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
    """

    cell: Cell
    rows: str
    recipe: Recipe
    options: dict[str, Any]
    rate: float | None
    seed: int
    parent: tuple[str, float] | None = None
    contender: str = field(default="", compare=False)  # that asks for it

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
        own = ("seed", "learning_rate", "MAX_ITEM_LIST_LENGTH", "data_path", "checkpoint_dir")
        return cls(
            datasets={dataset: (config["MAX_ITEM_LIST_LENGTH"],)},
            models=(model,),
            ratios={dataset: (None,)},
            seeds=tuple(first + i for i in range(check_whole("seeds", seeds))),
            contenders=(
                *(UNCOMPRESSED, COMPRESSED, *find_controls(controls)),
                *((STOCK,) if with_stock else ()),
            ),
            compression=own_options(chosen),
            learning_rates=(config["learning_rate"],),
            options={k: v for k, v in given.items() if k not in own},
        )

    def goals(self) -> list[Goal]:
        """All runs that are wanted, the most telling ones first: by seed, then data set, then
        contender."""
        return [
            Goal(Cell(dataset, model, length), name, ratio, seed)
            for seed, (dataset, lengths) in itertools.product(self.seeds, self.datasets.items())
            for name, length, model in itertools.product(self.contenders, lengths, self.models)
            for ratio in ((None,) if self.has_no_ratio(name) else self.ratios[dataset])
        ]

    def has_no_ratio(self, contender: str) -> bool:
        """Whether a contender is the same at every ratio."""
        return contender in (*_WITHOUT_RATIO, STOCK, *self.settings)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        made: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return made

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Spec:
        """The spec of which this is the `as_dict`."""
        made: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        for name in ("datasets", "ratios"):
            made[name] = {key: tuple(values) for key, values in given[name].items()}
        return cls(**made)


@dataclass
class Plan:
    """What the contenders of a cell are.

    Attributes:
        rows: checksum of the interactions.
        asked: what the plan followed from.
        about: of the data: `users`, `items`, `test_cases` and RecBole's `evaluation`.
        contenders: a recipe for each contender at each ratio, or the reason why there is none;
            None: it would be the same model as `compressed`.
    """

    rows: str
    asked: dict[str, Any]
    about: dict[str, Any]
    contenders: dict[tuple[str, Ratio], Recipe | str | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        entries = []
        for (name, ratio), made in self.contenders.items():
            what = {"error": made} if isinstance(made, str) else made and asdict(made)
            entries.append({"contender": name, "ratio": ratio, "made": what})
        return {"rows": self.rows, "asked": self.asked, "about": self.about, "contenders": entries}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Plan:
        """The plan of which this is the `as_dict`."""
        found: dict[tuple[str, Ratio], Recipe | str | None] = {}
        for entry in given["contenders"]:
            made = entry["made"]
            what = made and (made["error"] if "error" in made else Recipe(**made))
            found[entry["contender"], entry["ratio"]] = what
        return cls(given["rows"], given["asked"], given["about"], found)


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
        plans: what contenders are, by the name of their cell.
        command: what asks for it.
    """

    spec: Spec
    plans: dict[str, Plan] = field(default_factory=dict)
    command: str = ""

    def plan_of(self, goal: Goal) -> Recipe | str | None:
        """How a contender is made, or why there can be none; None where it would be the same model
        as `compressed`."""
        return self.plans[str(goal.cell)].contenders[goal.contender, goal.ratio]

    def made(self, goal: Goal) -> Recipe:
        """How a contender is made.

        Raises:
            Failed: there is none.
        """
        made = self.plan_of(goal)
        if not isinstance(made, Recipe):
            raise Failed(made or f"it would be the same model as {COMPRESSED}")
        return made

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
        recipe, parent = self.made(goal), None
        if recipe.is_derived:
            original = goal._replace(contender=UNCOMPRESSED, ratio=None)
            try:
                chosen = self.choose(original, found, partly=partly)
            except Failed as error:
                raise Failed(f"there is no {original.key}: {error}") from None
            if chosen is None:
                return None
            parent = chosen.trial.name, chosen.record["valid"][QUALITY]
        rates: tuple[float | None, ...] = (None,)
        if recipe.has_rate:
            rates = self.spec.learning_rates
        if recipe.has_rate and goal.seed != self.spec.seeds[0]:
            first = self.choose(goal._replace(seed=self.spec.seeds[0]), found, partly=partly)
            if first is None:
                return None
            rates = (first.trial.rate,)
        same = goal.cell, self.plans[str(goal.cell)].rows, recipe, self.spec.options
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
        if len(tried) < len(trials) and not partly:
            return None
        whole = [(trial, record) for trial, record in tried if "error" not in record]
        if not whole and len(tried) == len(trials):
            raise Failed(tried[0][1]["error"])
        if not whole:
            return None
        return Choice(*max(whole, key=lambda pair: pair[1]["valid"][QUALITY]), tried)


def _contenders(names: list[Any], schemes: list[str], settings: dict[str, Any]) -> tuple[str, ...]:
    given = [f"{COMPRESSED}-{scheme}" for scheme in schemes]
    found = [UNCOMPRESSED]  # what all others are measured against
    for name in (str(name) if is_whole(name) else name for name in names):
        if name == ALL:
            found += [COMPRESSED, *CONTROLS]
        elif name in (UNCOMPRESSED, COMPRESSED) or name in settings or scheme_of(str(name)):
            found.append(name)
        else:
            try:
                found += find_controls([str(name)])
            except CompressionError:
                known = [ALL, UNCOMPRESSED, COMPRESSED, *CONTROLS, *settings]
                raise CompressionError(
                    f"Expected `contenders` to be out of {', '.join(known)}, but got {name!r}."
                ) from None
    return tuple(dict.fromkeys([*found, *given, *settings]))


def scheme_of(contender: str) -> str | None:
    """The sharing scheme that a contender `compressed-SCHEME` is given; None for others."""
    scheme = contender.removeprefix(f"{COMPRESSED}-")
    return scheme if scheme in SHARING_SCHEMES and scheme != contender else None


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
    if isinstance(given, str | list):
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


def _ratios(given: dict[str, Any], datasets: tuple[str, ...]) -> dict[str, tuple[Ratio, ...]]:
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
    options = dict(options or {})
    dtype = options.pop("dtype", None)
    if dtype not in (None, "int8"):
        raise CompressionError(
            f"Expected the setting {name} to have `dtype` int8 or none, but got {dtype!r}."
        )
    found = CompressionConfig.from_options(options)
    own = own_options(found)
    for shared in found.as_dict().keys() - own.keys() & options.keys():
        raise CompressionError(
            f"Expected the setting {name} to leave `{shared}` to the study's `options`, as it "
            f"is the same for all contenders, but got {options[shared]!r}."
        )
    return own if dtype is None else {**own, "dtype": dtype}


def _base(options: dict[str, Any]) -> dict[str, Any]:
    reject_unknown(options, ("softmax", "tied", "sharing"))
    CompressionConfig(**options)
    return options
