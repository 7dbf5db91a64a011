"""RecBole's rows out of what is kept once, and the windows that are cut of them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset import SequentialDataset

from cprec_recbole import CompressionError, evaluate
from cprec_recbole.data import NEXT_ITEMS
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.data.windows import PositionsDataLoader
from tests.builders import World
from tests.oracles import StockDataset


def rows(dataset):
    batch = dataset[torch.arange(len(dataset))]
    return {field: batch[field] for field in batch}


def stock(world, **options):
    """RecBole's own data sets of the training, validation and test rows."""
    return StockDataset(world.config("SASRec", **options)).build()


def all_windows(loader):
    """Every window of a training loader in one batch."""
    return loader.collate_fn(list(range(loader.sample_size)))


def assert_same_rows(ours, expected):
    """All columns, in the same order, are equal; one by one, as a batch and by name."""
    assert ours.inter_feat.columns == expected.inter_feat.columns
    found = rows(ours)
    for field, column in rows(expected).items():
        assert torch.equal(found[field], column), field
        assert torch.equal(ours.inter_feat[field], column), field
        assert found[field].dtype == column.dtype


LAST_POSITION = {"training": "last_position"}


COLUMNS = (
    "user_id:token\titem_id:token\ttimestamp:float\trating:float\tshop:token\ttags:token_seq\t"
    "sizes:float_seq\n"
)


@pytest.mark.parametrize("numerical", [[], ["rating", "sizes"]])
def test_rows_have_a_list_of_every_column(tmp_path, numerical):
    rng = np.random.default_rng(0)
    lines = [
        f"u{rng.integers(5)}\ti{rng.integers(9)}\t{t}\t{rng.integers(5)}\ts{rng.integers(3)}\t"
        f"{' '.join('abc'[: rng.integers(4)])}\t{' '.join('123'[: rng.integers(1, 4)])}"
        for t in range(60)
    ]
    world = World(str(tmp_path))
    (tmp_path / "made-up").mkdir()
    (tmp_path / "made-up" / "made-up.inter").write_text(COLUMNS + "\n".join(lines) + "\n")
    options = {"load_col": None, "MAX_ITEM_LIST_LENGTH": 4, "numerical_features": numerical}
    for name, more in (("SASRec", {}), ("CpSASRec", {}), ("CpSASRec", LAST_POSITION)):
        loaders = world.loaders(world.config(name, **options, **more))
        for ours, expected in zip(loaders, stock(world, **options)):
            assert len(ours._dataset.inter_feat.columns) == 14
            assert_same_rows(ours._dataset, expected)


def test_what_a_data_set_says_of_its_interactions_is_what_recboles_says(world):
    config = world.config("CpSASRec")
    whole = create_dataset(config)
    parts = [loader._dataset for loader in data_preparation(config, whole)]
    theirs = StockDataset(world.config("SASRec"))
    for ours, expected in zip([whole, *parts], [theirs, *theirs.build()]):
        assert type(ours) is SequentialDataset
        assert ours.inter_num == expected.inter_num
        assert ours.item_counter == expected.item_counter
        assert ours.user_counter == expected.user_counter
        assert ours.fields() == expected.fields()
        assert str(ours) == str(expected)
        assert (ours.inter_matrix("csr") != expected.inter_matrix("csr")).nnz == 0
        histories = []
        for dataset in (ours, expected):
            torch.manual_seed(0)  # RecBole shuffles them
            histories.append(dataset.history_item_matrix())
        assert all(torch.equal(a, b) for a, b in zip(*histories))
        assert set(ours.fields()) <= {*ours.inter_feat.columns, "timestamp"}


def test_what_is_done_to_rows_is_done_to_their_lists(world):
    ours, expected = create_dataset(world.config("CpSASRec")), StockDataset(world.config("SASRec"))
    for dataset in (ours, expected):
        dataset._change_feat_format()
        torch.manual_seed(0)
        dataset.shuffle()
        dataset.sort(by=["item_id", "user_id"])
    assert_same_rows(ours, expected)
    indices = [3, -1, slice(2, 9), [4, 4, 1], np.array([5, 0]), torch.tensor([7]), []]
    indices += [torch.tensor(3), torch.tensor([]), torch.tensor([1, 0, 1], dtype=torch.uint8)]
    for index in [*indices, expected.inter_feat["item_length"] == 1]:
        a, b = ours.inter_feat[index], expected.inter_feat[index]
        assert all(torch.equal(a[name], b[name]) for name in b)
    columns = ours.inter_feat.interaction
    again = pickle.loads(pickle.dumps(ours.inter_feat))
    for found in (
        columns.copy(),
        {name: columns.get(name) for name in columns},
        {name: copy.deepcopy(columns).pop(name) for name in columns},
        {name: again[name] for name in again},
        ours.inter_feat.to("cpu").interaction,
    ):
        assert list(found) == expected.inter_feat.columns
        assert all(torch.equal(found[name], expected.inter_feat[name]) for name in found)
    prefixed, theirs = copy.deepcopy(ours.inter_feat), copy.deepcopy(expected.inter_feat)
    for feat in (prefixed, theirs):
        feat.add_prefix("p_")
        torch.manual_seed(0)
        feat.shuffle()
    assert prefixed.columns == theirs.columns
    assert torch.equal(prefixed["p_item_id_list"], theirs["p_item_id_list"])
    ours.sort(by="item_id", ascending=False)  # RecBole's own fails on NumPy's negative strides
    assert ours.inter_feat["item_id"].tolist() == sorted(columns["item_id"].tolist(), reverse=True)
    ours.inter_feat.drop("timestamp_list")
    ours.inter_feat["item_id_list"] = torch.ones(len(ours), 1)
    assert "timestamp_list" not in ours.inter_feat
    assert ours.inter_feat["item_id_list"].shape == (len(ours), 1)


class MyDataset(SequentialDataset):
    """As a script makes its own."""

    def data_augmentation(self):
        super().data_augmentation()
        self.inter_feat = self.inter_feat[self.inter_feat["item_length"] > 1]


def test_rows_that_do_not_tell_where_they_lie_are_trained_on_one_by_one(world):
    config = world.config("CpSASRec")
    with pytest.raises(CompressionError, match="`training` to be last_position"):
        data_preparation(config, MyDataset(config))
    config = world.config("CpSASRec", training="last_position")
    train = data_preparation(config, MyDataset(config))[0]
    assert min(int(batch["item_length"].min()) for batch in train) == 2


def test_windows_are_of_rows_that_nobody_changed(world):
    config = world.config("CpSASRec")
    for change in (
        lambda feat: feat.__setitem__("item_id_list", torch.ones(len(feat), 8, dtype=torch.int64)),
        lambda feat: feat.__setitem__("item_id", torch.ones_like(feat["item_id"])),
        lambda feat: feat.drop("item_id_list"),
        lambda feat: feat._reindex([0, 0, 1]),
    ):
        train = world.loaders(config)[0]._dataset
        change(train.inter_feat)
        with pytest.raises(CompressionError, match="`training` to be last_position"):
            PositionsDataLoader(config, train, None)
    loader = world.loaders(config)[0]
    before = all_windows(loader)
    loader._dataset.inter_feat.shuffle()
    after = all_windows(loader)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_part_is_split_again_even_an_empty_one(world):
    train = world.loaders(world.config("CpSASRec"))[0]._dataset
    with pytest.raises(NotImplementedError, match="leave_one_mode"):  # as RecBole says
        train.leave_one_out("user_id", "first")
    empty = train.split_by_ratio([1, 0])[1]
    for group_by in (None, "user_id"):
        assert [len(part) for part in empty.split_by_ratio([0.5, 0.5], group_by)] == [0, 0]


def test_counts_are_those_of_the_training_interactions_under_any_limit_of_items(world):
    train = stock(world, MAX_ITEM_LIST_LENGTH=50)[0]
    batch = rows(train)
    firsts = batch["item_id_list"][batch["item_length"] == 1][:, 0]
    expected = torch.cat([batch["item_id"], firsts]).bincount(minlength=train.item_num)
    for dataset in (
        train,
        world.loaders(world.config("SASRec"))[0]._dataset,
        world.loaders(world.config("CpSASRec", MAX_ITEM_LIST_LENGTH=1))[0]._dataset,
    ):
        assert item_counts(dataset).tolist() == expected.tolist()


def test_a_batch_holds_about_as_many_predictions_as_train_batch_size(world):
    train = world.loaders(world.config("CpSASRec", train_batch_size=64))[0]
    assert isinstance(train, PositionsDataLoader)
    sizes = [int(batch[NEXT_ITEMS].count_nonzero()) for batch in train]
    assert np.mean(sizes[:-1]) == pytest.approx(64, rel=0.2)
    assert sum(sizes) == len(train._dataset)


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
    lists = {}
    for part, n in (("train", 60), ("valid", 20), ("test", 20)):
        lists[part] = [rng.integers(0, 15, size=rng.integers(1, 6)) for _ in range(n)]
        text = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
        for i, row in enumerate(lists[part]):
            text += f"u{i}\t{' '.join(f'i{x}' for x in row)}\ti{row[0]}\n"
        (tmp_path / "made-up" / f"made-up.{part}.inter").write_text(text)
    world = World(str(tmp_path))
    options = {
        "benchmark_filename": ["train", "valid", "test"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "alias_of_item_id": ["item_id_list"],
    }
    if model == "CpSASRec":
        with pytest.raises(CompressionError, match="`training` to be last_position"):
            world.loaders(world.config(model, **options))
        options |= LAST_POSITION
    train, valid, _ = world.loaders(world.config(model, **options))
    assert [len(part) for part in train._dataset.split_by_ratio([0.9, 0.1])] == [54, 6]
    lengths = train._dataset.inter_feat["item_length"]
    assert lengths.tolist() == [len(row) for row in lists["train"]]
    fresh = world.model(model, **options)
    assert torch.isfinite(fresh.calculate_loss(next(iter(train))))
    assert evaluate(fresh, valid)["ndcg@10"] > 0
