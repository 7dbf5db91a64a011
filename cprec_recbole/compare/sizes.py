"""What a contender weighs: every byte that scoring needs."""

from __future__ import annotations

from torch import nn

from cprec_recbole.compare.controls.table import ItemTable
from cprec_recbole.costs import saved_bytes
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.models.saving import packed_blocks


def served_bytes(model: nn.Module) -> int:
    """Bytes that scoring needs: parameters, an item's codes, and the block of each item in as few
    bits as that takes. Not the names of items."""
    total = saved_bytes(model)
    if not isinstance(model, CompressedRecommender):
        return total
    if isinstance(model.table, ItemTable):
        return total + model.table.extra_bytes
    partition = model.table.partition
    member = partition.blocks(partition.position_of).cpu().numpy()
    return total + packed_blocks(member, len(partition.sizes)).nbytes
