"""Comparisons: what is trained, that nothing is done twice, and what is written."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import zipfile
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import pytest
import torch
from rich.console import Console

from cprec_recbole import CompressionConfig, CompressionError
from cprec_recbole.commands.cli import main
from cprec_recbole.compare import Spec, as_markdown, findings_of, run_study
from cprec_recbole.compare import runner as running
from cprec_recbole.compare.contenders import UNCOMPRESSED_RECIPE, own_options
from cprec_recbole.compare.report import as_csv, as_latex
from cprec_recbole.compare.spec import Cell, Goal
from tests.builders import SMALL

STUDY = """
datasets: {made-up: 8}
models: [SASRec]
ratios: [1.5]
seeds: [1, 2]
contenders: [compressed, recovered, narrower, recjpq-random, full, int8]
settings:
  paper: {ranks: [16, 4, 1], softmax: tree}
learning_rates: [0.01, 0.001]
options: {epochs: 2, stopping_step: 1, train_batch_size: 64,
          hidden_size: 16, inner_size: 24, n_layers: 2, n_heads: 2}
"""
FEW = """
datasets: {made-up: 8}
models: [GRU4Rec]
ratios: [1.2]
seeds: [1]
contenders: [recovered, int8]
learning_rates: [0.01]
options: {epochs: 2, train_batch_size: 64, embedding_size: 16, hidden_size: 16}
"""
CHEAP = {"epochs": 2, "train_batch_size": 512, "MAX_ITEM_LIST_LENGTH": 8}
TIMES = ("score_ms", "epoch_seconds", "seconds an epoch", "ms to score", "Repeat it")


def spec_of(tmp_path, text=STUDY):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return Spec.read(str(file))


def run(spec, folder, world, **options):
    screen = Console(file=io.StringIO(), width=200)
    done = run_study(spec, folder, data_path=world.data_path, console=screen, **options)
    return done, screen.file.getvalue()


def trials_of(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "trials").glob("*.json")}


def tables_of(folder):
    """What is found in a folder, without what a clock says."""
    findings = findings_of(folder)
    rows = list(csv.DictReader(io.StringIO(as_csv(findings))))
    kept = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    lines = as_markdown(findings).splitlines()
    return kept, [line for line in lines if not any(name in line for name in TIMES)]


@pytest.fixture
def began(monkeypatch):
    """The trials that begin, as they do."""
    found, run_trial = [], running.run_trial

    def noted(trial, *arguments):
        found.append(trial)
        run_trial(trial, *arguments)

    monkeypatch.setattr(running, "run_trial", noted)
    return found


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A whole study: its folder, what became of it, and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    done, printed = run(spec_of(folder), folder / "out", world)
    return folder / "out", done, printed


@pytest.fixture(scope="module")
def few(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    run(spec_of(folder, FEW), folder / "out", world)
    return folder / "out"


def point(findings, contender, ratio=None):
    return findings.tables[0].find(contender, ratio)


# what is run


def test_every_contender_has_a_run_with_every_seed(finished):
    folder, done, printed = finished
    assert printed.startswith("14 runs, 0 of them finished before.")
    assert not done.failed
    assert {goal.contender for goal in done.dropped} == {"full"}  # what the compressed model is
    findings = findings_of(folder)
    (table,) = findings.tables
    names = [(p.contender, p.ratio) for p in table.points]
    made = [(name, 1.5) for name in ("compressed", "recovered", "narrower", "recjpq-random")]
    assert set(names) == {*made, ("uncompressed", None), ("int8", None), ("paper", None)}
    assert len(names) == 7
    for run_ in findings.finished:
        record = run_.record
        assert set(record["test"]) == {f"{m}@{k}" for m in ("hit", "mrr", "ndcg") for k in (5, 20)}
        # the file of users holds what RecBole's metric is the mean of
        assert run_.users.mean() == pytest.approx(record["test"]["ndcg@20"], abs=1e-6)
        cases = sum(part["cases"] for part in record["popularity"].values())
        assert cases == len(run_.users) == table.about["test_cases"]
        assert record["environment"]["torch"] == torch.__version__
    whole = point(findings, "uncompressed")
    for name, ratio in made[:-1]:  # the centroids of RecJPQ alone are more
        assert point(findings, name, ratio).parameters <= whole.parameters / 1.5
    assert point(findings, "int8").size < 0.4 * whole.size


def test_rates_are_searched_with_the_first_seed_and_the_best_is_used_for_all(finished):
    folder, done, _ = finished
    study, findings, found = done.study, findings_of(finished[0]), trials_of(folder)
    for goal in done.goals:
        trials = study.state(goal, found).tried
        if trials[0][0].rate is None:
            continue
        tried = {trial.rate: record["valid"]["ndcg@20"] for trial, record in trials}
        best = max(tried, key=lambda rate: tried[rate])
        runs = {r.goal.seed: r for r in point(findings, goal.contender, goal.ratio).runs}
        if goal.seed == 1:
            assert set(tried) == {0.01, 0.001}
            assert runs[1].search == tried
            assert {r.record["learning_rate"] for r in runs.values()} == {best}
        else:
            assert len(tried) == 1
    weights = {path.stem for path in (folder / "weights").iterdir()}
    assert all(found[name]["options"] == UNCOMPRESSED_RECIPE.options for name in weights)
    assert len(weights) == 3  # two rates with the first seed, one with the other
    recovered = point(findings, "recovered", 1.5)
    assert all(r.record["epochs"] == 1 for r in recovered.runs)  # a quarter of two, one at least


def test_a_finished_study_does_nothing_again(finished, world, tmp_path, began):
    before = tables_of(finished[0])
    done, printed = run(spec_of(tmp_path), finished[0], world)
    assert not began + list(done.failed)
    assert "14 runs, 14 of them finished before" in printed
    assert tables_of(finished[0]) == before


@pytest.mark.parametrize("seed", range(2))
def test_a_study_that_is_interrupted_again_and_again_comes_to_the_same(
    world, tmp_path, few, monkeypatch, seed
):
    draws, run_trial, stops = random.Random(seed), running.run_trial, []

    def stop(*epoch):
        if draws.random() < 0.4 and len(stops) < 6:
            stops.append(epoch)
            raise KeyboardInterrupt

    def interrupted(*arguments):
        *others, say = arguments
        run_trial(*others, lambda *epoch: stop(say(*epoch)))
        stop()  # once it is written

    text, out = FEW.replace("epochs: 2", "epochs: 4"), tmp_path / "out"
    run(spec_of(tmp_path, text), tmp_path / "whole", world)
    monkeypatch.setattr(running, "run_trial", interrupted)
    is_over = False
    while not is_over:
        with suppress(KeyboardInterrupt):
            run(spec_of(tmp_path, text), out, world)
            is_over = True
    assert stops
    assert tables_of(out) == tables_of(tmp_path / "whole")
    assert not list((out / "unfinished").iterdir())


def test_two_jobs_come_to_what_one_comes_to_and_a_process_that_is_killed_costs_its_trial(
    world, tmp_path, few, ready_processes, monkeypatch
):
    _, printed = run(spec_of(tmp_path, FEW), tmp_path / "out", world, jobs=2)
    assert tables_of(tmp_path / "out") == tables_of(few)
    assert re.search("recovered rate 0.01 seed 1: valid 0", printed)
    put = running._Display.epoch

    def kill(display, trial, *epoch):  # its first epoch is its process's last
        put(display, trial, *epoch)
        if trial.contender == "narrower":
            for child in running.multiprocessing.active_children():
                if child not in before:
                    os.kill(child.pid, signal.SIGKILL)

    before = set(running.multiprocessing.active_children())
    text = FEW.replace("[recovered, int8]", "[narrower]").replace("epochs: 2", "epochs: 40")
    monkeypatch.setattr(running._Display, "epoch", kill)
    spec = spec_of(tmp_path, text)
    done, _ = run(spec, tmp_path / "other", world, jobs=2, only=["*narrower*"])
    ((goal, reason),) = done.failed.items()
    assert (goal.contender, reason.partition(",")[0]) == ("narrower", "its process was ended")


def test_a_contender_that_fails_costs_itself_and_is_tried_again_when_asked(
    world, tmp_path, began, monkeypatch
):
    spec, out = spec_of(tmp_path), tmp_path / "out"
    noted = running.run_trial

    def failing(trial, *arguments):
        if trial.contender == "narrower" and (trial.rate, trial.seed) != (0.001, 1):
            raise RuntimeError("no room")
        noted(trial, *arguments)

    monkeypatch.setattr(running, "run_trial", failing)
    done, printed = run(spec, out, world)
    assert {goal.key for goal in done.failed} == {"made-up_SASRec_L8_narrower_r1.5_s2"}
    assert "narrower rate 0.01 seed 1: failed: RuntimeError: no room (test_study.py:" in printed
    findings = findings_of(out)
    # the other rate of the first seed counts
    assert point(findings, "narrower", 1.5).search[0.01] is None
    assert "narrower ÷\u00a01.5 (seeds 2): RuntimeError: no room" in as_markdown(findings)
    began.clear()
    monkeypatch.setattr(running, "run_trial", noted)
    assert run(spec, out, world)[0].failed
    assert not began
    done, _ = run(spec, out, world, retry=True, only=["*narrower*"])
    assert not done.failed
    assert {trial.contender for trial in began} == {"narrower"}


def test_what_is_added_is_all_that_is_trained(world, tmp_path, finished, began):
    copied = shutil.copytree(finished[0], tmp_path / "copy")

    def added(old, new):
        began.clear()
        text.append(text[-1].replace(old, new))
        done, _ = run(spec_of(tmp_path, text[-1]), copied, world)
        assert not done.failed
        return {(trial.contender, trial.rate, trial.seed) for trial in began}

    text = [STUDY]
    # a rate that wins nowhere: the first seed's searches alone
    searched = ("uncompressed", "compressed", "recovered", "narrower", "recjpq-random", "paper")
    assert added("0.001]", "0.001, 1.0e-9]") == {(name, 1e-9, 1) for name in searched}
    points = findings_of(copied).points
    best = {point.contender: point.runs[0].record["learning_rate"] for point in points}
    # a seed, at the best rates
    assert added("seeds: [1, 2]", "seeds: [1, 2, 3]") == {
        (name, best[name] if name in searched else None, 3) for name in (*searched, "int8")
    }
    # a contender
    untied = added("full, int8]", "full, int8, untied]")
    (rate,) = {rate for _, rate, seed in untied if seed > 1}
    first = {("untied", rate, 1) for rate in (0.01, 0.001, 1e-9)}
    assert untied == first | {("untied", rate, seed) for seed in (2, 3)}
    # an option makes other models: nothing is mixed up
    assert {name for name, _, _ in added("epochs: 2", "epochs: 1")} >= set(searched)


def test_where_an_added_rate_wins_all_that_is_made_of_that_model_is_made_again(
    world, tmp_path, few, began
):
    out = shutil.copytree(few, tmp_path / "out")
    slow = FEW.replace("[0.01]", "[1.0e-9]")
    run(spec_of(tmp_path, slow), out, world)
    began.clear()
    run(spec_of(tmp_path, FEW.replace("[0.01]", "[1.0e-9, 0.01]")), out, world)
    # 0.01 was trained before, and what is made of it at 0.01
    assert [(t.contender, t.rate) for t in began] == [("recovered", 1e-9)]
    assert point(findings_of(out), "uncompressed").runs[0].record["learning_rate"] == 0.01


def test_a_published_study_is_read_from_one_file_and_can_be_gone_on_with(
    world, tmp_path, few, began
):
    out = tmp_path / "published"
    out.mkdir()
    with zipfile.ZipFile(out / "trials.zip", "w") as packed:
        for path in (few / "trials").iterdir():
            packed.write(path, path.name)
    shutil.copy(few / "study.json", out)
    assert tables_of(out) == tables_of(few)
    run(spec_of(tmp_path, FEW), out, world)
    assert not began
    # what is made of a model whose weights are not there needs it once more
    run(spec_of(tmp_path, FEW.replace("int8]", "int8, uniform-svd]")), out, world)
    assert [trial.contender for trial in began] == ["uncompressed", "uniform-svd"]


def test_other_interactions_under_the_same_name_are_refused(world, tmp_path, few, began):
    out = shutil.copytree(few, tmp_path / "out")
    data = shutil.copytree(world.data_path, tmp_path / "data")
    with (data / "made-up" / "made-up.inter").open("a") as file:
        file.write("u1\ti1\t99\n")
    text = FEW.replace("int8]", "int8, narrower]")
    with pytest.raises(CompressionError, match="they have changed; use another --out"):
        run_study(spec_of(tmp_path, text), out, data_path=str(data))
    assert not began
    more = FEW.replace("seeds: [1]", "seeds: [1, 2]")  # nothing to plan
    done = run_study(spec_of(tmp_path, more), out, data_path=str(data))
    assert all("they have changed" in reason for reason in done.failed.values())
    assert {goal.seed for goal in done.failed} == {2}


def test_only_some_runs_and_what_they_need(world, tmp_path, began):
    spec = spec_of(tmp_path)
    done, _ = run(spec, tmp_path / "out", world, only=["*int8_s2"])
    assert [goal.key for goal in done.goals] == ["made-up_SASRec_L8_int8_s2"]
    assert [(t.contender, t.seed) for t in began] == [
        ("uncompressed", 1), ("uncompressed", 1), ("uncompressed", 2), ("int8", 2),
    ]  # fmt: skip
    with pytest.raises(CompressionError, match="`only` to be a pattern of keys"):
        run(spec, tmp_path / "out", world, only=["nothing"])


def test_where_float_cannot_be_that_small_int8_and_narrower_models_can(world, tmp_path):
    names = "[compressed, one-rank, recovered-int8, narrower, narrower-int8]"
    text = FEW.replace("[recovered, int8]", names).replace("[1.2]", "[2, 90]")
    done, _ = run(spec_of(tmp_path, text), tmp_path / "out", world)
    failed = {ratio: {g.contender for g in done.failed if g.ratio == ratio} for ratio in (2, 90)}
    assert failed == {2: {"compressed", "one-rank"}, 90: set(names[1:-1].split(", "))}
    assert all("budget" in reason for reason in done.failed.values())
    findings = findings_of(tmp_path / "out")
    whole = point(findings, "uncompressed").size
    for name in ("recovered-int8", "narrower", "narrower-int8"):
        assert point(findings, name, 2).size <= whole / 2 + 64  # and which block an item is in


# files


def test_damaged_files_are_named(few, tmp_path, world):
    out = shutil.copytree(few, tmp_path / "out")
    trial = next((out / "trials").glob("*compress*"))
    trial.write_text(trial.read_text()[:50])
    with pytest.raises(CompressionError, match=rf"{trial.name} to hold JSON.*remove it, and run"):
        findings_of(out)
    trial.unlink()
    next((out / "weights").iterdir()).write_bytes(b"no weights")
    done, _ = run(spec_of(tmp_path, FEW), out, world)
    ((goal, reason),) = done.failed.items()
    assert (goal.contender, "It was removed; --retry" in reason) == ("int8", True)
    done, _ = run(spec_of(tmp_path, FEW), out, world, retry=True)
    assert not done.failed
    assert tables_of(out) == tables_of(few)
    (out / "study.json").write_text('{"format": 1}')
    with pytest.raises(CompressionError, match=r"to be of this version.*another --out"):
        findings_of(out)


def test_tables_hold_the_figures_of_the_runs(finished):
    findings = findings_of(finished[0])
    rows = {row["key"]: row for row in csv.DictReader(io.StringIO(as_csv(findings)))}
    run_ = point(findings, "paper").runs[0]
    row, record = rows["made-up_SASRec_L8_paper_s1"], run_.record
    assert float(row["test_ndcg@20"]) == record["test"]["ndcg@20"]
    assert int(row["total_parameters"]) == sum(record["parameters"].values())
    assert row["block_ranks"] == "16/4/1"
    assert float(row["tail_hit@20"]) == record["popularity"]["tail"]["hit@20"]
    text, ours = as_markdown(findings), point(findings, "recovered", 1.5)
    assert f"| recovered | 1.5 | 2 | {ours.parameters:,.0f} |" in text
    assert f"{ours.quality.mean:.4f} ± {ours.quality.spread:.4f}" in text
    found, gain = ours.interval, ours.quality.mean - point(findings, "uncompressed").quality.mean
    assert f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]" in text
    assert found.mean == pytest.approx(gain, abs=1e-6)
    assert all(words in as_latex(findings) for words in (r"\bottomrule", "recjpq-random & 1.5 & 2"))


# the file


def test_a_file_says_what_to_run(tmp_path):
    spec = spec_of(tmp_path)
    names = "uncompressed compressed recovered narrower recjpq-random full int8 paper"
    assert spec.contenders == tuple(names.split())
    paper = CompressionConfig(ranks=(16, 4, 1), softmax="tree")
    assert spec.settings["paper"] == own_options(paper)
    goals = spec.goals()
    assert goals[0] == Goal(Cell("made-up", "SASRec", 8), "uncompressed", None, 1)
    assert len({goal.key for goal in goals}) == len(goals) == 16
    assert Spec.from_dict(json.loads(json.dumps(asdict(spec)))) == spec
    numbered = spec_of(tmp_path, "settings: {8: {ranks: [8]}}\ncontenders: [8]\nratios: [4, 4.0]")
    assert numbered.contenders == ("uncompressed", "8")
    assert numbered.ratios == {"ml-100k": (4.0,)}
    several = spec_of(tmp_path, "datasets: {a: [8, 8], b: 5}\nratios: {a: [2, 4], b: 8}")
    assert several.datasets == {"a": (8,), "b": (5,)}
    assert several.ratios == {"a": (2.0, 4.0), "b": (8.0,)}
    everything = spec_of(tmp_path, "datasets: [a, b]\ncontenders: all")
    assert everything.datasets == {"a": (50,), "b": (50,)}
    assert {"recovered", "hashing", "recjpq-svd", "tree"} <= set(everything.contenders)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset: ml-100k", "did you mean `datasets`"),
        ("models: [BERT]", "`models` to be one of NextItNet.*got 'BERT'"),
        ("ratios: [0.5]", "`ratios` to be a number of times"),
        ("ratios: []", "`ratios` to have one value"),
        ("ratios: {lastfm: 4}", "or a list for each of ml-100k, but got .*lastfm"),
        ("seeds: []", "`seeds` to have one value"),
        ("seeds: [a]", "`seeds` to be whole numbers"),
        ("contenders: [pruning]", "`contenders` to be one of all, uncompressed.*got 'pruning'"),
        ("sharing: [all]", "`sharing` to be one of none"),
        ("learning_rates: [0]", "`learning_rates` to be numbers between"),
        ("datasets: {a: 0}", r"length of 1 or more, but got {'a': \[0\]}"),
        ("datasets: {a/b: 5}", "`datasets` to hold names"),
        ("datasets: 5", "`datasets` to be names"),
        ("settings: {tree: {softmax: tree}}", "`settings` to have names"),
        ("settings: {mine: {rank: 3}}", "did you mean `ranks`"),
        (
            "settings: {mine: {dtype: int2}}",
            "setting mine to have `dtype` int8, mixed, int4 or.*'int2'",
        ),
        ("settings: [1]", "`settings` to hold names and values"),
        ("compression: {ranks: [4]}", "Expected an option out of softmax, tied, sharing"),
        ("compression: {softmax: flat}", "`softmax` to be one of"),
        ("options: {seed: 3}", "`options` to leave `seed` to the study"),
        ("options: {ranks: [3]}", "`options` to leave `ranks` to the study"),
        ("[1, 2]", "`study` to hold names and values"),
        ("datasets: [{ml-100k: 50}]", "`datasets` to be a list of values"),
        ("contenders: [{compressed: 4}]", "`contenders` to be a list of values"),
        ("seeds: [[1, 2]]", "`seeds` to be a list of values"),
        ("settings: {a: [64, 16]}", "the setting a to hold options such as"),
        ("settings: {yes: {ranks: [8]}}", "`settings` to have names of letters.*got True"),
        ("settings: {a: {training: last_position}}", "leave `training` to the study's `options`"),
        ("settings: {compressed-none: {ranks: [8]}}", "`settings` to have names"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, words):
    with pytest.raises(CompressionError, match=words):
        spec_of(tmp_path, text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("epochs: 2", "epoch: 2"), "did you mean `epochs`"),
        (("epochs: 2", "epochs: 0"), "`epochs` to be a whole number"),
        (("epochs: 2", "epochs: ten"), "`epochs` to be a whole number"),
        (("epochs: 2", "topk: [10], valid_metric: NDCG@10"), "to measure NDCG@20"),
        (("{made-up: 8}", "{missing: 8}"), "`dataset` to be ml-100k"),
        (("epochs: 2", "epochs: 2, eval_args: {mode: uni100}"), "`eval_args` to rank all items"),
        (("epochs: 2", "eval_args: {order: TO, split: {LS: test_only}}"), "out for validation"),
        (("epochs: 2", "epochs: 2, metrics: [NDCG, ItemCoverage]"), "to be of users alone"),
    ],
)
def test_what_recbole_refuses_is_found_before_training(world, tmp_path, began, change, words):
    with pytest.raises(CompressionError, match=words):
        run(spec_of(tmp_path, STUDY.replace(*change)), tmp_path / "out", world)
    assert not began


# a single comparison, and the command


@pytest.fixture(scope="module")
def single(world, tmp_path_factory):
    """The folder of a comparison with RecBole's own model and controls, by the command."""
    out = tmp_path_factory.mktemp("single")
    options = {**CHEAP, **SMALL["SASRec"], "data_path": world.data_path, "loss_memory": "64MiB"}
    arguments = ["compare", "--model", "SASRec", "--dataset", world.name, "--out", str(out)]
    arguments += ["--ranks", "16,8,4", "--seed=3", "--seeds", "2", "--with-stock"]
    arguments += ["--controls", "narrower", "narrower-int8", "full", "uniform-svd-recovered"]
    assert main([*arguments, *(f"--{k}={v}" for k, v in options.items())]) == 0
    return out


def test_a_single_comparison_has_all_that_a_study_has(single, capsys):
    findings = findings_of(single)
    (table,) = findings.tables
    # "full" is what the compressed model is
    others = ["narrower", "narrower-int8", "RecBole's own", "uniform-svd-recovered"]
    assert [p.contender for p in table.points] == ["uncompressed", "compressed", *others]
    sizes = {p.contender: p.runs[0].record["parameters"] for p in table.points}
    assert sizes["uncompressed"] == sizes["RecBole's own"]
    assert sizes["compressed"]["table"] < sizes["uncompressed"]["table"]
    assert point(findings, "narrower").parameters <= point(findings, "compressed").parameters
    assert point(findings, "narrower-int8").size <= point(findings, "compressed").size
    record = point(findings, "uncompressed").runs[0].record
    # RecBole's checkpoint holds Adam's two moments beside the weights
    assert record["checkpoint_bytes"] > 2 * record["weight_bytes"]
    assert point(findings, "compressed").interval.seeds == 2
    text = (single / "compare.md").read_text()
    ours, whole = point(findings, "compressed"), point(findings, "uncompressed")
    row = next(line for line in text.splitlines() if line.startswith("| NDCG@20 |"))
    first, second = (f"{p.quality.mean:.4f} ± {p.quality.spread:.4f}" for p in (whole, ours))
    share = ours.quality.mean / whole.quality.mean
    ratio = f"÷ {1 / share:.1f}" if share < 0.75 else f"x {share:.2f}"
    assert row.startswith(f"| NDCG@20 | {first} | {second} | {ratio} |")
    assert "leave one out, all items ranked, 59 cases; seeds 3 to 4" in text
    assert "Repeat it with `cprec compare --model SASRec" in text
    assert "nan" not in text.lower().replace("nant", "")
    assert {"compare.csv", "compare.html"} <= {path.name for path in single.iterdir()}


def test_the_command_measures_against_another_contender(single, capsys):
    arguments = ["compare", "--summary", "--out", str(single), "--latex", "--against"]
    assert main([*arguments, "narrower"]) == 0
    assert "compare.tex" in capsys.readouterr().out.replace("\n", "")
    assert "| to narrower |" in (single / "compare.md").read_text()
    assert main([*arguments, "tree"]) == 2
    assert "`against` to be out of RecBole's own, compressed" in capsys.readouterr().err


def test_the_command_runs_a_study(world, tmp_path, capsys):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(FEW.replace("[recovered, int8]", "[compressed, int8]").replace("1.2", "90"))
    arguments = ["compare", "--study", str(file), "--out", str(out)]
    for wrong in ("papers", "uncompressed"):
        assert main([*arguments, "--against", wrong, "--data-path", world.data_path]) == 2
        words = f"`against` to be out of compressed, int8, but got {wrong!r}"
        assert words in capsys.readouterr().err
        assert not out.exists()
    for _ in range(2):
        assert main([*arguments, "--data-path", world.data_path]) == 1
        printed = capsys.readouterr().out
        assert "1 of 3 runs failed" in printed
        assert "compressed_r90_s1 failed: Expected a budget of" in printed
    assert "## Failed" in (out / "compare.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "`model` to be one of"),
        ("--study s.yaml --model SASRec", "all in its file, but got `model`"),
        ("--study s.yaml --epochs=3", "all in its file, but got `epochs`"),
        ("--study s.yaml --controls tree", "but got `controls`"),
        ("--study missing.yaml", "missing.yaml"),
        ("--study s.yaml --seeds 3", "all in its file, but got `seeds`"),
        ("--study s.yaml --dataset x", "all in its file, but got `dataset`"),
        ("--study s.yaml --tied false", "all in its file, but got `tied`"),
        ("--study s.yaml --with-stock", "all in its file, but got `with_stock`"),
        ("--summary --only x", "`only` without --summary"),
        ("--summary --out nowhere", "`out` to be the folder of a study"),
        ("--model SASRec --seeds 0", "`seeds` to be a whole number, 1"),
        ("--model SASRec --jobs 0", "`jobs` to be a whole number, 1"),
        ("--model SASRec --dataset none", "`dataset` to be ml-100k, or"),
        ("--model SASRec --controls pruning", "`controls` to be one of all, recovered"),
        ("--model SASRec --ranks 128,16", "`ranks` to be at most"),
        ("--model SASRec --cutoffs 5000", "`cutoffs`"),
        ("--model SASRec --loss_memory=1", "`loss_memory` to be a size"),
        ("--model SASRec --epoch=3", "did you mean `epochs`"),
        ("--model SASRec --epochs=0", "`epochs` to be a whole number"),
        ("--model SASRec --eval_step=0", "`eval_step` to be a whole number"),
        ("--model SASRec --topk=[10]", "`valid_metric` to be one of Hit@10"),
        ("--model SASRec --metrics=[Hits]", "refuses these options"),
        (f"--model SASRec --out {__file__}", "`out` to be a folder"),
        (f"--model SASRec --config {__file__}", "`config` to be a YAML file"),
        ("--model SASRec --softmax=tree --loss_type=BPR", "`loss_type`"),
    ],
)
def test_bad_commands_are_one_line(arguments, words, capsys):
    assert main(["compare", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cprec: ")
    assert words in line


def test_a_full_disk_is_one_line(world, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "trial.json")

    monkeypatch.setattr(running, "write_text", full)
    file = tmp_path / "study.yaml"
    file.write_text(FEW)
    arguments = ["compare", "--study", str(file), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--data-path", world.data_path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "cprec: a file cannot be read or written: No space left on device (trial.json)"


def test_evaluating_every_second_epoch_counts_epochs(world, tmp_path):
    options = {**CHEAP, **SMALL["GRU4Rec"], "epochs": 4, "eval_step": 2}
    spec = Spec.single("GRU4Rec", world.name, options={**options, "data_path": world.data_path})
    run(spec, tmp_path, world, only=["*uncompressed*"])
    (record,) = trials_of(tmp_path).values()
    curve = record["valid_curve"]
    assert len(curve) == 2
    assert record["best_epoch"] == 2 * (1 + max(range(2), key=lambda i: (curve[i], i)))
    assert np.isfinite(record["epoch_seconds"]).all()
