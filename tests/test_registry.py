"""Models of one's own: registered, trained by RecBole, compressed, kept in a folder."""

from dataclasses import replace

import pytest
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from torch import nn

from cprec_recbole import CompressionError, ModelSpec, compress, load_pretrained, register
from cprec_recbole.models import MODELS, CpSASRec
from tests.builders import train
from tests.oracles import best_items


class MeanRec(SequentialRecommender):
    """The mean of a history's vectors, through a linear map."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.width = config["embedding_size"]
        self.loss_type = config["loss_type"]
        self.item_embedding = nn.Embedding(self.n_items, self.width, padding_idx=0)
        self.dense = nn.Linear(self.width, self.width)

    def forward(self, item_seq, item_seq_len):
        total = self.item_embedding(item_seq).sum(1)
        return self.dense(total / item_seq_len.unsqueeze(1))

    def calculate_loss(self, interaction):
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        logits = hidden @ self.item_embedding.weight.T
        return nn.functional.cross_entropy(logits, interaction[self.POS_ITEM_ID])

    def full_sort_predict(self, interaction):
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return hidden @ self.item_embedding.weight.T


SPEC = ModelSpec(
    model_class=MeanRec,
    size_option="embedding_size",
    table_std=lambda model, n_items: 1.0,
    architecture=(("embedding_size", "width"), "loss_type"),
)
OPTIONS = {"embedding_size": 12, "loss_type": "CE"}


@pytest.fixture
def registered():
    model_class = register(SPEC)
    yield model_class
    MODELS.remove(model_class)


def original(world):
    config = world.config("SASRec", **OPTIONS)
    data = world.loaders(config)[0]
    return train(MeanRec(config, data._dataset), world, "SASRec")


def test_a_model_of_ones_own_is_compressed_and_kept(world, registered, tmp_path):
    model = original(world)
    same = compress(model, ranks=[12])
    batch = world.evaluation_batch("SASRec")
    scores = model.full_sort_predict(batch)
    torch.testing.assert_close(same.full_sort_predict(batch), scores, atol=1e-5, rtol=0)
    small = compress(model, ranks=[12, 4, 1])
    assert type(small) is registered
    dense = small.full_sort_predict(batch)
    loaded = load_pretrained(small.save_pretrained(tmp_path))
    rows = loaded.recommend(batch["item_id_list"], k=5).items.tolist()
    assert rows == [best_items(row.tolist(), 5) for row in dense]


class Odd(MeanRec):
    """A layer that runs twice, at every position and at the end, and gets its input by name; a norm
    without parameters, and one that keeps means of what it has seen."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.norm = nn.Sequential(
            nn.LayerNorm(self.width, elementwise_affine=False), nn.BatchNorm1d(self.width)
        )

    def forward(self, item_seq, item_seq_len):
        total = torch.relu(self.dense(input=self.item_embedding(item_seq))).sum(1)
        return self.norm(self.dense(total / item_seq_len.unsqueeze(1)))


def test_layers_of_any_kind_are_fitted_and_kept(world, tmp_path):
    model_class = register(replace(SPEC, model_class=Odd))
    try:
        config = world.config("SASRec", **OPTIONS)
        model = Odd(config, world.loaders(config)[0]._dataset)
        with torch.no_grad():
            model.item_embedding.weight[1:] += 3 * torch.randn(12)  # so that it looks trained
        model = train(model, world, "SASRec")
        same, small = compress(model, ranks=[12]), compress(model, ranks=[6, 3])
        batch = world.evaluation_batch("SASRec")
        scores = model.full_sort_predict(batch)
        torch.testing.assert_close(same.full_sort_predict(batch), scores, atol=1e-4, rtol=0)
        assert small.warm_start.fitted < 1
        loaded = load_pretrained(small.save_pretrained(tmp_path))
        scores = small.full_sort_predict(batch)
        torch.testing.assert_close(loaded.full_sort_predict(batch), scores, atol=1e-5, rtol=0)
    finally:
        MODELS.remove(model_class)


def test_recbole_builds_and_trains_it_by_name(world, registered):
    model = world.model("CpMeanRec", **OPTIONS, ranks=[12, 4, 1])
    assert type(model) is registered
    batch = world.batch("CpMeanRec", **OPTIONS)
    model.calculate_loss(batch).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_an_unknown_model_of_ones_own_is_refused_with_the_way_out(world):
    with pytest.raises(CompressionError, match=r"but got MeanRec.*register\(\)"):
        compress(original(world))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (MeanRec, "`spec` to be a ModelSpec, but got type"),
        (replace(SPEC, model_class=nn.Linear), "`model_class` to be a class made from .*'Linear'"),
        (replace(SPEC, model_class=7), "`model_class`.*but got 7"),
        (replace(SPEC, model_class=CpSASRec), "none that is compressed, but got 'CpSASRec'"),
        (CpSASRec.spec, "CpSASRec is known already"),
    ],
)
def test_bad_records_are_named_and_change_nothing(spec, words):
    before = list(MODELS)
    with pytest.raises(CompressionError, match=words):
        register(spec)
    assert list(MODELS) == before
