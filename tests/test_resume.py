"""A run that was killed at any moment ends, once resumed, where one ends that was not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cprec_recbole
from cprec_recbole import CompressionError
from cprec_recbole.files import held
from cprec_recbole.host.checkpoint import read_checkpoint
from cprec_recbole.parallel.launch import launch
from cprec_recbole.training.run import Job, train
from tests import children

pytestmark = pytest.mark.usefixtures("ready_processes")

COMMON = {"epochs": 2, "train_batch_size": 128, "checkpoint_steps": 2, "learning_rate": 0.01}
SAMPLED = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni10"}
# what draws random numbers: dropout from torch, negatives from NumPy
CASES = {
    "dropout": ("CpSASRec", {"softmax": "tree"}),
    "negatives": ("CpGRU4Rec", {"loss_type": "BPR", "training": "last_position"}),
    "sampled": ("CpSASRec", {"eval_args": SAMPLED}),
    "two processes": ("CpSASRec", {}),
}
DEATHS = [
    ("dropout", "_step 1"),  # nothing is trained yet
    ("dropout", "_step 4"),  # between two writings
    ("dropout", "_step 9"),  # of a later epoch
    ("dropout", "half 3"),  # of last.pth
    ("dropout", "half 5"),  # of best.pth
    ("dropout", "replace 1"),  # the first file is whole, but not in its place
    ("dropout", "evaluate 2"),
    ("negatives", "_step 6"),
    ("sampled", "evaluate 3"),
    ("two processes", "_step 7"),
]


def a_job(world, case: str, out: Path, **options) -> Job:
    model, more = CASES[case]
    options = world.options(model, **{**COMMON, **more, **options})
    return Job(model, world.name, options, out=str(out), say=print)


def nproc_of(case: str) -> int:
    return 2 if case.startswith("two processes") else 1


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Folders of runs that nothing interrupted, by case."""
    found = {case: tmp_path_factory.mktemp("whole") / "out" for case in CASES}
    for case, out in found.items():
        nproc = nproc_of(case)
        launch(nproc, children.carry_out, [a_job(world, case, out)], nproc == 1)
    return found


@pytest.fixture(scope="module")
def resumed(world, tmp_path_factory):
    """Folders of runs that were killed and then resumed, by case and death."""
    found = {}
    for case, death in DEATHS:
        out = found[case, death] = tmp_path_factory.mktemp("killed") / "out"
        nproc = nproc_of(case)
        with pytest.raises(CompressionError, match="was ended by SIGKILL"):
            launch(*(nproc, children.carry_out_and_die, a_job(world, case, out), death, nproc == 1))
        assert not (out / "result.json").exists()
    for nproc in (1, 2):
        jobs = [
            replace(a_job(world, case, out), resume=True)
            for (case, _), out in found.items()
            if nproc_of(case) == nproc
        ]
        launch(nproc, children.carry_out, jobs, nproc == 1)
    return found


def same(one, other) -> bool:
    """Whether two states are equal, bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(("case", "death"), DEATHS)
def test_it_ends_where_it_would_have_ended(whole, resumed, case, death):
    one, other = whole[case], resumed[case, death]
    assert (one / "result.json").read_text() == (other / "result.json").read_text()
    for file in ("best.pth", "last.pth"):
        states = [torch.load(folder / file, weights_only=False) for folder in (one, other)]
        for state in states:
            state.pop("config", None)
        assert same(*states)
    names = {path.name for path in other.iterdir()}
    assert names == {"best.pth", "last.pth", "result.json"}  # and nothing half-written
    assert read_checkpoint(other / "best.pth").model == CASES[case][0]


def test_a_finished_run_says_so_and_gives_its_result(world, whole):
    lines = []
    job = replace(a_job(world, "dropout", whole["dropout"]), resume=True, say=lines.append)
    before = {path: path.stat().st_mtime_ns for path in whole["dropout"].iterdir()}
    assert train(job) == json.loads((whole["dropout"] / "result.json").read_text())
    assert lines == [f"The run in {whole['dropout']} is finished; this is its result."]
    assert before == {path: path.stat().st_mtime_ns for path in whole["dropout"].iterdir()}


def test_where_nothing_was_begun_it_starts_afresh_and_says_so(world, tmp_path):
    lines = []
    job = a_job(world, "dropout", tmp_path / "out", epochs=1)
    result = train(replace(job, resume=True, say=lines.append))
    assert lines[0] == f"There is nothing to resume in {tmp_path / 'out'} yet: starting afresh."
    assert result["test_result"]["ndcg@10"] > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"learning_rate": 0.02}, r"`learning_rate` to be 0\.01, .* but got 0\.02"),
        ({"seed": 7}, "`seed` to be 2020, .* but got 7"),
        ({"train_batch_size": 64}, "`train_batch_size` to be 128"),
        ({"softmax": "full"}, '`softmax` to be "tree"'),
        ({"epochs": 4}, "`epochs` to be 2"),
        ({"model": "CpGRU4Rec"}, "`[a-z_A-Z0-9]+` to be"),
        ({"nproc": 2}, "`nproc` to be 1, .* but got 2"),
        ({"rows": None}, "`dataset` to hold the interactions with which the run began"),
    ],
)
def test_another_option_is_named(world, whole, tmp_path, change, match):
    job = replace(a_job(world, "dropout", whole["dropout"]), resume=True)
    nproc, model = change.pop("nproc", 1), change.pop("model", job.model)
    if "rows" in change:
        data = tmp_path / world.name / f"{world.name}.inter"
        data.parent.mkdir()
        lines = (Path(world.data_path) / world.name / data.name).read_text().splitlines()
        data.write_text("\n".join([*lines[:-3], lines[-2], lines[-3].replace("i", "i1")]) + "\n")
        change = {"data_path": str(tmp_path)}
    job = replace(job, model=model, options={**job.options, **change})
    with pytest.raises(CompressionError, match=match):
        train(job, nproc)


def test_what_changes_nothing_of_the_training_may_change(world, whole):
    job = replace(a_job(world, "dropout", whole["dropout"]), resume=True)
    options = {**job.options, "checkpoint_steps": 0, "show_progress": True, "state": "ERROR"}
    assert train(replace(job, options=options))["test_result"]


@pytest.mark.parametrize(
    ("file", "cut", "match"),
    [
        ("last.pth", 0, r"last\.pth to be whole, but it is cut short"),
        ("last.pth", 20_000, r"last\.pth to be whole, but it is cut short"),
        ("result.json", 20, r"result\.json to hold the result of a run"),
        ("best.pth", None, r"best\.pth beside last\.pth, but it is missing"),
        ("last.pth", None, r"last\.pth beside .*best\.pth, but it is missing"),
    ],
)
def test_a_file_that_is_missing_or_cut_short_is_named(world, whole, tmp_path, file, cut, match):
    out = shutil.copytree(whole["dropout"], tmp_path / "out")
    content = (out / file).read_bytes()
    (out / file).unlink()
    if cut is not None:
        (out / file).write_bytes(content[:cut])
    with pytest.raises(CompressionError, match=match):
        train(replace(a_job(world, "dropout", out), resume=True))


def test_a_run_is_not_overwritten(world, whole):
    with pytest.raises(CompressionError, match=r"`out` to be a folder without a run, .* last\.pth"):
        train(a_job(world, "dropout", whole["dropout"]))


def test_two_runs_do_not_write_to_one_folder(world, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        held(tmp_path / "out"),
        pytest.raises(CompressionError, match="`out` to be a folder that nothing else writes to"),
    ):
        train(a_job(world, "dropout", tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())
    with held(tmp_path / "out"):
        pass


def test_a_run_with_recboles_own_model_has_a_folder_too(world, tmp_path):
    out = tmp_path / "out"
    result = cprec_recbole.run("BPR", world.name, config_dict=world.options("BPR"), out=out)
    assert {path.name for path in out.iterdir()} == {"best.pth", "result.json"}
    assert json.loads((out / "result.json").read_text()) == result
