"""The evaluating trainer against RecBole's own."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from recbole.trainer import Trainer
from recbole.utils import get_model, get_trainer, init_seed

from cprec_recbole.host.library import recbole_config
from cprec_recbole.training import evaluation
from cprec_recbole.training.trainer import CompressedTrainer
from tests.builders import HOSTS

BY_LISTS = ["Recall", "MRR", "NDCG", "Hit", "MAP", "Precision"]
BY_ITEMS = ["ShannonEntropy"]  # RecBole 1.2.1 fails on the others of this kind, on its own


@pytest.fixture(scope="module", params=["full", "tree"])
def movielens(request, tmp_path_factory):
    """A compressed model on MovieLens-100K, trained for an epoch, and its test data."""
    from recbole.data import create_dataset, data_preparation

    folder = str(tmp_path_factory.mktemp("movielens"))

    def config(**options):
        return recbole_config(
            "CpGRU4Rec",
            "ml-100k",
            {
                "softmax": request.param,
                "epochs": 1,
                "metrics": BY_LISTS + BY_ITEMS,
                "topk": [1, 10, 20],
                "valid_metric": "NDCG@10",
                "eval_batch_size": 300,
                "checkpoint_dir": folder,
                "show_progress": False,
                **options,
            },
        )

    plain = config()
    init_seed(2020, True)
    data = data_preparation(plain, create_dataset(plain))
    model = get_model("CpGRU4Rec")(plain, data[0]._dataset)
    CompressedTrainer(plain, model).fit(data[0], saved=False, verbose=False)
    return config, model, data


@pytest.mark.parametrize("metrics", [BY_LISTS, BY_ITEMS, [*BY_LISTS, "GAUC"]])
def test_metrics_are_recboles_digit_for_digit(movielens, metrics, monkeypatch):
    config, model, (train, valid, test) = movielens
    options = config(metrics=metrics, valid_metric=f"{metrics[0]}@10")
    monkeypatch.setattr(evaluation, "_SCORES", 7 * model.n_items)  # dense scores of 7 users a time
    for data in (valid, test):
        results = []
        for kind in (Trainer, CompressedTrainer):
            runner = kind(options, model)
            runner.eval_collector.data_collect(train)
            results.append(runner.evaluate(data, load_best_model=False))
        assert results[0] == results[1]
        assert len(results[0]) >= len(metrics)


def test_lists_are_looked_up_and_never_sorted_from_dense_scores(movielens):
    config, model, (_, valid, _) = movielens
    with (
        mock.patch.object(type(model), "full_sort_predict", side_effect=AssertionError),
        mock.patch.object(type(model.softmax), "scores", side_effect=AssertionError),
    ):
        assert CompressedTrainer(config(metrics=BY_LISTS), model).evaluate(
            valid, load_best_model=False
        )


@pytest.mark.parametrize("host", HOSTS)
def test_recbole_finds_it_for_the_compressed_models_alone(host):
    from recbole.utils import ModelType

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
        ("CpSASRec", {"clip_grad_norm": {"max_norm": 0.3}}),
        ("CpSASRec", {"enable_amp": True, "show_progress": True}),
        ("CpGRU4Rec", {"training": "last_position", "loss_type": "BPR"}),
    ],
)
def test_an_epoch_is_recboles_bit_by_bit(world, name, options):
    ours = fitted(world, name, CompressedTrainer._train_epoch, **options)
    theirs = fitted(world, name, Trainer._train_epoch, **options)
    assert ours[1] == theirs[1]
    assert all(torch.equal(value, theirs[0][key]) for key, value in ours[0].items())


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
