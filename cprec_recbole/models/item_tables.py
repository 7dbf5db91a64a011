"""How RecBole's models keep their items, and how a block embedding takes that place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RecBoleModel = Any  # RecBole's models are not typed; their `item_embedding` turns ids into vectors


class PlainTable:
    """An `nn.Embedding` named `item_embedding`, one row an item, that the score reads too."""

    holds: tuple[str, ...] = ("item_embedding",)  # attributes of the model with one row an item
    n_more: int = 0  # numbers of an item's vector that the layers do not read

    def vectors(self, model: RecBoleModel) -> Tensor:
        """Item vectors of RecBole's own model in id order, `[n_items, d]`, without a gradient."""
        return model.item_embedding.weight.detach()

    def look_up(self, model: RecBoleModel, table: nn.Module | None) -> nn.Module | None:
        """What takes the place of the model's `item_embedding`, for a block embedding; or for
        None, which leaves the place of that free. Here it is the table itself."""
        return table

    def parameters(self, model: RecBoleModel) -> list[nn.Parameter]:
        """The model's parameters that a block embedding takes the place of."""
        held = [h for h in (getattr(model, name) for name in self.holds) if h is not None]
        return [p for h in held for p in (h.parameters() if isinstance(h, nn.Module) else [h])]

    def remaining(self, model: RecBoleModel) -> list[nn.Parameter]:
        """What remains of them beside the block embedding."""
        look_up = self.look_up(model, None)
        return [] if look_up is None else list(look_up.parameters())

    def put(self, model: RecBoleModel, table: nn.Module) -> None:
        """Put a block embedding into a model, in place of all that it holds for each item."""
        look_up = self.look_up(model, table)
        for name in self.holds:
            setattr(model, name, None)
        model.item_embedding = look_up


class MaskedTable(PlainTable):
    """BERT4Rec's: a last row that stands for what is to be guessed, and a bias for each item: the
    last number of its vector, which meets the 1 at the end of a hidden state (`with_one`)."""

    holds = ("item_embedding", "output_bias")
    n_more = 1

    def vectors(self, model: RecBoleModel) -> Tensor:
        """Item vectors and their biases, `[n_items, d]`; the mask is no item."""
        rows = model.item_embedding.weight[:-1]
        return torch.cat([rows, model.output_bias[:, None]], 1).detach()

    def look_up(self, model: RecBoleModel, table: nn.Module | None) -> nn.Module:
        """A look-up that knows the mask, and leaves the bias out."""
        old = model.item_embedding
        mask = old.mask if isinstance(old, MaskedLookUp) else old.weight[-1]
        return MaskedLookUp(table, mask.detach().clone())


class MaskedLookUp(nn.Module):
    """Vectors of items and of the mask, whose id is the number of items."""

    def __init__(self, table: Any, mask: Tensor) -> None:
        super().__init__()
        self.table: Any = table  # a BlockEmbedding
        self.mask = nn.Parameter(mask)

    def forward(self, items: Tensor) -> Tensor:
        """Vectors for the layers to read, `[...] -> [..., d - 1]`."""
        is_mask = items == self.table.partition.n_items
        vectors = self.table(items.masked_fill(is_mask, 0))[..., :-1]
        return torch.where(is_mask.unsqueeze(-1), self.mask, vectors)


def with_one(hidden: Tensor) -> Tensor:
    """Hidden states that meet a bias at their end, `[N, d - 1] -> [N, d]`."""
    return torch.nn.functional.pad(hidden, (0, 1), value=1.0)
