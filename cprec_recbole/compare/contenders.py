"""What is compared: the uncompressed model, the compressed one, and the controls that a sceptic
would ask for. What each costs follows from a setting; nothing is tuned by hand."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from cprec_recbole.compare import tables
from cprec_recbole.compression.compress import compress
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.quantize import quantize
from cprec_recbole.compression.recover import recover
from cprec_recbole.config import CompressionConfig, CompressionError, check_choice
from cprec_recbole.costs import BYTES_PER_FLOAT, PARAMETERS, PartSizes, Unit, estimate
from cprec_recbole.host.library import recbole_model
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.models.spec import ModelSpec
from cprec_recbole.results import Recovery

ALL, UNCOMPRESSED, COMPRESSED, STOCK = "all", "uncompressed", "compressed", "RecBole's own"
STOCK_KIND = "recbole"
SHARED_OPTIONS = (
    "training",
    "loss_memory",
    "negatives",
    "negatives_power",
)  # of a CompressionConfig: the same for all contenders
INT8_BYTES, INT4_BYTES = (Unit.bytes_in(each, BYTES_PER_FLOAT) for each in ("int8", "int4"))
_PLAIN = CompressionConfig.uncompressed()
_WIDTHS = ("embedding_size", "hidden_size", "inner_size")  # RecBole's names of a model's widths


@dataclass(frozen=True)
class Recipe:
    """How a contender is made."""

    # `train`: a Cp model; `hashing`, `recjpq-...`: one on that item table;
    # `recbole`: RecBole's own model; `compress`: made of the trained uncompressed model; `recover`:
    # that, then trained on
    kind: str
    # that only it has, as JSON has them: RecBole's, and `dtype` puts the matrices of the trained
    # model in int8 or int4; or arguments of `compress`, where `one_rank: true` asks for one block
    # in those bytes
    options: dict[str, Any]

    @property
    def is_derived(self) -> bool:
        """Whether it is made of the trained uncompressed model."""
        return self.kind in ("compress", "recover")

    @property
    def has_rate(self) -> bool:
        """Whether it is trained, at a learning rate that matters."""
        return self.kind != "compress"


@dataclass
class Setting:
    """A model, a catalogue, and the compressed contender that others stand beside."""

    config: Any  # RecBole's, of the Cp model, with the options that all contenders share
    dataset: Any  # RecBole's, or anything with `iid_field`, `item_num` and `num(field)`
    compression: CompressionConfig  # of the contender `compressed`
    ratio: float | None = None  # that it was chosen for; None: its options were given
    base: dict[str, Any] = field(default_factory=dict)  # the options given beside a ratio
    refused_size: int | None = None  # parameters it should have had, where it cannot be that small

    def __post_init__(self) -> None:
        self.spec: ModelSpec = self.config.model_class.spec
        self.dim = self.spec.dim(int(self.config[self.spec.size_option]))
        self.n_items = int(self.dataset.item_num)  # padding included
        with torch.random.fork_rng(devices=[]):
            self.inner = self.spec.build_inner(self.config, self.dataset)

    @property
    def compressed(self) -> PartSizes:
        """Parameters of the contender `compressed`, by part."""
        return sizes(self, self.compression)


def sizes(of: Setting | Original, options: CompressionConfig, unit: Unit = PARAMETERS) -> PartSizes:
    """What a Cp model of some options costs by part, without building its table."""
    return estimate(of.spec, of.inner, options, of.n_items, of.dim, unit).sizes


def own_options(compression: CompressionConfig) -> dict[str, Any]:
    """The compression options in which contenders may differ, as JSON has them."""
    found = {k: v for k, v in compression.as_dict().items() if k not in SHARED_OPTIONS}
    if not compression.rounding:  # runs from before there was any keep their names
        del found["rounding"]
    return found


def _plain(kind: str, setting: Setting, **more: Any) -> Recipe:
    return Recipe(kind, {**own_options(_PLAIN), **more})


def _narrower(setting: Setting, unit: Unit = PARAMETERS, **more: Any) -> Recipe:
    """The widest that costs no more than the compressed one in float, or the narrowest there is;
    all widths in proportion. As wide as the uncompressed model where even that is no larger."""
    config, spec = setting.config, setting.spec
    names = [name for name in _WIDTHS if name in spec.architecture]
    step = int(config["n_heads"] or 1) if "n_heads" in config else 1  # heads divide widths
    whole, option = int(config[spec.size_option]), spec.size_option
    if whole <= step:
        raise CompressionError(
            f"Expected `{option}` to be above {step} for a narrower model, but got {whole}."
        )

    def widths(size: int) -> dict[str, int]:
        return {n: max(1, round(config[n] * (size / whole))) for n in names} | {option: size}

    def cost(size: int) -> int:
        narrower = copy.copy(config)
        narrower.final_config_dict = {**config.final_config_dict, **widths(size)}
        return sizes(replace(setting, config=narrower), _PLAIN, unit).total

    refused, possible = setting.refused_size, range(step, whole + 1, step)
    limit = unit.other * (setting.compressed.total if refused is None else refused)
    size = possible[bisect_right(possible, limit, lo=1, key=cost) - 1]
    if refused is not None and (least := cost(size)) > limit:
        raise CompressionError(
            f"Expected a budget of {least:,} {unit.name} or more, which is the narrowest model, "
            f"but got {limit:,}."
        )
    return _plain("train", setting, **widths(size), **more)


def _one_rank(
    of: Setting | Original, like: CompressionConfig, limit: int, unit: Unit = PARAMETERS
) -> CompressionConfig:
    """One block of the largest rank that costs no more than the limit; or of rank 1."""
    plain = replace(like, cutoffs=(), ranks=(1,), softmax="full")
    larger = (replace(plain, ranks=(rank,)) for rank in range(of.dim, 1, -1))
    return next((each for each in larger if sizes(of, each, unit).total <= limit), plain)


def _in_one_rank(kind: str, setting: Setting) -> Recipe | None:
    other, n_items = setting.compression, setting.n_items
    own = _one_rank(setting, other, setting.compressed.total)
    same_plan = own.plan(setting.dim, n_items) == other.plan(setting.dim, n_items)
    if kind == "train" and same_plan and own.softmax == other.softmax:  # it may have one block too
        return None
    return Recipe(kind, own_options(own))


def _changed(setting: Setting, **change: Any) -> Recipe | None:
    """The compressed one with one option changed. That may come to the same model, as sharing does
    where there is one layer, or a tree of one block."""
    own, other = replace(setting.compression, **change), setting.compression
    n_blocks = len(other.plan(setting.dim, setting.n_items).ranks)
    is_same = own.tied == other.tied and (own.softmax == other.softmax or n_blocks == 1)
    is_same = is_same and sizes(setting, own).layers == setting.compressed.layers
    return None if is_same else Recipe("train", own_options(own))


def _recovered(setting: Setting) -> Recipe:
    if setting.ratio is None:
        return Recipe("recover", own_options(setting.compression))
    return Recipe("recover", {"ratio": setting.ratio, **setting.base})  # chosen once it is trained


def _recovered_in(dtype: str, setting: Setting, **more: Any) -> Recipe:
    options: dict[str, Any] = {"ratio": setting.ratio, **setting.base}
    if setting.ratio is None:
        given = {"softmax": setting.compression.softmax, "tied": setting.compression.tied}
        options = {"size": BYTES_PER_FLOAT * setting.compressed.total, **given}
    return Recipe("recover", {**options, "dtype": dtype, **more})


def _hashing(setting: Setting) -> Recipe:
    size, scheme = setting.compressed, setting.compression.sharing
    divisor = tables.largest_divisor(setting.n_items, (size.total - size.layers) // setting.dim)
    return _plain("hashing", setting, sharing=scheme, hashing_divisor=divisor)


def _recjpq(kind: str, setting: Setting) -> Recipe:
    """As many codes as fit beside shared layers, and layers of its own where those fit too."""
    size, n_items = setting.compressed, setting.n_items
    codes = tables.most_codes(n_items, setting.dim, BYTES_PER_FLOAT * (size.total - size.layers))
    whole = tables.coded_bytes(n_items, setting.dim, codes)
    whole += BYTES_PER_FLOAT * sizes(setting, _PLAIN).layers
    scheme = "none" if whole <= BYTES_PER_FLOAT * size.total else setting.compression.sharing
    return _plain(kind, setting, sharing=scheme, recjpq_codes=codes)


CONTENDERS: dict[str, Callable[[Setting], Recipe | None]] = {
    UNCOMPRESSED: partial(_plain, "train"),
    COMPRESSED: lambda setting: Recipe("train", own_options(setting.compression)),
    STOCK: lambda setting: Recipe(STOCK_KIND, {}),
    "recovered": _recovered,  # the trained model compressed, then recover() for a quarter as long
    "recovered-int8": partial(_recovered_in, "int8"),  # in int8, in the bytes of the compressed one
    "recovered-int4": partial(_recovered_in, "int4"),
    "uncompressed-recovered": partial(_plain, "recover"),  # not compressed, recover() alike
    "narrower": _narrower,  # an uncompressed model of fewer dimensions, about as many parameters
    "recjpq-random": partial(_recjpq, "recjpq-random"),  # random codes: m bytes an item
    "one-rank": partial(_in_one_rank, "train"),  # one low rank for all items, the same size
    "tree": partial(_changed, softmax="tree"),
    "full": partial(_changed, softmax="full"),
    "recjpq-svd": partial(_recjpq, "recjpq-svd"),  # codes out of an SVD of the interactions
    "recjpq-hc": partial(_recjpq, "recjpq-hc"),  # codes and centroids that quantise a larger one
    "blocks-only": partial(_changed, sharing="none"),  # as large as that makes it
    "sharing-only": lambda setting: _plain("train", setting, sharing=setting.compression.sharing),
    "untied": partial(_changed, tied=False),  # the softmax with factors of its own; larger
    "tied": partial(_changed, tied=True),
    "uniform-svd": partial(_in_one_rank, "compress"),  # a truncated SVD of the trained table
    "uniform-svd-recovered": partial(_in_one_rank, "recover"),
    "uniform-svd-recovered-int8": partial(_recovered_in, "int8", one_rank=True),  # of equal bytes
    "int8": partial(_plain, "compress", dtype="int8"),  # the trained uncompressed model
    "int4": partial(_plain, "compress", dtype="int4"),
    "narrower-int8": partial(_narrower, unit=INT8_BYTES, dtype="int8"),  # about as many bytes
    "narrower-int4": partial(_narrower, unit=INT4_BYTES, dtype="int4", rounding="int4"),
    "hashing": _hashing,  # an item's vector is the product of two shared rows
}
UNCOMPRESSED_RECIPE = Recipe("train", own_options(_PLAIN))
CONTROLS = tuple(CONTENDERS)[3:]
# they follow from a size alone: they are there where the compressed model cannot be that small
BY_SIZE = (
    *("recovered-int8", "recovered-int4", "narrower", "uniform-svd-recovered-int8"),
    *("narrower-int8", "narrower-int4"),
)


def find_controls(names: Sequence[str]) -> list[str]:
    """The controls of these names, each once; `all` for every one. CompressionError for others."""
    for name in names:
        check_choice("controls", name, (ALL, *CONTROLS))
    return list(dict.fromkeys(n for name in names for n in (CONTROLS if name == ALL else [name])))


def recipe_of(name: str, setting: Setting) -> Recipe | None:
    """How a contender is made; None where it is the same model as `compressed`. A CompressionError
    where there is none, as nothing is narrower than the narrowest."""
    return CONTENDERS[name](setting)


def build(recipe: Recipe, config: Any, dataset: Any) -> torch.nn.Module:
    """The fresh model of a recipe that is not derived, by a RecBole config with its options and the
    training split."""
    if recipe.kind in ("train", STOCK_KIND):
        return recbole_model(config, dataset)
    return tables.model_on_table(recipe.kind, recipe.options, config, dataset)


def finished(recipe: Recipe, model: Any) -> Any:
    """What is measured of a trained model: itself, or a quantized copy."""
    dtype = recipe.options.get("dtype")
    return quantize(model, dtype) if dtype else model


def derive(
    recipe: Recipe,
    original: CompressedRecommender,
    train: Any,
    valid: Any,
    epochs: int,
    seed: int,
    rate: float | None,
    loss_memory: int | str,
) -> tuple[CompressedRecommender, Recovery | None]:
    """What a derived recipe makes of the trained uncompressed model, which is left as it was.
    `epochs` are those until the original's best, of which a recovery has a quarter, one at least;
    without a `rate` it has the one that `recover` has by itself."""
    options = {**recipe.options, "loss_memory": loss_memory}
    in_one_rank = options.pop("one_rank", False)
    small = compress(original, data=train, verbose=False, **options)
    if in_one_rank:
        whole, limit = Original.of(original), tables.served_bytes(small)
        one = _one_rank(whole, small.compression, limit, INT8_BYTES)
        small = compress(original, one, data=train, dtype="int8", verbose=False)
    if recipe.kind == "compress":
        return small, None
    how: dict[str, Any] = {"valid_data": valid, "seed": seed, "progress": False}
    how |= {} if rate is None else {"learning_rate": rate}
    return small, recover(small, original, train, max(1, epochs // 4), **how)
