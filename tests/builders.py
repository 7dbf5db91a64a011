"""Small models, data sets and histories for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.utils import get_model, init_seed

from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.host.library import recbole_config
from cprec_recbole.partition import Partition

HOSTS = ("NextItNet", "SASRec", "GRU4Rec")  # what the heavy grids run on
MORE_HOSTS = ("BERT4Rec", "LightSANs", "GCSAN", "NARM", "STAMP", "SRGNN", "SINE")
SCHEMES = ("none", "cross_layer", "cross_block", "adjacent_layer", "adjacent_block")

# small enough to be quick, deep enough that every scheme has something to share
SMALL: dict[str, dict[str, Any]] = {
    "NextItNet": {"embedding_size": 16, "block_num": 2, "dilations": [1, 2]},
    "SASRec": {"hidden_size": 16, "inner_size": 24, "n_layers": 4, "n_heads": 2},
    "GRU4Rec": {"embedding_size": 16, "hidden_size": 20, "num_layers": 4},
    "BERT4Rec": {"hidden_size": 15, "inner_size": 24, "n_layers": 2, "n_heads": 3}
    | {"train_batch_size": 512},  # in a small one nothing may be hidden: RecBole's loss is then NaN
    "LightSANs": {"hidden_size": 16, "inner_size": 24, "n_layers": 2, "k_interests": 3},
    "GCSAN": {"hidden_size": 16, "inner_size": 24, "n_layers": 2},
    "NARM": {"embedding_size": 16, "hidden_size": 20, "n_layers": 3},
    "STAMP": {"embedding_size": 16},
    "SRGNN": {"embedding_size": 16},
    "SINE": {"embedding_size": 16, "prototype_size": 6, "interest_size": 2},
}


@dataclass
class World:
    """A data set on disk, and models built on it by RecBole's own means."""

    data_path: str
    name: str = "made-up"

    @classmethod
    def made_up(cls, folder: Path, n_users: int = 60, n_items: int = 40) -> World:
        rng = np.random.default_rng(0)
        lines = ["user_id:token\titem_id:token\ttimestamp:float"]
        popularity = 1 / np.arange(1, n_items + 1)
        for user in range(n_users):
            length = int(rng.integers(2, 30))
            items = rng.choice(n_items, size=length, p=popularity / popularity.sum())
            lines += [f"u{user}\ti{item}\t{time}" for time, item in enumerate(items)]
        (folder / cls.name).mkdir()
        (folder / cls.name / f"{cls.name}.inter").write_text("\n".join(lines) + "\n")
        return cls(str(folder))

    def options(self, model: str, **options: Any) -> dict[str, Any]:
        """RecBole's options for a small model on this data set."""
        return {
            "data_path": self.data_path,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": 8,
            "show_progress": False,
            "epochs": 1,
            "train_batch_size": 64,
            **SMALL.get(model.removeprefix("Cp"), {}),
            **options,
        }

    def config(self, model: str, **options: Any):
        return recbole_config(model, self.name, self.options(model, **options))

    def loaders(self, config):
        return data_preparation(config, create_dataset(config))

    def model(self, name: str, **options: Any):
        """A fresh model, RecBole's own or a compressed one, as RecBole builds it."""
        config = self.config(name, **options)
        init_seed(config["seed"], True)
        train, _, _ = self.loaders(config)
        return get_model(name)(config, train._dataset)

    def batch(self, name: str, **options: Any) -> Interaction:
        """One training batch for a model."""
        train, _, _ = self.loaders(self.config(name, **options))
        return next(iter(train))

    def evaluation_batch(self, name: str, **options: Any) -> Interaction:
        """One test batch for a model."""
        _, _, test = self.loaders(self.config(name, **options))
        return next(iter(test))[0]


def block_embedding(
    sizes: tuple[int, ...], ranks: tuple[int, ...], dim: int, *, shuffled: bool = True
) -> BlockEmbedding:
    """A block embedding with weights of order one, items in a random popularity order."""
    n_items = sum(sizes)
    order = torch.randperm(n_items - 1) + 1 if shuffled else torch.arange(1, n_items)
    item_at = torch.cat([torch.zeros(1, dtype=torch.int64), order])
    table = BlockEmbedding(Partition(item_at, np.cumsum(sizes).tolist()), ranks, dim)
    for parameter in table.parameters():
        torch.nn.init.normal_(parameter)
    return table


def train_a_step(model, batch: Interaction, lr: float = 0.05) -> float:
    """One step of SGD; returns the loss before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.train()
    optimizer.zero_grad()
    loss = model.calculate_loss(batch)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def train(model, world: World, name: str, epochs: int = 4):
    """Train a model of the world's for some epochs, with RecBole's own rows; returns it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rows, _, _ = world.loaders(world.config(name))
    model.train()
    for _ in range(epochs):
        for batch in rows:
            optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            optimizer.step()
    return model.eval()
