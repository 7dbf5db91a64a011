"""What a contender weighs: its numbers by part, and every byte that scoring needs."""

from __future__ import annotations

from torch import nn

from cprec_recbole.compare.controls.table import ItemTable, TableRecommender
from cprec_recbole.membership import packed_blocks
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.report import part_sizes, saved_bytes


def numbers(model: nn.Module) -> dict[str, int]:
    """Numbers by part and in total, `table`, `layers`, `softmax`, `total`: parameters, and the
    values of a table in 8 bits."""
    sizes = part_sizes(model).as_dict()
    if isinstance(model, TableRecommender) and isinstance(model.table, ItemTable):
        more = model.table.extra_numbers
        sizes |= {"table": sizes["table"] + more, "total": sizes["total"] + more}
    return sizes


def served_bytes(model: nn.Module) -> int:
    """Bytes that scoring needs: parameters, an item's codes or rows in 8 bits, and the block of
    each item in as few bits as that takes. Not the names of items."""
    if isinstance(model, TableRecommender) and model.n_bytes is not None:
        return model.n_bytes
    total = saved_bytes(model)
    if not isinstance(model, CompressedRecommender):
        return total
    if isinstance(model.table, ItemTable):
        return total + model.table.extra_bytes
    partition = model.table.partition
    member = partition.blocks(partition.position_of).cpu().numpy()
    return total + packed_blocks(member, len(partition.sizes)).nbytes
