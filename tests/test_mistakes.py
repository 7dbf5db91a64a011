"""A user's mistakes in options and data are one line that says what to change, before training."""

import json
import subprocess
import sys
from pathlib import Path
from pkgutil import walk_packages

import pytest
import recbole.trainer.hyper_tuning
import torch
from recbole.config import Config
from recbole.evaluator import Collector
from recbole.utils import get_trainer

import cprec_recbole
from cprec_recbole import CompressionError, evaluate, run
from cprec_recbole.commands.cli import main
from tests.builders import World
from tests.test_checkpoint import trained
from tests.test_train_command import arguments

RANKING = ("order: TO", "group_by: user", "mode: full")
NO_VALIDATION = "--eval_args={split: {LS: test_only}, " + ", ".join(RANKING) + "}"
SPLIT_BY = "--eval_args={split: %s, " + ", ".join(RANKING) + "}"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A file whose columns have names of their own, and none for the time."""
    folder = tmp_path_factory.mktemp("other")
    world = World(str(folder))
    (folder / world.name).mkdir()
    lines = [f"s{i % 9}\tp{i % 7}" for i in range(90)]
    head = "session:token\tproduct:token"
    (folder / world.name / f"{world.name}.inter").write_text("\n".join([head, *lines]) + "\n")
    for part in ("train", "valid", "test"):
        path = folder / world.name / f"{world.name}.{part}.inter"
        path.write_text("\n".join([head, *lines]) + "\n")
    return world


OWN_NAMES = ["--USER_ID_FIELD=session", "--ITEM_ID_FIELD=product", "--load_col=null"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--load_col=null"],
            "`USER_ID_FIELD` to be a column of made-up.inter that is loaded, but got user_id",
        ),
        ([*OWN_NAMES, "--ITEM_ID_FIELD=item"], "`ITEM_ID_FIELD` to be a column of made-up.inter"),
        (
            ["--USER_ID_FIELD=session", "--ITEM_ID_FIELD=product"],
            "load it, as by --load_col='{inter: [session, product]}'",
        ),
        (OWN_NAMES, "or write one, such as timestamp:float with the number of each line"),
        ([*OWN_NAMES, "--TIME_FIELD=null"], "time_field isn't set"),
        (
            [*OWN_NAMES, "--benchmark_filename=[train,valid,test]", "--training=last_position"],
            "the files of `benchmark_filename` to hold product_list:token_seq",
        ),
        ([*OWN_NAMES, "--benchmark_filename=[a,b,c]"], "made-up.a.inter not exist"),
    ],
)
def test_columns_that_are_not_there(other, capsys, more, message):
    assert main([*arguments(other, "CpSASRec"), *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("cprec: Expected ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([SPLIT_BY % "{LS: leave_one}"], "`LS` to be one of valid_and_test, valid_only, test_only"),
        ([SPLIT_BY % "null"], "The split_args in eval_args should not be None"),
        (["--log_wandb=True"], "`log_wandb` with the package wandb, but it is not installed"),
        (["--transform=crop"], "There is no transform named 'crop'"),
        (["--metrics=[Nothing]"], "There is no metric named 'Nothing'"),
        (["--valid_metric=7"], "RecBole refuses these options"),
        (["--learner=null", "--loss_type=XE"], "`loss_type` to be CE or BPR, but got 'XE'"),
        (["--n_heads=x"], "options that a CpSASRec can have"),
        (["--clip_grad_norm=x"], "options that a CpSASRec can have"),
        (["--eval_step=x"], "`eval_step` to be a whole number"),
        (["--MAX_ITEM_LIST_LENGTH=0"], "`MAX_ITEM_LIST_LENGTH` to be a whole number, 1 or more"),
        (["--learning_rate=0"], "`learning_rate` to be a number above 0, but got 0"),
        (["--weight_decay=x"], "`weight_decay` to be a number, 0 or more, but got 'x'"),
        (["--user_inter_num_interval=[99,inf)"], "Some feat is empty"),
        (["--rm_dup_inter=x"], "it says: keep must be"),
    ],
)
def test_options_that_recbole_cannot_have(world, capsys, more, message):
    assert main([*arguments(world, "CpSASRec"), *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


# work that is not lost at its end


@pytest.mark.parametrize("model", ["SASRec", "CpSASRec"])
def test_every_metric_ends_in_a_result(world, tmp_path, model):
    metrics = ["NDCG", "MAP", "GAUC", "ItemCoverage", "AveragePopularity", "ShannonEntropy"]
    metrics += ["GiniIndex", "TailPercentage"]
    options = world.options(model, metrics=metrics, valid_metric="NDCG@10")
    found = run(model, world.name, config_dict=options, out=tmp_path / "out")
    names = {name.split("@")[0] for name in found["test_result"]}
    assert names == {name.lower() for name in metrics}
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == found


def test_a_damaged_result_is_named(world, tmp_path, capsys):
    command = [*arguments(world, "CpSASRec", epochs=0), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    for text in ("[]", "{}", "NaN", '{"best_valid_result": 3}', "{"):
        (tmp_path / "out" / "result.json").write_text(text)
        assert main([*command, "--resume"]) == 2
        assert "to hold the result of a run, but it is damaged" in capsys.readouterr().err


LAST_POSITION = {"training": "last_position"}


def test_metrics_of_popularity_count_the_same_interactions_as_recboles(world):
    metrics = {"metrics": ["NDCG", "AveragePopularity", "ItemCoverage"], "valid_metric": "NDCG@10"}
    counts = []
    for name, training in (("SASRec", {}), ("CpSASRec", {}), ("CpSASRec", LAST_POSITION)):
        config = world.config(name, **metrics, **training)
        collector = Collector(config)
        collector.data_collect(world.loaders(config)[0])
        struct = collector.data_struct
        counts.append([struct.get("data.count_items"), struct.get("data.num_items")])
    assert counts[0] == counts[1] == counts[2]


def test_a_search_for_parameters_needs_no_ray(world, tmp_path, monkeypatch):
    from recbole.quick_start import objective_function

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script"])
    options = {"dataset": world.name, "ranks": "[8,4]", "cutoffs": "[0.3]", "state": "ERROR"}
    assert recbole.trainer.hyper_tuning.np.random.RandomState(0).integers(5) < 5  # for hyperopt
    found = objective_function({"model": "CpSASRec", **world.options("CpSASRec", **options)})
    assert found["test_result"]["ndcg@10"] >= 0


def test_without_validation_rows_the_test_is_measured(world, tmp_path, capsys):
    evaluation = {"split": {"LS": "test_only"}, "order": "TO", "group_by": "user", "mode": "full"}
    checkpoint = trained(world, "SASRec", tmp_path, eval_args=evaluation)
    command = ["compress", checkpoint, "--ranks", "8,4", "--out", str(tmp_path / "small")]
    assert main([*command, "--recover", "1"]) == 0
    printed = capsys.readouterr().out
    assert "test ndcg@10" in printed
    assert "valid ndcg@10" not in printed
    command = ["compress", checkpoint, "--max-loss", "0.5", "--out", str(tmp_path / "other")]
    assert main(command) == 2
    assert "`valid_data` to hold rows to evaluate, but it has none" in capsys.readouterr().err
    valid = world.loaders(world.config("SASRec", eval_args=evaluation))[1]
    with pytest.raises(CompressionError, match="`data` to hold rows to evaluate"):
        evaluate(world.model("SASRec", eval_args=evaluation), valid)


@pytest.mark.parametrize("split", ["test_only", "valid_only"])
def test_compare_says_that_it_needs_both_before_it_trains(world, tmp_path, capsys, split):
    command = ["compare", *arguments(world, "SASRec")[1:], "--out", str(tmp_path)]
    command.append(SPLIT_BY % f"{{LS: {split}}}")
    assert main(command) == 2
    missing = "validation" if split == "test_only" else "test"
    assert f"`eval_args` to leave rows out for {missing}" in capsys.readouterr().err


# models and modules of one's own


def test_a_subclass_is_trained_as_its_options_say(world, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script"])
    mine = type("MySASRec", (cprec_recbole.CpSASRec,), {"__module__": __name__})
    for training in ("all_positions", "last_position"):
        options = world.options("CpSASRec", training=training)
        batches = []
        for model in (cprec_recbole.CpSASRec, mine):
            config = Config(model=model, dataset=world.name, config_dict=options)
            trainer = get_trainer(config["MODEL_TYPE"], config["model"])
            assert trainer.__name__ == "CompressedTrainer"
            batches.append([batch["item_id_list"] for batch in world.loaders(config)[0]])
        assert all(torch.equal(a, b) for a, b in zip(*batches))
    taken = type("SASRec", (cprec_recbole.CpSASRec,), {})
    with pytest.raises(CompressionError, match="`model` to have a name of its own"):
        Config(model=taken, dataset=world.name, config_dict=options)


ALONE = """
import os, sys
import numpy, pandas, scipy.sparse, sklearn.metrics, torch, yaml  # what takes long, once
import torch.utils.tensorboard, thop
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        try:
            __import__(name)
        except BaseException as error:
            print(name, type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_every_module_can_be_imported_first():
    """As a process does that unpickles what is defined in it."""
    packages = ("data", "host", "parallel", "training")
    found = walk_packages(cprec_recbole.__path__, "cprec_recbole.")
    names = [each.name for each in found if each.name.split(".")[1] in packages]
    assert {"cprec_recbole.parallel.group", "cprec_recbole.data.windows"} < set(names)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, *names],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert done.stdout == ""
