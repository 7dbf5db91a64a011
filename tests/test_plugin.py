"""RecBole's own functions with our models, and what the rest of the process sees."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import recbole.quick_start
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.trainer import Trainer

import cprec_recbole
from cprec_recbole import CompressionError
from cprec_recbole.costs import part_sizes
from cprec_recbole.host.library import recbole_config
from tests.builders import SMALL

# all that these change is the cost of the test
CHEAP = {"epochs": 1, "MAX_ITEM_LIST_LENGTH": 5, "show_progress": False, "state": "ERROR"}


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """RecBole reads this process's command line and writes into the current folder."""
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["CpGRU4Rec", "SASRec"])
def test_recbole_runs_it_on_movielens_and_loads_it_again(alone, name):
    small = SMALL[name.removeprefix("Cp")]
    result = recbole.quick_start.run_recbole(
        model=name, dataset="ml-100k", config_dict={**CHEAP, **small}
    )
    assert 0 < result["test_result"]["ndcg@10"] < 1
    (file,) = (alone / "saved").glob(f"{name}-*.pth")
    config, model, _, _, _, test = recbole.quick_start.load_data_and_model(str(file))
    trainer = Trainer(config, model)
    again = trainer.evaluate(test, load_best_model=True, model_file=str(file))
    assert again == result["test_result"]
    trainer.resume_checkpoint(str(file))
    assert trainer.start_epoch == 1
    if name.startswith("Cp"):
        stored = torch.load(file, weights_only=False)["state_dict"]
        assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())
        assert part_sizes(model).total < model.n_items * 16  # smaller than the table alone


def test_options_come_from_the_command_line_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test", "--ranks=[8, 2]", "--cutoffs=[0.2]"])
    config = Config(model="CpSASRec", dataset="ml-100k")
    assert (config["ranks"], config["cutoffs"]) == ([8, 2], [0.2])
    assert config["sharing"] == "cross_block"


def test_a_bad_option_stops_before_any_data_is_read_and_unrelated_ones_are_left_alone(world):
    with pytest.raises(CompressionError, match="got `rankss`; did you mean `ranks`"):
        world.config("CpSASRec", rankss=[64, 16])
    with pytest.raises(CompressionError, match="`training` to be one of"):
        world.config("CpSASRec", training="every")
    assert world.config("CpSASRec", my_own_option=3)["my_own_option"] == 3
    with pytest.warns(UserWarning, match="`rank` is an option of another of RecBole's models"):
        assert world.config("CpSASRec", rank=3)["rank"] == 3


@pytest.mark.parametrize("name", ["LightGCN", "SpectralCF"])
def test_graph_models_are_built_on_current_scipy(world, name):
    model, batch = world.model(name), world.batch(name)
    loss = model.calculate_loss(batch)
    assert torch.isfinite(loss[0] if isinstance(loss, tuple) else loss)


def test_negative_samples_asked_for_by_hand_are_still_recboles_error(world):
    with pytest.raises(ValueError, match="train_neg_sample_args"):
        world.config("SASRec", train_neg_sample_args={"distribution": "uniform"})
    assert world.config("SASRec", loss_type="BPR")["train_neg_sample_args"]["sample_num"] == 1


def test_missing_values_are_filled_on_current_pandas(world, tmp_path):
    folder = tmp_path / "gaps"
    folder.mkdir()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"u{u}\ti{i}\t{'' if i == 2 else i}\t{i}" for u in range(3) for i in range(6)]
    (folder / "gaps.inter").write_text("\n".join(lines) + "\n")
    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    config = recbole_config("SASRec", "gaps", {"data_path": str(tmp_path), "load_col": columns})
    ratings = create_dataset(config).inter_feat["rating"]
    assert ratings.isna().sum() == 0
    assert ratings.iloc[2] == pytest.approx(np.mean([0, 1, 3, 4, 5]))


def test_columns_of_lists_are_read_on_current_pandas():
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}
    dataset = create_dataset(recbole_config("CpSASRec", "ml-100k", {"load_col": columns}))
    genres = dict(zip(dataset.item_feat["item_id"], dataset.item_feat["class"]))
    films = {"1": ["Animation", "Children's", "Comedy"], "242": ["Comedy"]}
    for film, expected in films.items():
        found = genres[dataset.token2id("item_id", film)]
        assert list(dataset.id2token("class", found)) == expected


def test_loaders_that_are_saved_can_be_trained_with(world, tmp_path):
    config = world.config("SASRec", save_dataloaders=True, checkpoint_dir=str(tmp_path))
    loaders = world.loaders(config)
    assert list(tmp_path.glob("*dataloader.pth"))
    assert all(loader.generator is not None for loader in loaders)
    assert loaders[0].sampler.generator is not None


def test_a_saved_data_set_is_of_its_own_split(world, tmp_path):
    rows = []
    for given in ({"LS": "valid_and_test"}, {"RS": [6, 2, 2]}):
        split = {"order": "TO", "mode": "full", "group_by": "user", "split": given}
        options = {"save_dataset": True, "checkpoint_dir": str(tmp_path), "eval_args": split}
        loaders = world.loaders(world.config("CpSASRec", **options))
        rows.append([len(loader._dataset) for loader in loaders])
    assert rows[0] != rows[1]


def test_importing_and_registering_twice_changes_nothing():
    before = Config._load_internal_config_dict
    importlib.reload(cprec_recbole)
    assert Config._load_internal_config_dict is before
    assert recbole.quick_start.run_recbole is cprec_recbole.run_recbole


OUTSIDE = """
import sys
import numpy, torch
names, load = set(dir(numpy)), torch.load
import cprec_recbole
from recbole.config import Config
sys.argv = ["test"]
Config(model="CpSASRec", dataset="ml-100k")
assert not set(dir(numpy)) - names - {"f2py", "testing", "ctypeslib", "ma", "matlib"}
assert not hasattr(numpy, "float"), "RecBole's names were put back into NumPy for everybody"
assert torch.load is load, "pickled code is run by it"
assert not torch.is_anomaly_enabled(), "RecBole's sine.py turned anomaly detection on"
ray = sys.modules.get("ray")
assert ray is None or hasattr(ray, "__file__"), "the stand-in for ray is visible"
print("clean")
"""


def test_the_process_outside_recbole_is_left_as_it_was(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", OUTSIDE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "clean", done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "from cprec_recbole import load_data_and_model",
        "import cprec_recbole, recbole.quick_start",
        "import cprec_recbole, recbole.data",
    ],
)
def test_recbole_reads_files_as_quickly_whatever_is_imported_first(first, tmp_path):
    asks = "from recbole.data.dataset import dataset; print(dataset.pd.read_csv.__module__)"
    command = [sys.executable, "-W", "ignore", "-c", f"{first}\n{asks}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "cprec_recbole.host.data", done.stderr
