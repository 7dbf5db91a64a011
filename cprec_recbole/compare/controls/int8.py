"""Rows in 8 bits after training: the simplest thing that one can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cprec_recbole.compare.controls.control import Derived, DerivedControl, Trained
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compare.controls.table import ItemTable, with_table
from cprec_recbole.original import Original
from cprec_recbole.report import BYTES_PER_FLOAT


class Int8Table(ItemTable):
    """Item vectors in 8 bits, each row with a scale of its own.

    Args:
        table: item vectors in id order, `[n_items, d]`.
    """

    rows: Tensor
    scales: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__(*table.shape)
        rows, scales = rounded(table)
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales)

    @property
    def extra_bytes(self) -> int:
        """Bytes of rows and scales."""
        return self.rows.nbytes + self.scales.nbytes

    @property
    def extra_numbers(self) -> int:
        """Values of the rows."""
        return self.rows.numel()

    def vectors(self, items: Tensor) -> Tensor:
        """See ItemTable.vectors."""
        return self.rows[items] * self.scales[items]

    def logits(self, hidden: Tensor) -> Tensor:
        """See ItemTable.logits."""
        return (hidden @ self.rows.to(hidden.dtype).T) * self.scales.T


class Int8(DerivedControl):
    """All matrices of the trained uncompressed model in 8 bits, a scale for each row.

    The item table is kept in 8 bits; the layers' matrices are rounded and kept in float32, with
    the bytes counted that they would take.
    """

    name = "int8"
    words = "the trained uncompressed model, rows of all matrices in 8 bits, no training after"

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return setting.uncompressed.as_dict()

    @torch.no_grad()
    def derive(self, trained: Trained, options: dict[str, Any]) -> Derived:
        """See DerivedControl.derive."""
        original = Original.of(trained.model)
        host = original.copy_host()
        n_bytes = 0
        for parameter in host.parameters():
            n_bytes += BYTES_PER_FLOAT * parameter.numel()
            if parameter.ndim > 1:
                rows, scales = rounded(parameter.view(len(parameter), -1))
                parameter.copy_((rows * scales).view_as(parameter))
                n_bytes += (1 - BYTES_PER_FLOAT) * rows.numel() + scales.nbytes
        table = Int8Table(original.table)
        model = with_table(trained.model, host, table)
        model.n_bytes = n_bytes + table.extra_bytes
        return Derived(model.to(original.table.device).eval())


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as whole numbers from -127 to 127 and the scale of each, `[n, d] -> [n, d], [n, 1]`."""
    scales = rows.abs().amax(1, keepdim=True) / 127
    codes = rows / torch.where(scales > 0, scales, torch.ones_like(scales))
    return codes.round().to(torch.int8), scales
