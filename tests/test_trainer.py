"""The evaluating trainer against RecBole's own."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import ModelType, get_model, get_trainer, init_seed

from cprec_recbole.host.library import recbole_config
from cprec_recbole.training import evaluation
from cprec_recbole.training.trainer import CompressedTrainer
from tests.builders import HOSTS

BY_LISTS = ["Recall", "MRR", "NDCG", "Hit", "MAP", "Precision"]
BY_ITEMS = ["ShannonEntropy"]  # RecBole 1.2.1 fails on the others of this kind, on its own


def movielens(folder, **options):
    """RecBole's options for a compressed model on MovieLens-100K."""
    given = {"topk": [1, 10, 20], "eval_batch_size": 300, "checkpoint_dir": folder, **options}
    return recbole_config("CpGRU4Rec", "ml-100k", {"valid_metric": "NDCG@10", **given})


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    config = movielens(str(tmp_path_factory.mktemp("movielens")))
    return data_preparation(config, create_dataset(config))


@pytest.mark.parametrize("metrics", [BY_ITEMS, [*BY_LISTS, *BY_ITEMS], [*BY_LISTS, "GAUC"]])
@pytest.mark.parametrize("softmax", ["full", "tree"])
def test_metrics_are_recboles_digit_for_digit(loaders, tmp_path, monkeypatch, softmax, metrics):
    train, _, test = loaders
    valid_metric = f"{metrics[0]}@10"
    config = movielens(str(tmp_path), softmax=softmax, metrics=metrics, valid_metric=valid_metric)
    model = get_model("CpGRU4Rec")(config, train._dataset)
    monkeypatch.setattr(evaluation, "_SCORES", 7 * model.n_items)  # dense scores of 7 users a time
    results = []
    for kind in (Trainer, CompressedTrainer):
        runner = kind(config, model)
        runner.eval_collector.data_collect(train)
        results.append(runner.evaluate(test, load_best_model=False))
    assert results[0] == results[1]
    assert len(results[0]) >= len(metrics)


def test_lists_are_looked_up_and_never_sorted_from_dense_scores(world):
    config = world.config("CpGRU4Rec", metrics=BY_LISTS)
    train, valid, _ = world.loaders(config)
    model = get_model("CpGRU4Rec")(config, train._dataset)
    with (
        mock.patch.object(type(model), "full_sort_predict", side_effect=AssertionError),
        mock.patch.object(type(model.softmax), "scores", side_effect=AssertionError),
    ):
        assert CompressedTrainer(config, model).evaluate(valid, load_best_model=False)


@pytest.mark.parametrize("host", HOSTS)
def test_recbole_finds_it_for_the_compressed_models_alone(host):
    assert get_trainer(ModelType.SEQUENTIAL, f"Cp{host}") is CompressedTrainer
    assert get_trainer(ModelType.SEQUENTIAL, host) is Trainer


def fitted(world, name, epoch, **options):
    """A small model after RecBole's `fit` with some `_train_epoch`, and the losses."""
    config = world.config(name, epochs=2, **options)
    init_seed(config["seed"], True)
    train, valid, _ = world.loaders(config)
    model = get_model(name)(config, train._dataset)
    runner = CompressedTrainer(config, model)
    with mock.patch.object(CompressedTrainer, "_train_epoch", epoch):
        runner.fit(train, valid, saved=False, verbose=False)
    return model.state_dict(), runner.train_loss_dict


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CpNextItNet", {"softmax": "tree"}),
        ("CpSASRec", {"clip_grad_norm": {"max_norm": 0.3}, "show_progress": True}),
        ("CpSASRec", {"enable_amp": True}),
        ("CpGRU4Rec", {"training": "last_position", "loss_type": "BPR"}),
    ],
)
def test_an_epoch_is_recboles_bit_by_bit(world, name, options):
    ours = fitted(world, name, CompressedTrainer._train_epoch, **options)
    theirs = fitted(world, name, Trainer._train_epoch, **options)
    assert ours[1] == theirs[1]
    assert all(torch.equal(value, theirs[0][key]) for key, value in ours[0].items())


@pytest.mark.parametrize(("learner", "says"), [("adam", True), ("sparse_adam", False)])
def test_adam_with_sampled_negatives_of_a_large_catalogue_is_advised_against(
    world, caplog, monkeypatch, learner, says
):
    monkeypatch.setattr("cprec_recbole.training.trainer.SPARSE_ROWS", 10)
    config = world.config("CpGRU4Rec", negatives=5, learner=learner)
    train, _, _ = world.loaders(config)
    CompressedTrainer(config, get_model("CpGRU4Rec")(config, train._dataset))
    assert ("`sparse_adam` is faster" in caplog.text) == says


def test_a_loss_that_is_no_number_ends_the_training_in_its_epoch(world):
    config = world.config("CpGRU4Rec", epochs=9)
    train, _, _ = world.loaders(config)
    model = get_model("CpGRU4Rec")(config, train._dataset)
    losses = mock.Mock(side_effect=lambda batch: model.position_loss(*bad(len(batch))))

    def bad(n):
        return torch.full((n, 16), float("nan")), torch.ones(n, dtype=torch.int64)

    with (
        mock.patch.object(model, "calculate_loss", losses),
        pytest.raises(ValueError, match="Training loss is nan"),
    ):
        CompressedTrainer(config, model).fit(train, saved=False, verbose=False)
    assert losses.call_count == len(train)


def test_a_checkpoint_is_whole_at_every_moment(world, tmp_path):
    config = world.config("CpGRU4Rec", checkpoint_dir=str(tmp_path))
    train, _, _ = world.loaders(config)
    runner = CompressedTrainer(config, get_model("CpGRU4Rec")(config, train._dataset))
    runner._save_checkpoint(0, verbose=False)
    file = Path(runner.saved_model_file)
    before = file.read_bytes()

    def half(state, path, **options):
        path.write_bytes(before[: len(before) // 2])
        raise OSError("disk full")

    with mock.patch.object(torch, "save", half), pytest.raises(OSError, match="disk full"):
        runner._save_checkpoint(1, verbose=False)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
