import numpy as np
import pytest
import torch

from cprec_recbole import CompressionError, evaluate
from cprec_recbole.data.sequences import NEXT_ITEMS, PositionsDataLoader, item_counts
from tests.builders import World
from tests.oracles import windows

FIELDS = ("user_id", "item_id", "item_id_list", "item_length")


def rows(dataset):
    batch = dataset[torch.arange(len(dataset))]
    return {field: batch[field] for field in FIELDS}


def training_histories(stock_train):
    """Each user's training items, oldest first, out of RecBole's own prefix rows."""
    histories: dict[int, list[int]] = {}
    batch = rows(stock_train)
    order = np.lexsort((batch["item_length"], batch["user_id"]))
    for i in order:
        user, target = int(batch["user_id"][i]), int(batch["item_id"][i])
        first = int(batch["item_id_list"][i][0])
        histories.setdefault(user, [first]).append(target)
    return histories


@pytest.mark.parametrize("split", [{"LS": "valid_and_test"}, {"RS": [0.8, 0.1, 0.1]}])
@pytest.mark.parametrize("length", [3, 8, 50])
def test_rows_are_recboles_own(world, split, length):
    options = {
        "MAX_ITEM_LIST_LENGTH": length,
        "eval_args": {"split": split, "group_by": "user", "order": "TO", "mode": "full"},
    }
    stock = world.loaders(world.config("SASRec", **options))
    ours = world.loaders(world.config("CpSASRec", training="last_position", **options))
    for a, b in zip(stock, ours):
        for field, expected in rows(a._dataset).items():
            assert torch.equal(rows(b._dataset)[field], expected), field


@pytest.mark.parametrize("length", [1, 3, 8, 50])
def test_windows_ask_for_every_training_interaction_once(world, length):
    # histories out of prefix rows need rows that reach back to the first item
    histories = training_histories(
        world.loaders(world.config("SASRec", MAX_ITEM_LIST_LENGTH=50))[0]._dataset
    )
    train = world.loaders(world.config("CpSASRec", MAX_ITEM_LIST_LENGTH=length))[0]._dataset
    batch = train[torch.arange(len(train))]
    found = sorted(
        (
            int(user),
            inputs[: int(size)].tolist(),
            targets[: int(size)].tolist(),
        )
        for user, inputs, targets, size in zip(
            batch["user_id"], batch["item_id_list"], batch[NEXT_ITEMS], batch["item_length"]
        )
    )
    expected = sorted(
        (user, inputs, targets)
        for user, history in histories.items()
        for inputs, targets in windows(history, length)
    )
    assert found == expected
    assert int(batch[NEXT_ITEMS].count_nonzero()) == sum(len(h) - 1 for h in histories.values())


@pytest.mark.parametrize("training", ["all_positions", "last_position"])
def test_evaluation_rows_do_not_depend_on_the_objective(world, training):
    stock = world.loaders(world.config("GRU4Rec"))
    ours = world.loaders(world.config("CpGRU4Rec", training=training))
    for a, b in zip(stock[1:], ours[1:]):
        for field, expected in rows(a._dataset).items():
            assert torch.equal(rows(b._dataset)[field], expected), field


@pytest.mark.parametrize("model", ["CpSASRec", "SASRec"])
@pytest.mark.parametrize("training", ["all_positions", "last_position"])
def test_counts_are_those_of_the_training_interactions(world, model, training):
    stock = world.loaders(world.config("SASRec", MAX_ITEM_LIST_LENGTH=50))[0]._dataset
    expected = np.zeros(stock.item_num, dtype=np.int64)
    for history in training_histories(stock).values():
        np.add.at(expected, history, 1)
    options = {"training": training} if model.startswith("Cp") else {}
    dataset = world.loaders(world.config(model, **options))[0]._dataset
    assert item_counts(dataset).tolist() == expected.tolist()


@pytest.mark.parametrize("model", ["CpSASRec", "SASRec"])
def test_a_limit_of_one_item_counts_the_same(world, model):
    counts = [
        item_counts(world.loaders(world.config(model, MAX_ITEM_LIST_LENGTH=n))[0]._dataset)
        for n in (1, 8)
    ]
    assert counts[0].tolist() == counts[1].tolist()


def test_a_batch_holds_about_as_many_predictions_as_train_batch_size(world):
    train = world.loaders(world.config("CpSASRec", train_batch_size=64))[0]
    assert isinstance(train, PositionsDataLoader)
    sizes = [int(batch[NEXT_ITEMS].count_nonzero()) for batch in train]
    assert np.mean(sizes[:-1]) == pytest.approx(64, rel=0.2)
    assert sum(sizes) == int(train._dataset.inter_feat["item_length"].sum())


def test_an_empty_training_split_is_named(tmp_path):
    (tmp_path / "made-up").mkdir()
    lines = ["user_id:token\titem_id:token\ttimestamp:float", "u1\ti1\t1", "u2\ti2\t1"]
    (tmp_path / "made-up" / "made-up.inter").write_text("\n".join(lines) + "\n")
    world = World(str(tmp_path))
    with pytest.raises(CompressionError, match="training split to hold a target"):
        world.loaders(world.config("CpSASRec"))


@pytest.mark.parametrize("model", ["SASRec", "CpSASRec"])
def test_files_that_hold_prefixes_are_read_and_trained_on(tmp_path, model):
    rng = np.random.default_rng(0)
    (tmp_path / "made-up").mkdir()
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    lists = {}
    for part, n in (("train", 60), ("valid", 20), ("test", 20)):
        lists[part] = [rng.integers(0, 15, size=rng.integers(1, 6)) for _ in range(n)]
        rows = [
            f"u{i}\t{' '.join(f'i{x}' for x in row)}\ti{row[0]}"
            for i, row in enumerate(lists[part])
        ]
        (tmp_path / "made-up" / f"made-up.{part}.inter").write_text(header + "\n".join(rows) + "\n")
    world = World(str(tmp_path))
    options = {
        "benchmark_filename": ["train", "valid", "test"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "alias_of_item_id": ["item_id_list"],
        "training": "last_position",
    }
    if model == "SASRec":
        del options["training"]
    config = world.config(model, **options)
    train, valid, _ = world.loaders(config)
    lengths = train._dataset.inter_feat["item_length"]
    assert lengths.tolist() == [len(row) for row in lists["train"]]
    fresh = world.model(model, **options)
    loss = fresh.calculate_loss(next(iter(train)))
    assert torch.isfinite(loss)
    assert evaluate(fresh, valid)["ndcg@10"] > 0


def test_windows_of_files_that_hold_prefixes_are_refused(world):
    config = world.config("CpSASRec", benchmark_filename=["a", "b", "c"])
    from cprec_recbole.data.sequences import PositionsDataset

    dataset = PositionsDataset.__new__(PositionsDataset)
    dataset.config = config
    with pytest.raises(CompressionError, match="`training` to be last_position"):
        dataset._change_feat_format()
