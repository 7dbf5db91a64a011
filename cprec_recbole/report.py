"""What a model costs, by part: parameters, bytes and operations. Nothing here trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cprec_recbole.backbones import Backbone
from cprec_recbole.compression.spectra import PARAMETERS, Cost, Unit
from cprec_recbole.config import BlockPlan, CompressionConfig
from cprec_recbole.embedding import Int8Block
from cprec_recbole.int8 import BYTES_PER_SCALE, whole_numbers
from cprec_recbole.partition import PADDING
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.records import find_backbone
from cprec_recbole.sharing import sharing_plan, sharing_sets

BYTES_PER_FLOAT = 4


@dataclass(frozen=True)
class PartSizes:
    """Parameters of each part, or what they cost in another unit; what several places use is
    counted once, where it is first used.

    Attributes:
        table: the item table, which a tied softmax reads too.
        layers: everything between the table and the softmax.
        softmax: what the softmax has of its own: clusters, untied factors.
    """

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
    """Parameters by part of a compressed model or of RecBole's own; the scales of int8 rows are
    none."""
    if isinstance(model, CompressedRecommender):
        table, head = list(model.table.parameters()), list(model.head.parameters())
    else:
        table, head = find_backbone(model).table.parameters(model), []
    scales = _scales(model)
    table = [p for p in table if id(p) not in scales]
    known = scales | {id(p) for p in table}
    softmax = [p for p in head if id(p) not in known]
    known |= {id(p) for p in softmax}
    layers = [p for p in model.parameters() if id(p) not in known]
    return PartSizes(_count(table), _count(layers), _count(softmax))


def saved_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as a folder keeps them, each parameter once; the file's header and
    the tokens come on top."""
    scales = _scales(model)
    rounded = model.int8_scales if isinstance(model, CompressedRecommender) else {}
    total = 0
    for name, p in model.named_parameters():
        if id(p) in scales:
            total += BYTES_PER_SCALE * p.numel()
        elif whole_numbers(p, rounded.get(name)) is not None:
            total += p.numel() + BYTES_PER_SCALE * len(p)
        else:
            total += p.numel() * p.element_size()
    return total


def shared_layers(model: CompressedRecommender) -> str:
    """How many sets of layer parameters are left, in words; says so where nothing is shared."""
    layers = model.record.layers(model.backbone)
    plan = sharing_plan(model.compression.sharing, len(layers), model.record.group)
    return describe_sharing(model.compression.sharing, len(layers), len(sharing_sets(layers, plan)))


def describe_sharing(scheme: str, n_layers: int, n_sets: int) -> str:
    """A scheme and what it came to, e.g. `cross_block 2/20`: two of twenty layers are kept."""
    nothing = ", nothing to share" if n_sets == n_layers and scheme != "none" else ""
    return f"{scheme} {n_sets}/{n_layers}{nothing}"


@dataclass(frozen=True)
class Estimate:
    """What one choice of options would cost, without building its table.

    Attributes:
        sizes: by part, in the unit that was asked for.
        plan: ranks and cutoffs.
        score_flops: floating point operations to score the whole catalogue for one user, one
            multiplication and one addition counted as two; the layers are not included.
    """

    sizes: PartSizes
    plan: BlockPlan
    score_flops: int

    @property
    def megabytes(self) -> float:
        """All parameters as float32, in 10^6 bytes."""
        return self.sizes.total * BYTES_PER_FLOAT / 1e6


def estimate(
    record: Backbone,
    host: Any,
    compression: CompressionConfig,
    n_items: int,
    dim: int,
    unit: Unit = PARAMETERS,
) -> Estimate:
    """Count what a compression of a model would leave; exact, and as cheap for any catalogue.

    Args:
        record: the model's record.
        host: RecBole's model, built for a catalogue of any size.
        compression: the options.
        n_items: items of the catalogue, padding included.
        dim: size of an item vector.
        unit: what is counted.
    """
    plan = compression.plan(dim, n_items)
    left = layer_parameters(record, host, compression.sharing)
    n_clusters = len(plan.ranks) - 1 if compression.softmax == "tree" else 0
    table = Cost(copies=1, cluster=0, unit=unit).of(plan)
    softmax = int(unit.matrix(n_clusters, dim)) + (0 if compression.tied else table)
    sizes = PartSizes(table, sum(unit.parameter(p) for p in left), softmax)
    return Estimate(sizes, plan, 2 * (plan.n_parameters + n_clusters * dim))


def layer_parameters(record: Backbone, host: Any, sharing: str) -> list[Tensor]:
    """What a model has between table and softmax, with its layers shared by a scheme."""
    layers = record.layers(host)
    sets = sharing_sets(layers, sharing_plan(sharing, len(layers), record.group))

    def slots(numbers: Iterable[int]) -> set[int]:
        return {id(getattr(module, name)) for i in numbers for module, name in layers[i]}

    kept = slots(members[0] for members in sets)
    gone = slots(i for members in sets for i in members[1:]) - kept
    gone |= {id(p) for p in record.table.parameters(host)}
    return [*(p for p in host.parameters() if id(p) not in gone), *record.table.left(host)]


def layer_flops(model: CompressedRecommender, item_seq: Tensor) -> int:
    """Floating point operations from a history to its hidden state, `item_seq [1, L]`."""
    was_training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(item_seq, (item_seq != PADDING).sum(1))
    model.train(was_training)
    return int(counter.get_total_flops())


def _scales(model: nn.Module) -> set[int]:
    return {id(m.scale) for m in model.modules() if isinstance(m, Int8Block)}


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
