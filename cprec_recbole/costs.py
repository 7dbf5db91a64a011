"""What a model costs, by part: parameters, bytes and operations. Nothing here trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from cprec_recbole.config import BlockPlan, CompressionConfig
from cprec_recbole.embedding import QuantizedBlock
from cprec_recbole.integers import BYTES_PER_SCALE, whole_numbers
from cprec_recbole.models import spec_of
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.models.spec import ModelSpec

BYTES_PER_FLOAT = 4


class Unit(NamedTuple):
    """What costs are counted in, such as parameters or bytes."""

    name: str
    entry: int  # what an entry of a matrix costs
    row: int  # what each row of a matrix costs besides
    other: int  # what a parameter costs that is in no matrix
    dtype: str | None = None  # in int4 two entries cost what one is said to, and columns have `row`

    @classmethod
    def bytes_in(cls, dtype: str, other: int) -> Unit:
        """Bytes of a quantized model, whose other parameters take so many each."""
        return cls("bytes", 1, BYTES_PER_SCALE, other, dtype)

    def matrix(self, n_rows: Any, n_columns: Any) -> Any:
        """What a matrix costs; or matrices, for arrays of sizes."""
        entries = -(-n_columns // 2) if self.dtype == "int4" else n_columns
        return n_rows * (self.entry * entries + self.row)

    def rows(self, size: Any, rank: Any) -> Any:
        """What the rows of a block cost; or of blocks, for arrays."""
        if self.dtype in ("int4", "mixed"):
            return size * self.entry * -(-rank // 2) + self.row * rank
        return self.matrix(size, rank)

    def parameter(self, parameter: Tensor) -> int:
        """What a parameter costs."""
        if parameter.ndim < 2 or not parameter.numel():
            return self.other * parameter.numel()
        return int(self.matrix(len(parameter), parameter[0].numel()))


PARAMETERS = Unit("parameters", entry=1, row=0, other=1)


class TableCost(NamedTuple):
    """What the item table and the softmax cost, for item vectors of size `dim`."""

    dim: int
    copies: int = 1  # two where the softmax is untied
    each_cluster: int = 0  # of a block after the head, besides its rows and projection
    unit: Unit = PARAMETERS

    @classmethod
    def under(cls, options: CompressionConfig, dim: int, unit: Unit) -> TableCost:
        """With the softmax of some options."""
        each_cluster = unit.matrix(1, dim) if options.softmax == "tree" else 0
        return cls(dim, 1 if options.tied else 2, each_cluster, unit)

    def block(self, size: Any, rank: Any) -> Any:
        """What the rows and the projection of a block cost; or of blocks, for arrays."""
        projection = (rank != self.dim) * self.unit.matrix(rank, self.dim)
        return self.copies * (self.unit.rows(size, rank) + projection)

    def of(self, plan: BlockPlan) -> int:
        """What table and softmax cost with the ranks and cutoffs of a plan."""
        blocks = sum(self.block(size, rank) for size, rank in zip(plan.sizes, plan.ranks))
        return int(blocks + (len(plan.ranks) - 1) * self.each_cluster)


@dataclass(frozen=True)
class PartSizes:
    """Parameters of each part, or their cost in another unit, each once."""

    table: int
    layers: int
    softmax: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.table + self.layers + self.softmax

    def as_dict(self) -> dict[str, int]:
        """The parts and their total, for JSON."""
        return {**asdict(self), "total": self.total}


def part_sizes(model: nn.Module) -> PartSizes:
    """Parameters by part of a compressed model or of RecBole's own, without scales of rows."""
    if isinstance(model, CompressedRecommender):
        table, softmax = list(model.table.parameters()), list(model.softmax.parameters())
    else:
        table, softmax = spec_of(model).table.parameters(model), []
    counted, sizes = _scales(model), []
    blocks = (module for module in model.modules() if isinstance(module, QuantizedBlock))
    entries = {id(block.weight): len(block.weight) * block.rank for block in blocks}  # also packed
    for part in (table, softmax, list(model.parameters())):
        new = {id(p): entries.get(id(p), p.numel()) for p in part if id(p) not in counted}
        counted |= set(new)
        sizes.append(sum(new.values()))
    return PartSizes(table=sizes[0], layers=sizes[2], softmax=sizes[1])


def saved_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as a folder keeps them, each parameter once."""
    scales = _scales(model)
    rounded: Mapping[str, Tensor] = {}
    dtype = None
    if isinstance(model, CompressedRecommender):
        rounded, dtype = model.matrix_scales, model.quantized
    total = 0
    for name, p in model.named_parameters():
        if id(p) in scales:
            total += BYTES_PER_SCALE * p.numel()
            continue
        numbers = whole_numbers(p, rounded.get(name), dtype)
        if numbers is not None:
            total += BYTES_PER_SCALE * len(p)
        total += (p if numbers is None else numbers).nbytes
    return total


def _scales(model: nn.Module) -> set[int]:
    return {id(m.scale) for m in model.modules() if isinstance(m, QuantizedBlock)}


def shared_layers(model: CompressedRecommender) -> str:
    """How many sets of layer parameters are left, in words; says so where nothing is shared."""
    scheme = model.compression.sharing
    layers, sets = model.spec.sharing(model.inner, scheme)
    return describe_sharing(scheme, len(layers), len(sets))


def describe_sharing(scheme: str, n_layers: int, n_sets: int) -> str:
    """A scheme and what it came to, e.g. `cross_block 2/20`: two of twenty layers are kept."""
    nothing = ", nothing to share" if n_sets == n_layers and scheme != "none" else ""
    return f"{scheme} {n_sets}/{n_layers}{nothing}"


class Estimate(NamedTuple):
    """What one choice of options would cost, without building its table."""

    sizes: PartSizes  # in the unit that was asked for
    plan: BlockPlan
    # to score the whole catalogue for one user, without the layers: a multiplication and an
    # addition are two operations
    score_flops: int

    @property
    def megabytes(self) -> float:
        """All parameters as float32, in 10^6 bytes."""
        return self.sizes.total * BYTES_PER_FLOAT / 1e6


def estimate(
    spec: ModelSpec,
    inner: Any,
    compression: CompressionConfig,
    n_items: int,
    dim: int,
    unit: Unit = PARAMETERS,
) -> Estimate:
    """Count exactly what a compression of a model would leave; the inner model may be built for a
    catalogue of another size than `n_items`, padding included."""
    plan = compression.plan(dim, n_items)
    layers = sum(map(unit.parameter, layer_parameters(spec, inner, compression.sharing)))
    table = TableCost(dim, unit=unit).of(plan)
    softmax = TableCost.under(compression, dim, unit).of(plan) - table
    n_clusters = len(plan.ranks) - 1 if compression.softmax == "tree" else 0
    flops = 2 * (plan.n_parameters + n_clusters * dim)
    return Estimate(PartSizes(table, layers, softmax), plan, flops)


def layer_parameters(spec: ModelSpec, inner: Any, sharing: str) -> list[Tensor]:
    """What a model has between table and softmax, with its layers shared by a scheme."""
    layers, sets = spec.sharing(inner, sharing)
    slots = [{id(getattr(*slot)) for slot in layer} for layer in layers]
    kept = set().union(*(slots[members[0]] for members in sets))
    gone = set().union(*slots) - kept | {id(p) for p in spec.table.parameters(inner)}
    return [*(p for p in inner.parameters() if id(p) not in gone), *spec.table.remaining(inner)]
