"""Quotient-remainder hashing (Shi et al., KDD 2020): a product of two rows from small tables."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cprec_recbole.compare.controls.control import TrainedControl
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compare.controls.table import ItemTable, TableRecommender, on_table

OPTION = "hashing_divisor"


class HashedTable(ItemTable):
    """Item x has the vector `quotients[x // q] * remainders[x % q]`, `[d]`.

    Args:
        n_items: items of the catalogue, padding included.
        dim: size `d` of an item vector.
        divisor: q; the tables have `ceil(n_items / q)` and q rows.
        std: spread of the entries of a fresh item vector.
    """

    def __init__(self, n_items: int, dim: int, divisor: int, std: float) -> None:
        super().__init__(n_items, dim)
        self.divisor = divisor
        self.quotients = nn.Parameter(torch.empty(-(-n_items // divisor), dim))
        self.remainders = nn.Parameter(torch.empty(min(divisor, n_items), dim))
        for rows in (self.quotients, self.remainders):
            nn.init.normal_(rows, std=math.sqrt(std))  # so that products have a spread of std

    def vectors(self, items: Tensor) -> Tensor:
        """See ItemTable.vectors."""
        quotient = torch.div(items, self.divisor, rounding_mode="floor")
        return self.quotients[quotient] * self.remainders[items % self.divisor]

    def logits(self, hidden: Tensor) -> Tensor:
        """See ItemTable.logits; each quotient's row weighs the hidden states once."""
        weighed = hidden.unsqueeze(1) * self.quotients  # [B, quotients, d]
        return (weighed @ self.remainders.T).flatten(1)[:, : self.n_items]


class Hashing(TrainedControl):
    """Quotient-remainder hashing in the size of the compressed table."""

    name = "hashing"
    words = "quotient-remainder hashing: an item's vector is the product of two shared rows"

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        divisor = largest_divisor(setting.n_items, setting.table_limit // setting.dim)
        return {**setting.layers_alone.as_dict(), OPTION: divisor}

    def build(self, config: Any, dataset: Any) -> TableRecommender:
        """See TrainedControl.build."""
        spec, n_items = config.model_class.spec, int(dataset.item_num)
        dim, std = spec.dim(int(config[spec.size_option])), table_std(config, dataset)
        return on_table(config, dataset, HashedTable(n_items, dim, int(config[OPTION]), std))


def largest_divisor(n_items: int, rows: int) -> int:
    """The largest q whose two tables have at most so many rows; that of the fewest rows where none
    has. A larger q means fewer items to a remainder."""
    for divisor in range(min(n_items, rows), 0, -1):
        if divisor + -(-n_items // divisor) <= rows:
            return divisor
    return max(1, math.isqrt(n_items))


def table_std(config: Any, dataset: Any) -> float:
    """The spread that the model gives the entries of a fresh table."""
    spec = config.model_class.spec
    with torch.random.fork_rng(devices=[]):
        return spec.table_std(spec.build_inner(config, dataset), int(dataset.item_num))
