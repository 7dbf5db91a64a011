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

from cprec_recbole.compare import contenders
from cprec_recbole.compare.contenders import ALL, COMPRESSED, STOCK, UNCOMPRESSED, Recipe
from cprec_recbole.compression.budget import checked_ratio
from cprec_recbole.config import (
    ROUNDINGS,
    SHARING_SCHEMES,
    CompressionConfig,
    CompressionError,
    check_choice,
    check_whole,
    is_number,
    is_whole,
    reject_unknown,
)
from cprec_recbole.host.library import known_options, read_options, recbole_config
from cprec_recbole.models import MODELS

SETTINGS = Path(__file__).with_name("settings.yaml")  # what RecBole is asked unless told otherwise
QUALITY = "ndcg@20"  # what contenders are judged by
_WITHOUT_RATIO = (UNCOMPRESSED, "int8", "int4", "uncompressed-recovered", STOCK)
_OWN_OPTIONS = ("seed", "learning_rate", "MAX_ITEM_LIST_LENGTH", "data_path")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_NAMES = "names of letters, digits, `-` and `.`"
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

    @property
    def label(self) -> str:
        """What texts call it."""
        return f"{self.model} on {self.dataset}, length {self.length}"


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
    def label(self) -> str:
        """The same as tables and pictures have it."""
        return self.contender + ("" if self.ratio is None else f" ÷\u00a0{self.ratio:g}")

    @property
    def key(self) -> str:
        """All of it, for `--only`."""
        return f"{self.cell}_{self.name}_s{self.seed}"

    @property
    def original(self) -> Goal:
        """The uncompressed model of its cell and seed."""
        return self._replace(contender=UNCOMPRESSED, ratio=None)


@dataclass(frozen=True)
class Trial:
    """One training, or one thing made of a trained model, and all that determines it."""

    cell: Cell
    rows: str  # checksum of the interactions
    recipe: Recipe
    options: dict[str, Any]  # RecBole's, the same for all contenders
    rate: float | None  # None where nothing is trained
    seed: int
    # what it is made of: the name of that trial, and what that reached on validation, as another
    # machine may reach something else
    parent: tuple[str, float] | None = None
    contender: str = ""  # that asks for it; not part of the name

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
    """What is asked for; data sets and contenders in the order in which they run."""

    datasets: dict[str, tuple[int, ...]]  # RecBole's names, and lengths of histories
    models: tuple[str, ...]
    # how many times fewer parameters, for each data set; None: `compression` says it all
    ratios: dict[str, tuple[Ratio, ...]]
    seeds: tuple[int, ...]  # with the first one learning rates are searched
    contenders: tuple[str, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # contenders' own options
    compression: dict[str, Any] = field(default_factory=dict)  # of `compressed`, beside a ratio
    learning_rates: tuple[float, ...] = (1e-3,)
    options: dict[str, Any] = field(default_factory=dict)  # RecBole's, for all

    @classmethod
    def read(cls, file: str) -> Spec:
        """The study that a YAML file describes; a CompressionError for no such file, or a part of
        it that cannot be, which it names."""
        given = read_options(file, "study")
        reject_unknown(given, (*cls.__dataclass_fields__, "sharing"))
        options, compression = (_mapping(given, name) for name in ("options", "compression"))
        reject_unknown(compression, ("softmax", "tied", "sharing"))
        base = CompressionConfig(**compression)
        for name in options.keys() & {*_OWN_OPTIONS, *contenders.own_options(base)}:
            hint = "; see docs/comparing.md for where it is said."
            raise _error(f"`options` to leave `{name}` to the study", options[name], hint)
        settings = {  # a number is a name too, as in {8: {ranks: [8]}}
            str(name) if is_whole(name) else name: value
            for name, value in _mapping(given, "settings").items()
        }
        seeds = _values(given, "seeds", [2020])
        for seed in (seed for seed in seeds if not is_whole(seed) or not 0 <= seed < 2**32):
            raise _error(f"`seeds` to be whole numbers from 0 to {2**32 - 1}", seed)  # NumPy's
        rates = _values(given, "learning_rates", [1e-3])
        for rate in (rate for rate in rates if not is_number(rate) or not 0 < rate < 1):
            raise _error("`learning_rates` to be numbers between 0 and 1", rate)
        datasets = _datasets(given.get("datasets", {"ml-100k": _LENGTH}))
        return cls(
            datasets=datasets,
            models=_values(given, "models", ["SASRec"], [model.spec.name for model in MODELS]),
            ratios=_ratios(given, datasets),
            seeds=seeds,
            contenders=_contenders(given, settings),
            settings={name: _setting(name, value) for name, value in settings.items()},
            compression=compression,
            learning_rates=rates,
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
        """The comparison of one model on one data set, by RecBole's names; a CompressionError for
        an option that RecBole does not know or refuses.

        Args:
            compression: of the contender `compressed`; its objective is that of all.
            controls: further contenders, by name; `all` for every one.
            with_stock: also RecBole's own model, dataset and objective.
            seeds: how many; they count up from RecBole's `seed`.
            options: RecBole's, for all contenders; they win over its YAML files, `config_files`,
                which may hold options of other models too.
        """
        chosen = CompressionConfig() if compression is None else compression
        given = {"training": chosen.training, "loss_memory": chosen.loss_memory, **(options or {})}
        config = recbole_config(f"Cp{model}", dataset, given, [str(SETTINGS), *config_files])
        known = {*known_options(config)} - {"model", "dataset", *CompressionConfig.option_names()}
        for file in reversed(config_files):
            given = {k: v for k, v in read_options(file).items() if k in known} | given
        first = check_whole("seed", config["seed"], 0)
        others = [*contenders.find_controls(controls), *[STOCK] * with_stock]
        return cls(
            datasets={dataset: (config["MAX_ITEM_LIST_LENGTH"],)},
            models=(model,),
            ratios={dataset: (None,)},
            seeds=tuple(first + i for i in range(check_whole("seeds", seeds))),
            contenders=(UNCOMPRESSED, COMPRESSED, *others),
            compression=contenders.own_options(chosen),
            learning_rates=(config["learning_rate"],),
            options={k: v for k, v in given.items() if k not in (*_OWN_OPTIONS, "checkpoint_dir")},
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


@dataclass
class State:
    """How far a run is, by the trials that were found."""

    tried: list[tuple[Trial, Record]] = field(default_factory=list)  # its own that are there
    missing: list[Trial] = field(default_factory=list)  # that come next, for what it needs first
    best: tuple[Trial, Record] | None = None  # the trial that is the run; None: not known yet
    error: str | None = None  # why there can be none


@dataclass
class Study:
    """A spec and the plans of its cells: which trials are needed, and which of them count.
    Nothing is chosen for good: each answer is computed from the trials that were found."""

    spec: Spec
    # of each cell, by its name: `rows`, a checksum of the interactions; `asked`, what the plan
    # followed from; `about`, of the data; `contenders`, by `Goal.name` the fields of a Recipe, or a
    # text, why there is none, or None for the same model as `compressed`
    plans: dict[str, dict[str, Any]]
    command: str = ""  # what asks for it

    def made(self, goal: Goal, default: Any = None) -> Any:
        """What the plan says of a contender, see `plans`; the default where there is no plan."""
        plan = self.plans.get(str(goal.cell), {"contenders": {}})
        return plan["contenders"].get(goal.name, default)

    def state(self, goal: Goal, found: Mapping[str, Record], *, partly: bool = False) -> State:
        """How far a run is, by the records of trials. It is the best on validation, of equal ones
        the first, of its trials, which all have to be there unless `partly`: one for each learning
        rate with the first seed, one at the best rate with the others."""
        made, parent = self.made(goal), None
        if not isinstance(made, dict):
            return State(error=made or f"it would be the same model as {COMPRESSED}")
        recipe = Recipe(**made)
        rates: tuple[float | None, ...] = (None,)
        if recipe.is_derived:
            whole = self.state(goal.original, found, partly=partly)
            if whole.error is not None:
                return State(error=f"there is no {goal.original.key}: {whole.error}")
            if whole.best is None:
                return State(missing=whole.missing)
            parent = whole.best[0].name, whole.best[1]["valid"][QUALITY]
        if recipe.has_rate and goal.seed == self.spec.seeds[0]:
            rates = self.spec.learning_rates
        elif recipe.has_rate:
            first = self.state(goal._replace(seed=self.spec.seeds[0]), found, partly=partly)
            if first.best is None:
                return State(missing=first.missing, error=first.error)
            rates = (first.best[0].rate,)
        same = goal.cell, self.plans[str(goal.cell)]["rows"], recipe, self.spec.options
        trials = [Trial(*same, rate, goal.seed, parent, goal.contender) for rate in rates]
        tried = [(trial, found[trial.name]) for trial in trials if trial.name in found]
        missing = [trial for trial in trials if trial.name not in found]
        ended = [(trial, record) for trial, record in tried if "error" not in record]
        if not ended:
            return State(tried, missing, error=None if missing else tried[0][1]["error"])
        best = max(ended, key=lambda pair: pair[1]["valid"][QUALITY])
        return State(tried, missing, best if partly or not missing else None)


def scheme_of(contender: str) -> str | None:
    """The sharing scheme that a contender `compressed-SCHEME` is given; None for others."""
    scheme = contender.removeprefix(f"{COMPRESSED}-")
    return scheme if scheme in SHARING_SCHEMES and scheme != contender else None


def _error(expected: str, got: object, hint: str = ".") -> CompressionError:
    return CompressionError(f"Expected {expected}, but got {got!r}{hint}")


def _values(
    given: Mapping[str, Any], name: str, default: Sequence[Any] = (), choices: Sequence[str] = ()
) -> tuple[Any, ...]:
    """The values of a key, each once: a list, or one alone."""
    values = given.get(name, default)
    values = values if isinstance(values, list) else [values]
    for value in values:
        if isinstance(value, list | dict):
            raise _error(f"`{name}` to be a list of values", values)
        if choices:
            check_choice(name, value, choices)
    if not values:
        raise _error(f"`{name}` to have one value at least", values)
    return tuple(dict.fromkeys(values))


def _mapping(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name) or {}
    if not isinstance(value, dict):
        raise _error(f"`{name}` to hold names and values", value)
    return value


def _contenders(given: Mapping[str, Any], settings: Mapping[Any, Any]) -> tuple[str, ...]:
    """All of them, first the uncompressed model, which all others are measured against."""
    known = [ALL, UNCOMPRESSED, COMPRESSED, *contenders.CONTROLS, *map(str, settings)]
    found = []
    for name in map(str, _values(given, "contenders", [ALL])):
        if scheme_of(name) is None:
            check_choice("contenders", name, known)
        found += [COMPRESSED, *contenders.CONTROLS] if name == ALL else [name]
    schemes = _values(given, "sharing", (), SHARING_SCHEMES) if given.get("sharing") else ()
    found += [f"{COMPRESSED}-{scheme}" for scheme in schemes]
    return tuple(dict.fromkeys([UNCOMPRESSED, *found, *settings]))


def _datasets(given: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(given, str | list):
        given = dict.fromkeys(_values({"datasets": given}, "datasets"), _LENGTH)
    if not isinstance(given, dict) or not given:
        raise _error("`datasets` to be names, or names and lengths", given)
    found = {}
    for name, lengths in given.items():
        lengths = lengths if isinstance(lengths, list) else [lengths]
        are_whole = all(is_whole(length) and length > 0 for length in lengths)
        if not _NAME.fullmatch(str(name)) or not lengths or not are_whole:
            expected = f"`datasets` to hold {_NAMES}, each with a length of 1 or more"
            raise _error(expected, {name: lengths})
        found[str(name)] = tuple(dict.fromkeys(lengths))
    return found


def _ratios(given: Mapping[str, Any], datasets: Mapping[str, Any]) -> dict[str, tuple[Ratio, ...]]:
    """Ratios for each data set: the same for all, or by name."""
    by_name = given.get("ratios", [4])
    by_name = by_name if isinstance(by_name, dict) else dict.fromkeys(datasets, by_name)
    if set(by_name) != set(datasets):
        expected = f"`ratios` to be a list, or a list for each of {', '.join(datasets)}"
        raise _error(expected, list(by_name))
    found: dict[str, tuple[Ratio, ...]] = {}
    for name in datasets:
        ratios = [checked_ratio(r, "ratios") for r in _values({"ratios": by_name[name]}, "ratios")]
        found[name] = tuple({f"{r:g}": r for r in ratios}.values())  # those of one name are one
    return found


def _setting(name: Any, options: Any) -> dict[str, Any]:
    taken = (UNCOMPRESSED, COMPRESSED, ALL, *contenders.CONTROLS)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in taken or scheme_of(name):
        raise _error(f"`settings` to have {_NAMES} that no other contender has", name)
    if not isinstance(options or {}, dict):
        raise _error(f"the setting {name} to hold options such as {{ranks: [64, 16, 4]}}", options)
    options = dict(options or {})
    dtype = options.pop("dtype", None)
    if dtype not in (None, *ROUNDINGS):
        raise _error(f"the setting {name} to have `dtype` {', '.join(ROUNDINGS)} or none", dtype)
    if "recjpq_codes" in options:
        if options.keys() - {"recjpq_codes", "negatives"} or dtype:
            raise _error(f"the setting {name} to have `recjpq_codes` alone", options)
        check_whole("recjpq_codes", options["recjpq_codes"])
        return contenders.own_options(CompressionConfig.uncompressed()) | options
    own = contenders.own_options(CompressionConfig.from_options(options))
    # how a contender is trained may differ, what it is trained for may not
    own |= {n: options[n] for n in ("negatives", "negatives_power") if n in options}
    for shared in options.keys() - own.keys():
        expected = f"the setting {name} to leave `{shared}` to the study's `options`"
        raise _error(f"{expected}, as it is the same for all contenders", options[shared])
    return own if dtype is None else {**own, "dtype": dtype}
