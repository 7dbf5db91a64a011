"""A run that died at any moment ends, once resumed, where one ends that did not."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import cprec_recbole
from cprec_recbole import CompressionError
from cprec_recbole.files import held
from cprec_recbole.host.checkpoint import read_checkpoint
from cprec_recbole.parallel.launch import launch
from cprec_recbole.training.run import Job, train, train_here
from tests import children

COMMON = {"epochs": 2, "train_batch_size": 128, "checkpoint_steps": 2, "learning_rate": 0.01}
SAMPLED = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni10"}
# what draws random numbers: dropout from torch, negatives from NumPy
CASES = {
    "dropout": ("CpSASRec", {"softmax": "tree"}),
    "negatives": ("CpGRU4Rec", {"loss_type": "BPR", "training": "last_position"}),
    "sampled": ("CpSASRec", {"eval_args": SAMPLED}),
    "softmax": ("CpGRU4Rec", {"negatives": 9, "learner": "sparse_adam"}),
}


class Death(BaseException):
    pass


def die():
    raise Death


def a_job(world, case: str, out: Path, **options) -> Job:
    model, more = CASES[case]
    options = world.options(model, **{**COMMON, **more, **options})
    return Job(model, world.name, options, out=str(out), say=print)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of a run of some case that nothing interrupted."""

    @cache
    def found(case):
        out = tmp_path_factory.mktemp("whole") / "out"
        train(a_job(world, case, out))
        return out

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


def assert_ends_alike(one: Path, other: Path) -> None:
    assert (one / "result.json").read_text() == (other / "result.json").read_text()
    assert same(*(read_checkpoint(folder / "best.pth").state for folder in (one, other)))
    # last.pth holds no code
    assert same(*(torch.load(out / "last.pth", weights_only=True) for out in (one, other)))
    names = {path.name for path in other.iterdir()}
    assert names == {"best.pth", "last.pth", "result.json"}  # and nothing half-written


@pytest.mark.parametrize(
    ("case", "death"),
    [
        ("dropout", "_step 1"),  # nothing is trained yet
        ("dropout", "_step 4"),  # between two writings
        ("dropout", "_step 9"),  # of a later epoch
        ("dropout", "save 3"),  # of last.pth
        ("dropout", "save 5"),  # of best.pth
        ("dropout", "write 5"),  # of last.pth, after best.pth
        ("dropout", "replace 1"),  # the first file is whole, but not in its place
        ("dropout", "evaluate 2"),
        ("negatives", "_step 6"),
        ("sampled", "evaluate 3"),
        ("softmax", "_step 5"),
    ],
)
def test_it_ends_where_it_would_have_ended(world, whole, tmp_path, monkeypatch, case, death):
    job = a_job(world, case, tmp_path / "out")
    with monkeypatch.context() as patch:
        children.die_at(death, die, patch.setattr)
        with pytest.raises(Death):
            train(job)
    assert not (tmp_path / "out" / "result.json").exists()
    train(replace(job, resume=True))
    assert_ends_alike(whole(case), tmp_path / "out")


@pytest.mark.usefixtures("ready_processes")
def test_two_processes_of_which_one_was_killed_while_it_wrote(world, tmp_path):
    one, other = (a_job(world, "sampled", tmp_path / name) for name in ("one", "other"))
    with pytest.raises(CompressionError, match="process 0 was ended by SIGKILL"):
        launch(2, children.carry_out_and_die, other, 0, "save 3")
    assert list((tmp_path / "other").glob(".*.tmp"))
    again = replace(other, resume=True)
    launch(2, children.several, (train_here, one), (train_here, again))
    assert_ends_alike(tmp_path / "one", tmp_path / "other")
    with pytest.raises(CompressionError, match=r"`nproc` to be 2, .* but got 1"):
        train(again)


def test_a_finished_run_says_so_and_gives_its_result(world, whole):
    out, lines = whole("dropout"), []
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    shown = {"checkpoint_steps": 0, "show_progress": True, "state": "ERROR"}  # which may change
    job = replace(a_job(world, "dropout", out, **shown), resume=True, say=lines.append)
    assert train(job) == json.loads((out / "result.json").read_text())
    assert lines == [f"The run in {out} is finished; this is its result."]
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


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
        ({"softmax": "full"}, '`softmax` to be "tree"'),
        ({"data_path": None}, "`dataset` to hold the interactions with which the run began"),
    ],
)
def test_another_option_is_named(world, whole, tmp_path, change, match):
    if "data_path" in change:
        data = tmp_path / world.name / f"{world.name}.inter"
        data.parent.mkdir()
        lines = (Path(world.data_path) / world.name / data.name).read_text().splitlines()
        data.write_text("\n".join([*lines[:-3], lines[-2], lines[-3].replace("i", "i1")]) + "\n")
        change = {"data_path": str(tmp_path)}
    with pytest.raises(CompressionError, match=match):
        train(replace(a_job(world, "dropout", whole("dropout"), **change), resume=True))


@pytest.mark.parametrize(
    ("file", "cut", "match"),
    [
        ("last.pth", 20_000, r"last\.pth to be whole, but it is cut short"),
        ("result.json", 20, r"result\.json to hold the result of a run"),
        ("best.pth", None, r"best\.pth beside .*last\.pth, but it is missing"),
        ("last.pth", None, r"last\.pth beside .*best\.pth, but it is missing"),
    ],
)
def test_a_file_that_is_missing_or_cut_short_is_named(world, whole, tmp_path, file, cut, match):
    out = shutil.copytree(whole("dropout"), tmp_path / "out")
    content = (out / file).read_bytes()
    (out / file).unlink()
    if cut is not None:
        (out / file).write_bytes(content[:cut])
    with pytest.raises(CompressionError, match=match):
        train(replace(a_job(world, "dropout", out), resume=True))


def test_a_run_is_not_overwritten(world, whole):
    with pytest.raises(CompressionError, match=r"`out` to be a folder without a run, .* last\.pth"):
        train(a_job(world, "dropout", whole("dropout")))


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
