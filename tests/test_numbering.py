"""Items have the numbers that a model knows them by, or nothing is computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import load_data_and_model
from recbole.utils import get_trainer

from cprec_recbole import CompressionError, compress, evaluate, load_pretrained, recover
from cprec_recbole.commands.cli import main
from cprec_recbole.training.checkpoint import load_trained
from tests.builders import World
from tests.test_checkpoint import trained

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
ROWS = [
    f"u{u}\ti{i}\t{t}\n"
    for u in range(30)
    for t, i in enumerate(np.random.default_rng(u).permutation(12)[: 5 + u % 5])
]


def written(folder: Path, rows) -> World:
    world = World(str(folder))
    (folder / world.name).mkdir(parents=True, exist_ok=True)
    (folder / world.name / f"{world.name}.inter").write_text(HEADER + "".join(rows))
    return world


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return written(tmp_path_factory.mktemp("here"), ROWS)


@pytest.fixture(scope="module")
def reversed_rows(tmp_path_factory):
    return written(tmp_path_factory.mktemp("there"), ROWS[::-1])


@pytest.fixture(scope="module")
def folder(here, tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    here.model("CpSASRec", ranks=[8, 4], cutoffs=[0.5]).save_pretrained(out)
    return out


def loaders(world, name="CpSASRec"):
    return world.loaders(world.config(name))


OTHER = "item 1 is 'i\\d+' in the model and 'i\\d+' in the data"


def test_the_same_interactions_in_another_order_are_refused(here, reversed_rows, folder):
    train, valid, test = loaders(reversed_rows)
    small, fresh = load_pretrained(folder), here.model("CpSASRec")
    calls = [
        ("data", lambda: evaluate(small, test)),
        ("data", lambda: evaluate(fresh, test)),
        ("data", lambda: recover(small, None, train, epochs=1)),
        ("data", lambda: recover(small, here.model("SASRec"), train._dataset, epochs=1)),
        ("data", lambda: compress(here.model("SASRec"), data=train, ranks=[8, 4])),
        ("item_counts", lambda: compress(here.model("SASRec"), item_counts=train._dataset)),
        ("valid_data", lambda: compress(here.model("SASRec"), max_loss=0.9, valid_data=valid)),
        (
            "valid_data",
            lambda: recover(small, None, loaders(here)[0], epochs=1, valid_data=valid),
        ),
    ]
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    for argument, call in calls:
        with pytest.raises(CompressionError, match=f"Expected `{argument}` to number .*{OTHER}"):
            call()
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())


def test_the_data_of_a_model_is_taken(here, folder):
    train, valid, test = loaders(here)
    small = load_pretrained(folder)
    assert evaluate(small, test)
    assert recover(small, here.model("SASRec"), train, epochs=1, valid_data=valid, progress=False)
    assert compress(here.model("SASRec"), data=train, ranks=[8, 4])
    lists = compress(here.model("SASRec"), data=[[1, 2, 3], [2, 5]], ranks=[8, 4])
    assert evaluate(lists, test)


def test_names_of_a_folder_are_those_of_the_model(here, reversed_rows, folder, tmp_path):
    with pytest.raises(CompressionError, match=f"Expected `tokens` to number .*{OTHER}"):
        load_pretrained(folder).save_pretrained(tmp_path, tokens=loaders(reversed_rows)[0]._dataset)


def test_a_trainer_compares_too(here, reversed_rows):
    config = here.config("CpSASRec")
    train, valid, test = here.loaders(config)
    trainer = get_trainer(config["MODEL_TYPE"], "CpSASRec")(config, here.model("CpSASRec"))
    other = loaders(reversed_rows)
    with pytest.raises(CompressionError, match="Expected `train_data`"):
        trainer.fit(other[0], valid, saved=False)
    with pytest.raises(CompressionError, match="Expected `valid_data`"):
        trainer.fit(train, other[1], saved=False)
    with pytest.raises(CompressionError, match="Expected `eval_data`"):
        trainer.evaluate(other[2], load_best_model=False)
    assert trainer.evaluate(test, load_best_model=False)


def test_users_are_compared_where_a_model_knows_them(here, tmp_path):
    first = "".join(f"u0\ti{i}\t{i}\n" for i in range(12))  # which numbers all items
    rows = [row for row in ROWS if not row.startswith("u0\t")]
    one, other = (written(tmp_path / n, [first, *r]) for n, r in (("a", rows), ("b", rows[::-1])))
    caser = one.model("Caser", train_neg_sample_args=None)
    test = [world.loaders(world.config("Caser"))[2] for world in (one, other)]
    assert evaluate(caser, test[0])
    with pytest.raises(CompressionError, match="user 2 is 'u1' in the model and 'u29' in the data"):
        evaluate(caser, test[1])
    assert evaluate(one.model("SASRec"), test[1])  # which knows no users


def test_new_items_are_trained_on_where_they_were_added_in_the_order_of_their_ids(
    here, folder, tmp_path
):
    more = [f"u{u}\tnew{u % 2}\t{90 + u}\n" for u in range(20)]
    more += [f"u{u}\ti{u % 7}\t{190 + u}\n" for u in range(20)]
    train, _, test = loaders(written(tmp_path, [*ROWS, *more]))
    small = load_pretrained(folder)
    with pytest.raises(CompressionError, match="the model has 12 items and the data 14"):
        evaluate(small, test)
    small.add_items(["new1", "new0"])
    with pytest.raises(CompressionError, match="item 13 is 'new1' in the model and 'new0'"):
        recover(small, None, train, epochs=1)
    small = load_pretrained(folder)
    small.add_items(["new0", "new1"])
    recover(small, None, train, epochs=1, progress=False)
    assert evaluate(small, test)


def test_a_checkpoint_of_a_general_model_is_of_its_data(tmp_path):
    world = written(tmp_path, ROWS)
    file = trained(world, "BPR", tmp_path)
    assert load_data_and_model(file)
    written(tmp_path, ROWS[::-1])
    with pytest.raises(CompressionError, match="have other numbers"):
        load_data_and_model(file)


@pytest.mark.parametrize("name", ["SASRec", "CpSASRec"])
def test_a_checkpoint_is_of_the_data_that_it_was_trained_on(
    here, reversed_rows, tmp_path, name, capsys
):
    world = written(tmp_path / "mine", ROWS)
    options = {"ranks": [16], "cutoffs": [], "sharing": "none"} if name == "CpSASRec" else {}
    file = trained(world, name, tmp_path, **options)
    assert load_trained(file, {"data_path": here.data_path})
    assert load_data_and_model(file)
    command = ["compress", file, "--ranks", "8,4", "--out", str(tmp_path / "out")]
    assert main([*command, f"--data_path={reversed_rows.data_path}"]) == 2
    assert f"the items of {world.name} in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    written(tmp_path / "mine", ROWS[::-1])
    for load in (load_data_and_model, load_trained):
        with pytest.raises(CompressionError, match="have other numbers"):
            load(file)


def test_a_saved_data_set_is_not_read_once_its_files_have_changed(tmp_path):
    options = {"save_dataset": True, "save_dataloaders": True, "checkpoint_dir": str(tmp_path)}

    def read(world, **more):
        config = world.config("CpSASRec", **{**options, **more})
        dataset = create_dataset(config)
        train = data_preparation(config, dataset)[0]._dataset
        return [data.field2id_token["item_id"].tolist() for data in (dataset, train)]

    world = written(tmp_path, ROWS)
    first = read(world)
    assert read(world) == first
    assert len(list(tmp_path.glob("*.pth"))) == 2
    written(tmp_path, ROWS[::-1])
    assert read(world)[0] == read(world)[1] != first[0]
    link, options["checkpoint_dir"] = tmp_path / "link", str(tmp_path / "saved")
    for target, rows in (("one", ROWS), ("two", ROWS[::-1])):
        written(tmp_path / target, rows)
    for target in ("one", "two"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        assert (read(world, data_path=str(link)) == first) == (target == "one")
    other = written(tmp_path / "other", ROWS)  # not newer than what is saved, but elsewhere
    assert read(other) == first


# the order of time


@pytest.mark.parametrize("name", ["SASRec", "CpSASRec", "BPR"])
def test_times_are_ordered_in_full_precision(tmp_path, name):
    """Unix times of today; a float32 tells two apart that differ by 128 seconds."""
    rng = np.random.default_rng(0)
    times = np.round(1.7e9 + 1e-3 * rng.permutation(400), 3)
    rows = [f"u{i % 7}\ti{rng.integers(500)}\t{time!r}\n" for i, time in enumerate(times.tolist())]
    evaluation = {"order": "TO", "group_by": "user", "mode": "full", "split": {"RS": [8, 1, 1]}}
    world = written(tmp_path, rows)
    config = world.config(name, eval_args=evaluation, MAX_ITEM_LIST_LENGTH=100)
    dataset = world.loaders(config)[0]._dataset
    tokens = dataset.field2id_token
    expected = {}
    for row in sorted(rows, key=lambda row: float(row.split("\t")[2])):
        user, item, _ = row.split("\t")
        expected.setdefault(user, []).append(item)
    for user in range(1, 8):
        mine = dataset.inter_feat[dataset.inter_feat["user_id"] == user]
        found = [tokens["item_id"][item] for item in mine["item_id"]]
        if name != "BPR":  # whose first item is a row too
            found = [tokens["item_id"][mine["item_id_list"][0, 0]], *found]
        whole = expected[tokens["user_id"][user]]
        assert len(found) >= 0.7 * len(whole)
        assert found == whole[: len(found)]
