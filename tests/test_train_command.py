"""`cprec train`: on one process, on several, under torchrun."""

import json
import os
import subprocess
import sys
from urllib.error import URLError

import pytest
import yaml

from cprec_recbole.commands.cli import main
from tests.builders import World

pytestmark = pytest.mark.usefixtures("ready_processes")


def arguments(world: World, model: str, **options) -> list[str]:
    """The command for a small model on made-up data."""
    given = world.options(model, **options)
    named = [f"--{name}={yaml.safe_dump(value).strip()}" for name, value in given.items()]
    named = [text.replace("\n...", "").replace("\n", " ") for text in named]
    inter = "--load_col={inter: [user_id, item_id, timestamp]}"
    kept = [text for text in named if not text.startswith("--load_col")]
    return ["train", "--model", model, "--dataset", world.name, inter, *kept]


def test_it_prints_a_line_an_epoch_and_the_metrics(world, tmp_path, capsys):
    out = tmp_path / "out"
    command = arguments(world, "CpGRU4Rec", epochs=2, metrics=["NDCG"], valid_metric="NDCG@10")
    assert main([*command, "--ranks=8,4", "--cutoffs=10", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["epoch 1", "epoch 2"]
    result = json.loads((out / "result.json").read_text())
    (row,) = (line for line in lines if "ndcg@10" in line)
    shown = [float(cell) for cell in row.split("│")[2:4]]
    measured = [result[part]["ndcg@10"] for part in ("best_valid_result", "test_result")]
    assert shown == pytest.approx(measured, abs=5e-5)
    assert result["best_valid_score"] == max(float(line.split()[-1]) for line in lines[:2])
    assert main([*command, "--ranks=8,4", "--cutoffs=10", "--out", str(out), "--resume"]) == 0
    assert "finished" in capsys.readouterr().out
    assert main([*command, "--ranks=8,2", "--cutoffs=10", "--out", str(out), "--resume"]) == 2
    assert "`ranks` to be [8, 4], with which the run began, but got [8, 2]" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("how", ["nproc", "torchrun"])
def test_two_processes_write_and_print_once(world, how, tmp_path, capfd):
    command = arguments(world, "CpGRU4Rec")
    if how == "nproc":
        assert main([*command, "--nproc", "2", "--out", str(tmp_path / "out")]) == 0
        printed = capfd.readouterr().out
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "cprec_recbole.commands.cli", *command, "--out=out"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        printed = done.stdout
        assert printed.count("epoch 1: training loss") == 1
    assert printed.count("ndcg@10") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("best.pth", "last.pth", "result.json")
    }


def test_data_that_cannot_be_downloaded_are_one_line(world, tmp_path, capsys, monkeypatch):
    """RecBole looks on the internet for a data set that is not there, where it knows the name."""

    def download(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", download)
    command = [*arguments(world, "CpSASRec"), "--dataset", "lastfm", f"--data-path={tmp_path}"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "cprec: Expected `data_path` to have a folder of the name of `dataset`, but there is none, "
        "and RecBole could not download the data (no network)."
    )


def test_options_of_ours_for_a_model_of_recboles_are_refused(world, capsys):
    assert main([*arguments(world, "SASRec"), "--ranks=8,4"]) == 2
    assert "`ranks` with one of CpNextItNet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "more"),
    [
        # nothing is validated; and an option which RecBole reads and names nowhere
        ("CpGRU4Rec", ["--eval_step=0", "--topk=[3]", "--metrics=[NDCG]", "--encoding=utf-8"]),
        ("BPR", ["--topk=[5]", "--metrics=[NDCG]", "--valid_metric=NDCG@5", "--of_its_own=1"]),
    ],
)
def test_what_recbole_takes_is_taken(world, model, more, capsys):
    options = [*arguments(world, model), "--load_col={inter: [user_id, item_id, timestamp]}"]
    assert main([*options, *more]) == 0
    assert f"{model} on {world.name}" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are POSIX's")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_had_enough_is_no_error(unbuffered):
    script = (
        "import argparse, sys\n"
        "from unittest.mock import Mock\n"
        "from cprec_recbole.commands import cli\n"
        "run = lambda *_: print('an answer\\n' * 100_000, flush=True)\n"
        "cli._parser = lambda argv: Mock(parse_known_args=lambda _: (Mock(run=run), []))\n"
        "sys.exit(cli.main([]))\n"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert (process.wait(), errors) == (0, b"")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--nproc", "0"], "`nproc` to be a whole number, 1 or more, but got 0"),
        (["--resume"], "`resume` with an `out` folder"),
        (["--model", "Nothing"], "`model` to be one of CpNextItNet"),
        (["--checkpoint_steps=2"], "`checkpoint_steps` with an `out` folder"),
        (["--checkpoint_step=2"], "did you mean `checkpoint_steps`"),
        (
            ["--load_col={inter: [user_id, item_id]}"],
            "`TIME_FIELD` to be a column of made-up.inter that is loaded, but got timestamp, and "
            "it has user_id, item_id, timestamp; load it, as by "
            "--load_col='{inter: [user_id, item_id, timestamp]}'",
        ),
        (["--out", "/dev/null/x"], "`out` to be a folder that can be written"),
        (["--shard_tail=true"], "did you mean `shard_tails`"),
        (["--shard_tails=true"], "no `shard_tails`, which this version no longer has"),
        (["--clip_grad_norm={max_norm: 0}"], "the max_norm of `clip_grad_norm` to be above 0"),
        (["--metrics=[NDCG]", "--valid_metric=NDCG@7"], "`valid_metric` to be one of NDCG@"),
        (
            ["--topk=[100]", "--valid_metric=MRR@100"],
            "`topk` to be at most the 40 items of the data",
        ),
        (["--loss_type=BPR", "--train_neg_sample_args=null"], "`train_neg_sample_args`"),
        (["--field_separator=,"], "`dataset` to be one that RecBole reads and splits"),
        (["--epochs=ten"], "`epochs` to be a whole number, 0 or more, but got 'ten'"),
        (["--learning_rate=-1"], "`learning_rate` to be a number above 0, but got -1"),
        (["--weight_decay=x"], "`weight_decay` to be a number, 0 or more, but got 'x'"),
        (["--hidden_size=15"], "options that a CpSASRec can have, but RecBole says: The hidden"),
        (["--hidden_act=foo"], "but RecBole says: nothing is called 'foo'"),
    ],
)
def test_bad_arguments_are_one_line(world, capsys, more, match):
    assert main([*arguments(world, "CpSASRec"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cprec: ")
    assert match in line
