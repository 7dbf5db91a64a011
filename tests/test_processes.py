"""Several processes do together what one does alone, or end together."""

import multiprocessing

import pytest
import recbole.quick_start
import torch

import cprec_recbole
from cprec_recbole import CompressionError
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.host.checkpoint import read_checkpoint
from cprec_recbole.parallel import launch as processes
from cprec_recbole.parallel.group import Place
from cprec_recbole.parallel.launch import launch
from cprec_recbole.training.run import Job
from tests import children
from tests.builders import World

NO_DROPOUT = {
    "CpNextItNet": {},
    "CpSASRec": {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0},
    "CpGRU4Rec": {"dropout_prob": 0.0},
}


pytestmark = pytest.mark.usefixtures("ready_processes")


def test_every_process_knows_its_place_and_the_first_answers():
    assert launch(3, children.places) == [(rank, 3, 6.0) for rank in range(3)]


def test_processes_that_import_everything_themselves(monkeypatch):
    monkeypatch.setattr(processes, "START_METHOD", "spawn")  # as outside of the tests
    assert launch(2, children.places) == [(rank, 2, 3.0) for rank in range(2)]


@pytest.mark.parametrize(
    ("how", "kind", "match"),
    [
        ("error", CompressionError, r"^Expected `x` to be 1\.$"),
        ("defect", RuntimeError, r"(?s)^Process 1 of 2 .*Traceback.*KeyError: 'no such thing'"),
        ("kill", CompressionError, "process 1 was ended by SIGKILL"),
        ("segfault", CompressionError, "process 1 was ended by SIGSEGV"),
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


def test_a_run_that_loses_a_process_ends(world, tmp_path):
    job = Job("CpGRU4Rec", world.name, world.options("CpGRU4Rec"), out=str(tmp_path / "out"))
    with pytest.raises(CompressionError, match="process 1 was ended by SIGKILL"):
        launch(2, children.carry_out_and_die, job, "_step 4", False)
    assert not (tmp_path / "out" / "result.json").exists()


def close(one, other):
    """Whether two trainings are the same, but for rounding."""
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-9)
    assert one["weights"].keys() == other["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, other["weights"][name], rtol=1e-6, atol=1e-9)
    assert one["valid"] == other["valid"]
    assert one["test"] == other["test"]


def test_two_processes_take_the_steps_of_one(world):
    training = {"epochs": 3, "learning_rate": 0.01}
    cases = [(name, {**training, **options}) for name, options in NO_DROPOUT.items()]
    cases += [
        ("CpNextItNet", {**training, "softmax": "tree", "tied": False, "reg_weight": 0.01}),
        (
            "CpGRU4Rec",
            {
                **training,
                **NO_DROPOUT["CpGRU4Rec"],
                "training": "last_position",
                "train_batch_size": 128,
                "clip_grad_norm": {"max_norm": 0.5},
                "learner": "sgd",
            },
        ),
    ]
    alone, together = children.curves(world, cases), launch(2, children.curves, world, cases)
    for one, other in zip(alone, together):
        close(one, other)
        assert one["losses"][-1] < one["losses"][0]


def test_looked_up_rows_have_sparse_gradients_on_several_processes_too(world, monkeypatch):
    """Of blocks that nothing but look-ups reads; small ones are stepped densely otherwise."""
    options = {**NO_DROPOUT["CpSASRec"], "epochs": 2, "cutoffs": [6, 20], "tied": False}
    cases = [
        ("CpSASRec", {**options, "learner": "sgd", "learning_rate": 0.1}),
        ("CpSASRec", {**options, "learner": "sparse_adam", "clip_grad_norm": {"max_norm": 0.5}}),
    ]
    monkeypatch.setattr(BlockEmbedding.look_up_sparsely, "__defaults__", (1,))
    assert all(world.model(name, **more).table.blocks[1].sparse for name, more in cases)
    alone = children.curves(world, cases)
    together = launch(2, children.curves, world, cases, True)
    for one, other in zip(alone, together):
        close(one, other)


def test_tails_spread_over_processes_are_refused(world):
    with pytest.raises(CompressionError, match="no `shard_tails`, which this version no longer"):
        world.model("CpSASRec", shard_tails=True)


def test_batches_with_fewer_rows_than_processes(world):
    options = {"MAX_ITEM_LIST_LENGTH": 40, "train_batch_size": 28}
    case = ("CpGRU4Rec", {**NO_DROPOUT["CpGRU4Rec"], **options})
    (train, _, _) = world.loaders(world.config(*case[:1], **case[1]))
    assert train.step == 2  # so the first process never has one, and the others always
    (other,) = launch(3, children.curves, world, [case])
    close(children.curves(world, [case])[0], other)


def test_metrics_are_those_of_all_rows_digit_for_digit(world):
    lists = {
        "metrics": ["NDCG", "MRR", "Precision", "MAP"],
        "topk": [1, 5],
        "valid_metric": "NDCG@5",
    }
    dense = {"metrics": ["GAUC"], "valid_metric": "GAUC"}
    cases = [
        ("CpSASRec", lists),
        ("CpGRU4Rec", dense),
        ("SASRec", lists),
        ("BPR", lists),
    ]
    alone = children.metrics(world, cases)
    assert launch(3, children.metrics, world, cases) == alone


def test_metrics_where_a_process_has_no_rows(tmp_path):
    few = World.made_up(tmp_path, n_users=2)
    options = {"topk": [20], "valid_metric": "NDCG@20"}
    cases = [("CpGRU4Rec", options), ("BPR", options)]
    alone = children.metrics(few, cases)
    assert launch(3, children.metrics, few, cases) == alone
    assert any(alone[0].values())


@pytest.mark.parametrize("name", ["CpGRU4Rec", "SASRec"])
def test_only_the_first_process_writes_what_one_process_can_read(
    world, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = cprec_recbole.run(name, world.name, nproc=2, config_dict=world.options(name))
    (log,) = (tmp_path / "log" / name).iterdir()
    assert len(list((tmp_path / "log_tensorboard").iterdir())) == 1
    assert "test result" in log.read_text()
    (file,) = (tmp_path / "saved").iterdir()
    assert file.name.startswith(name)
    assert read_checkpoint(file).model == name
    config, model, _, _, _, test = recbole.quick_start.load_data_and_model(str(file))
    trainer = recbole.utils.get_trainer(config["MODEL_TYPE"], name)(config, model)
    assert trainer.evaluate(test, load_best_model=False) == result["test_result"]


@pytest.mark.parametrize("name", ["CpSASRec", "SASRec"])
def test_loaders_may_have_processes_of_their_own(world, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dropout = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    options = world.options(name, worker=2, **dropout)
    found = cprec_recbole.run(name, world.name, nproc=2, config_dict=options)
    if name == "CpSASRec":  # RecBole's own has DistributedSampler's batches on two processes
        options["worker"] = 0
        assert found == cprec_recbole.run(name, world.name, config_dict=options)
    assert found["test_result"]["ndcg@10"] > 0


@pytest.mark.parametrize("name", ["CpSASRec", "GRU4Rec"])
def test_one_process_does_what_run_recbole_does(world, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])
    options = world.options(name, epochs=2, state="ERROR")
    results, weights = [], []
    for number, run in enumerate((cprec_recbole.run_recbole, cprec_recbole.run)):
        options["checkpoint_dir"] = f"saved-{number}"
        results.append(run(name, world.name, config_dict=dict(options)))
        (file,) = (tmp_path / f"saved-{number}").iterdir()
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
        ({"nproc": True}, "`nproc`"),
        ({"model": None}, "`model`"),
        ({"dataset": "nothing"}, "`dataset`"),
        ({"config_dict": {"sharing": "all"}}, "`sharing` to be one of"),
        ({"config_dict": {"checkpoint_steps": -1}}, "`checkpoint_steps`"),
        ({"resume": True, "out": "x", "model": "BPR"}, "`resume` with one of CpNextItNet"),
        ({"config_file_list": ["none.yaml"]}, "`config_file_list` to be a YAML file"),
    ],
)
def test_bad_arguments_start_nothing(arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompressionError, match=match):
        cprec_recbole.run(**{"model": "CpSASRec", "dataset": "ml-100k", "nproc": 2, **arguments})
    assert not list(tmp_path.iterdir())


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "1",
}


def test_torchruns_variables_are_read():
    assert Place.from_environment(TORCHRUN) == Place(3, 4, 1, 2, "env://")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert Place.from_environment({**TORCHRUN, **alone}) is None
    assert Place.from_environment({"RANK": "3"}) is None


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"RANK": "x"}, {"LOCAL_RANK": "-1"}])
def test_variables_that_contradict_each_other_are_named(wrong):
    with pytest.raises(CompressionError, match="RANK, WORLD_SIZE"):
        Place.from_environment({**TORCHRUN, **wrong})


def test_nproc_under_torchrun_is_refused(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CompressionError, match=r"no `nproc` under torchrun, .* 4 processes"):
        cprec_recbole.run("CpSASRec", "ml-100k", nproc=2)
