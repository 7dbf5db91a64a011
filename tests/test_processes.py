"""Several processes do together what one does alone, or end together."""

import multiprocessing
import os

import pytest
import recbole.quick_start
import torch

import cprec_recbole
from cprec_recbole import CompressionError
from cprec_recbole.host.checkpoint import read_checkpoint
from cprec_recbole.parallel import launch as processes
from cprec_recbole.parallel.group import Place, place_of_torchrun
from cprec_recbole.parallel.launch import launch
from tests import children
from tests.builders import World

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0}
TRAINING = {"epochs": 2, "learning_rate": 0.01, **NO_DROPOUT}
UNTIED = {**TRAINING, "cutoffs": [6, 20], "tied": False}
CLIPPED = {"clip_grad_norm": {"max_norm": 0.5}}
LAST = {"training": "last_position", "train_batch_size": 128, "learner": "sgd", **CLIPPED}
FEW_ROWS = {"MAX_ITEM_LIST_LENGTH": 40, "train_batch_size": 28}  # two a step
CURVES = [
    ("CpNextItNet", {**TRAINING, "softmax": "tree", "tied": False, "reg_weight": 0.01}),
    ("CpSASRec", TRAINING),
    ("CpGRU4Rec", {**TRAINING, **LAST}),
    ("CpGRU4Rec", {**TRAINING, **FEW_ROWS}),
    ("CpSASRec", {**TRAINING, "negatives": 39}),  # all items, each once
    ("CpSASRec", {**UNTIED, "learner": "sgd", "learning_rate": 0.1}),
    ("CpSASRec", {**UNTIED, "learner": "sparse_adam", **CLIPPED}),
]
LISTS = {"metrics": ["NDCG", "MRR", "Precision", "MAP"], "topk": [1, 5], "valid_metric": "NDCG@5"}
GAUC = {"metrics": ["GAUC"], "valid_metric": "GAUC"}
METRICS = [("CpSASRec", LISTS), ("CpGRU4Rec", GAUC), ("SASRec", LISTS), ("BPR", LISTS)]
OF_TWENTY = {"topk": [20], "valid_metric": "NDCG@20"}
OF_FEW = [("CpGRU4Rec", OF_TWENTY), ("BPR", OF_TWENTY)]

pytestmark = pytest.mark.usefixtures("ready_processes")


@pytest.fixture(scope="module")
def found(tmp_path_factory, ready_processes):
    """What one process finds, and three: curves, metrics, and metrics where one has no rows."""
    some, few = (World.made_up(tmp_path_factory.mktemp("data"), n_users=n) for n in (20, 2))
    tasks = [(children.curves, some, *CURVES), (children.metrics, some, *METRICS)]
    tasks.append((children.metrics, few, *OF_FEW))
    places, *together = launch(3, children.several, (children.places,), *tasks)
    assert places == [(rank, 3, 6.0) for rank in range(3)]
    return list(zip(children.several(*tasks), together))


@pytest.mark.parametrize("case", range(len(CURVES)))
def test_three_processes_take_the_steps_of_one(found, case):
    one, other = (curves[case] for curves in found[0])
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-9)
    assert one["weights"].keys() == other["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, other["weights"][name], rtol=1e-6, atol=1e-9)
    assert (one["valid"], one["test"]) == (other["valid"], other["test"])
    assert one["losses"][-1] < one["losses"][0]
    assert one["is sparse"] == other["is sparse"]
    assert any(one["is sparse"]) == (CURVES[case][1].get("cutoffs") is not None)


def test_metrics_are_those_of_all_rows_digit_for_digit(found):
    for alone, together in found[1:]:
        assert alone == together
        assert any(alone[0].values())


def test_processes_start_as_they_do_outside_of_the_tests(monkeypatch):
    monkeypatch.setattr(processes, "START_METHOD", "spawn")
    assert launch(1, os.getppid) == os.getpid()


@pytest.mark.parametrize(
    ("how", "kind", "match"),
    [
        ("error", CompressionError, r"^Expected `x` to be 1\.$"),
        ("defect", RuntimeError, r"(?s)^Process 1 of 2 .*Traceback.*KeyError: 'no such thing'"),
        ("kill", CompressionError, "process 1 was ended by SIGKILL, as a system does that runs"),
        ("exit", CompressionError, "process 1 left with exit code 3"),
    ],
)
def test_one_that_ends_ends_all_while_others_wait_for_it(how, kind, match):
    with pytest.raises(kind, match=match):
        launch(2, children.end_one, how)
    assert not multiprocessing.active_children()


def test_processes_end_with_the_one_that_started_them():
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    starter = context.Process(target=children.start_two, args=(theirs,))
    starter.start()
    theirs.close()
    assert {ours.recv(), ours.recv()} == {0, 1}
    starter.kill()
    starter.join()
    with pytest.raises(EOFError):  # which is when nobody is left that could send
        ours.recv()


@pytest.mark.parametrize("name", ["CpSASRec", "SASRec"])
def test_only_the_first_process_writes_what_one_process_can_read(
    world, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = world.options(name, **NO_DROPOUT)
    loading = {**options, "worker": 2}  # processes of each loader's own
    result = cprec_recbole.run(name, world.name, nproc=2, config_dict=loading)
    (log,) = (tmp_path / "log" / name).iterdir()
    assert len(list((tmp_path / "log_tensorboard").iterdir())) == 1
    assert "test result" in log.read_text()
    (file,) = (tmp_path / "saved").iterdir()
    assert file.name.startswith(name)
    config, model, _, _, _, test = recbole.quick_start.load_data_and_model(str(file))
    trainer = recbole.utils.get_trainer(config["MODEL_TYPE"], name)(config, model)
    assert trainer.evaluate(test, load_best_model=False) == result["test_result"]
    if name == "CpSASRec":  # RecBole's own has DistributedSampler's batches on two processes
        assert result == cprec_recbole.run(name, world.name, config_dict=options)


@pytest.mark.parametrize("name", ["CpSASRec", "GRU4Rec"])
def test_one_process_does_what_run_recbole_does(world, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])
    results, weights = [], []
    for number, run in enumerate((cprec_recbole.run_recbole, cprec_recbole.run)):
        folder = f"saved-{number}"
        options = world.options(name, state="ERROR", checkpoint_dir=folder)
        results.append(run(name, world.name, config_dict=options))
        (file,) = (tmp_path / folder).iterdir()
        weights.append(read_checkpoint(file).state)
    assert results[0] == results[1]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_recboles_own_run_starts_processes_that_know_the_models(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test", "--epochs=2"])
    options = world.options("CpGRU4Rec", state="ERROR")
    del options["epochs"]
    result = recbole.quick_start.run("CpGRU4Rec", world.name, config_dict=options, nproc=2)
    assert result["test_result"]["ndcg@10"] > 0
    (file,) = (tmp_path / "saved").iterdir()
    assert torch.load(file, weights_only=False)["config"]["epochs"] == 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"nproc": "two"}, "`nproc`"),
        ({"model": None}, "`model`"),
        ({"dataset": "nothing"}, "`dataset`"),
        ({"config_dict": {"sharing": "all"}}, "`sharing` to be one of"),
        ({"config_dict": {"checkpoint_steps": -1}}, "`checkpoint_steps`"),
        ({"resume": True, "out": "x", "model": "BPR"}, "`resume` .* and one of CpNextItNet"),
        ({"config_file_list": ["none.yaml"]}, "`config_file_list` to be a YAML file"),
        ({"config_file_list": "none.yaml"}, "`config_file_list` to be a list of files"),
    ],
)
def test_bad_arguments_start_nothing(arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompressionError, match=match):
        cprec_recbole.run(**{"model": "CpSASRec", "dataset": "ml-100k", "nproc": 2, **arguments})
    assert not list(tmp_path.iterdir())


def environment(monkeypatch, **variables):
    there = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    there |= {"MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in (there | variables).items():
        monkeypatch.setenv(name, value)


def test_torchruns_variables_are_read(monkeypatch):
    assert place_of_torchrun() is None
    environment(monkeypatch)
    assert place_of_torchrun() == Place(3, 4, 1, 2, "env://")
    with pytest.raises(CompressionError, match=r"no `nproc` under torchrun, .* 4 processes"):
        cprec_recbole.run("CpSASRec", "ml-100k", nproc=2)
    environment(monkeypatch, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert place_of_torchrun() is None


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"RANK": "x"}, {"LOCAL_RANK": "-1"}])
def test_variables_that_contradict_each_other_are_named(monkeypatch, wrong):
    environment(monkeypatch, **wrong)
    with pytest.raises(CompressionError, match="RANK, WORLD_SIZE"):
        place_of_torchrun()
