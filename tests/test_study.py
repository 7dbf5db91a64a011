"""Studies: what is run in which order, that nothing is done twice, and what is written."""

import csv
import errno
import io
import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_model

from cprec_recbole import CompressionConfig, CompressionError
from cprec_recbole.commands.cli import main
from cprec_recbole.compare import fitting
from cprec_recbole.compare.findings import findings_of
from cprec_recbole.compare.findings.searches import Searches
from cprec_recbole.compare.study import Goal, Spec, conduct, run_study, write_summary
from cprec_recbole.compare.study.recipes import Planning, recipe_without_ratio
from cprec_recbole.compare.study.schedule import Schedule
from cprec_recbole.compare.study.spec import Cell, own_options
from cprec_recbole.compare.study.store import Store, read_json
from cprec_recbole.compare.study.work import save_weights
from cprec_recbole.compare.study.workers import News, Workers, _Worker, attempt
from cprec_recbole.training.state import Journal
from tests import studies

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
FEW = STUDY.replace("[1, 2]", "[1]").replace(
    "[compressed, recovered, narrower, recjpq-random, full, int8]", "[int8]"
)
FIELDS = {
    *("key", "dataset", "model", "length", "seed", "contender", "ratio", "options"),
    *("learning_rate", "search", "parameters", "total_parameters", "bytes", "valid", "test"),
    *("valid_curve", "best_epoch", "epochs", "epoch_seconds", "score_ms", "popularity"),
    *("command", "environment", "blocks", "sharing", "curve_metric", "eval_step"),
}
KEYS = {
    *(
        f"made-up_SASRec_L8_{name}_s{seed}"
        for name in ("uncompressed", "int8", "paper")
        for seed in (1, 2)
    ),
    *(
        f"made-up_SASRec_L8_{name}_r1.5_s{seed}"
        for name in ("compressed", "recovered", "narrower", "recjpq-random")
        for seed in (1, 2)
    ),
}  # fmt: skip


class Inline:
    """Workers that do their work in this process."""

    def __init__(self, jobs, spec, folder, data_path):
        self.arguments = spec, Store(folder, tidy=False), data_path
        self.work = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @property
    def is_idle(self):
        return self.work is None

    @property
    def has_room(self):
        return self.work is None

    def begin(self, work):
        self.work = work

    def news(self):
        work, self.work = self.work, None
        sent = []
        error = self.attempt(work, SimpleNamespace(send=sent.append))
        for kind, content in sent:
            assert kind == "epoch"
            yield News(work, epoch=content)
        yield News(work, ended=True, error=error)

    def attempt(self, work, pipe=None):
        return attempt(work, *self.arguments, pipe)


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(conduct, "Workers", Inline)


def spec_of(tmp_path, text=STUDY):
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return Spec.read(str(file))


def quiet():
    return Console(file=io.StringIO(), width=200)


def run(spec, folder, world, **options):
    screen = quiet()
    schedule = run_study(spec, folder, data_path=world.data_path, console=screen, **options)
    return schedule, screen.file.getvalue()


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A whole study: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct, "Workers", Inline)
        schedule, printed = run(spec_of(folder), folder / "out", world)
    return folder / "out", schedule, printed


def runs_of(folder):
    return {path.stem: read_json(path) for path in (folder / "runs").glob("*.json")}


# what is run


def test_every_run_is_kept_with_every_field(finished):
    folder, schedule, _ = finished
    runs = runs_of(folder)
    assert set(runs) == KEYS
    # "full" is what the compressed model is
    assert [goal.contender for goal in schedule.dropped] == ["full", "full"]
    for key, record in runs.items():
        derived = record["contender"] in ("int8", "recovered")
        assert set(record) == FIELDS | ({"source"} if derived else set())
        assert record["key"] == key
        assert record["total_parameters"] == sum(record["parameters"].values())
        assert record["command"] == f"cprec compare --only {key}"
        assert len(record["valid_curve"]) == record["epochs"] == len(record["epoch_seconds"])
        assert record["environment"]["torch"]
        if record["contender"] == "recjpq-random":
            assert record["blocks"] is None
            continue
        blocks = record["blocks"]
        assert sum(blocks["items"]) == 41
        d = record["options"].get("hidden_size", 16)
        assert record["parameters"]["table"] == sum(
            rank * items + (rank * d if rank < d else 0)
            for items, rank in zip(blocks["items"], blocks["ranks"])
        )
        chosen = {"recovered": "cross_layer", "compressed": "cross_layer", "paper": "cross_block"}
        assert record["sharing"] == chosen.get(record["contender"], "none")


def test_users_are_in_one_order_and_their_mean_is_recboles_metric(finished):
    folder, _, _ = finished
    sizes = set()
    for key, record in runs_of(folder).items():
        users = np.load(folder / "runs" / f"{key}.npy")
        assert users.dtype == np.float32
        sizes.add(users.shape)
        assert users.mean() == pytest.approx(record["test"]["ndcg@20"], abs=2e-6)
        parts = record["popularity"].values()
        total = sum((part["ndcg@20"] or 0.0) * part["cases"] for part in parts)
        assert total / len(users) == pytest.approx(record["test"]["ndcg@20"], abs=2e-6)
    assert sizes == {(59,)}


def test_rates_are_searched_with_the_first_seed_and_the_best_is_used_for_all(finished):
    folder, _, _ = finished
    runs = runs_of(folder)
    for key, record in runs.items():
        if record["contender"] == "int8":
            assert record["search"] == []
            assert record["learning_rate"] is None
            continue
        first = runs[f"{key[:-2]}s1"]
        assert [trial["learning_rate"] for trial in record["search"]] == [0.01, 0.001]
        best = max(record["search"], key=lambda trial: trial["valid"])
        assert record["learning_rate"] == best["learning_rate"]
        assert record["search"] == first["search"]
        assert first["valid"]["ndcg@20"] == best["valid"]
    # a training of the search is reused: 2 rates for seed 1, one for seed 2, int8 one each
    trained = {r["contender"] for r in runs.values()} - {"int8"}
    assert len(list((folder / "trials").glob("*.json"))) == 3 * len(trained) + 2
    assert Searches(findings_of(folder).cells).trainings == 3 * len(trained)


def test_weights_of_the_uncompressed_models_alone_are_kept_at_every_rate(finished):
    folder, _, _ = finished
    kept = {path.stem for path in (folder / "weights").iterdir()}
    uncompressed = [r for r in runs_of(folder).values() if r["contender"] == "uncompressed"]
    rates = {(r["seed"], trial["learning_rate"]) for r in uncompressed for trial in r["search"]}
    best = uncompressed[0]["learning_rate"]
    assert {tuple(key.split("_")[-2:]) for key in kept} == {
        (f"lr{rate:g}", f"s{seed}") for seed, rate in rates if seed == 1 or rate == best
    }
    assert len(kept) == 3


def test_weights_that_share_a_storage_are_kept_and_read(world, tmp_path):
    """As a GPU has those of a recurrent layer."""
    model = world.model("CpGRU4Rec", ranks=[16])
    parameters = list(model.inner.gru_layers.parameters())
    storage = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, storage.split([p.numel() for p in parameters])):
        parameter.data = part.view_as(parameter)
    save_weights(model, str(tmp_path / "weights.safetensors"))
    again = world.model("CpGRU4Rec", ranks=[16], seed=1)
    load_model(again, str(tmp_path / "weights.safetensors"))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_a_finished_study_does_nothing_again(finished, world, tmp_path, monkeypatch):
    folder, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    monkeypatch.setattr(conduct, "Workers", Inline)
    monkeypatch.setattr(Inline, "begin", lambda self, work: pytest.fail(work.key))
    schedule, printed = run(spec_of(tmp_path), folder, world)
    assert "16 runs, 14 of them finished before" in printed
    assert schedule.open == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == before


def test_what_takes_long_says_how_far_it_is_where_there_is_no_terminal(
    finished, world, tmp_path, inline, monkeypatch
):
    monkeypatch.setattr(conduct, "_SECONDS_BETWEEN_LINES", 0)
    _, printed = run(spec_of(tmp_path), tmp_path, world, only=["*uncompressed_s1"])
    (record,) = runs_of(tmp_path).values()
    for epoch, score in enumerate(record["valid_curve"], start=1):
        rate = record["learning_rate"]
        assert f"uncompressed rate {rate:g} seed 1: epoch {epoch}, valid {score:.4f}, " in printed
    assert " so far" not in finished[2]  # it took a few seconds


def test_sizes_are_near_what_was_asked(finished):
    folder, _, _ = finished
    runs = runs_of(folder)
    size = {r["contender"]: r["total_parameters"] for r in runs.values()}
    assert size["compressed"] <= size["uncompressed"] / 1.5
    assert size["recovered"] <= size["uncompressed"] / 1.5
    assert size["narrower"] <= size["compressed"]
    assert size["int8"] == size["uncompressed"]
    by_bytes = {r["contender"]: r["bytes"] for r in runs.values()}
    assert by_bytes["int8"] < 0.4 * by_bytes["uncompressed"]


def test_a_recovery_takes_a_quarter_of_the_epochs_at_most(finished):
    for record in runs_of(finished[0]).values():
        if record["contender"] == "recovered":
            assert record["epochs"] == 1
            assert record["options"]["ratio"] == 1.5


# interruptions and failures


def test_an_interrupted_study_goes_on_where_it_was(world, tmp_path, monkeypatch, finished):
    spec, folder = spec_of(tmp_path, FEW), tmp_path / "out"
    trained = []

    class Interrupted(Inline):
        left = 0

        def attempt(self, work, pipe=None):
            if not isinstance(work, Planning):
                if Interrupted.left == 0:
                    raise KeyboardInterrupt
                Interrupted.left -= 1
                trained.append(work.key)
            return super().attempt(work, pipe)

    monkeypatch.setattr(conduct, "Workers", Interrupted)
    for n in (0, 1, 3):
        Interrupted.left = n
        with pytest.raises(KeyboardInterrupt):
            run(spec, folder, world)
    Interrupted.left = 1000
    run(spec, folder, world)
    assert len(trained) == len(set(trained))  # nothing was trained twice
    whole, found = runs_of(finished[0]), runs_of(folder)
    assert len(found) == 3
    for key, record in found.items():
        assert record["test"] == whole[key]["test"], key


def test_a_setting_in_int8_is_the_float_one_in_a_quarter_of_the_bytes(world, tmp_path, inline):
    text = FEW.replace("[int8]", "[paper, small]").replace("0.01, ", "") + "\n"
    text = text.replace(
        "softmax: tree}\n",
        "softmax: tree}\n  small: {ranks: [16, 4, 1], softmax: tree, dtype: int8}\n",
    )
    run(spec_of(tmp_path, text), tmp_path / "out", world)
    runs = runs_of(tmp_path / "out")
    whole, small = (runs[f"made-up_SASRec_L8_{name}_s1"] for name in ("paper", "small"))
    assert small["options"] == {**whole["options"], "dtype": "int8"}
    for name in ("valid_curve", "best_epoch", "total_parameters", "blocks"):  # the same training
        assert small[name] == whole[name], name
    assert 0.2 < small["bytes"] / whole["bytes"] < 0.5
    assert abs(small["test"]["ndcg@20"] - whole["test"]["ndcg@20"]) < 0.03
    write_summary(tmp_path / "out")
    assert "| small" in (tmp_path / "out" / "compare.md").read_text()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def interrupted_in_its_second_epoch(spec, folder, world, monkeypatch):
    """Run a study until its first training is in its second epoch; returns a list of the epochs
    that are told of, then and from then on."""
    told = []

    class Interrupted(Inline):
        def attempt(self, work, pipe=None):
            def send(message):
                told.append(message[1][0])
                if told == [1, 2]:  # the second epoch is trained, but not finished
                    raise KeyboardInterrupt

            return super().attempt(work, SimpleNamespace(send=send))

    monkeypatch.setattr(conduct, "Workers", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(spec, folder, world)
    return told


@pytest.mark.parametrize(
    ("damage", "epochs"),
    [
        (lambda folder: None, [2]),
        (lambda folder: cut(folder / "last.pth"), [1, 2]),
        (lambda folder: (folder / "best.pth").unlink(), [1, 2]),
        (lambda folder: (folder / ".last.pth-1.tmp").write_bytes(b""), [2]),
    ],
    ids=["whole", "cut short", "without its best", "half written"],
)
def test_a_training_goes_on_in_the_epoch_in_which_it_was_interrupted(
    world, tmp_path, monkeypatch, finished, damage, epochs
):
    spec, folder = spec_of(tmp_path, FEW.replace("0.01, ", "")), tmp_path / "out"
    told = interrupted_in_its_second_epoch(spec, folder, world, monkeypatch)
    (state,) = (folder / "unfinished").iterdir()
    damage(state)
    before = len(told)
    run(spec, folder, world)
    assert told[before : before + len(epochs)] == epochs
    assert not list((folder / "unfinished").iterdir())  # a finished training leaves nothing there
    first = json.loads((folder / "trials" / f"{state.name}.json").read_text())
    same = json.loads((finished[0] / "trials" / f"{state.name}.json").read_text())
    assert len(first["epoch_seconds"]) == 2
    for name in ("valid", "test", "valid_curve", "best_epoch", "epochs"):
        assert first[name] == same[name], name


@pytest.mark.parametrize("change", ["another machine", "another model"])
def test_a_state_of_something_else_is_not_gone_on_with(world, tmp_path, monkeypatch, change):
    spec, folder = spec_of(tmp_path, FEW.replace("0.01, ", "")), tmp_path / "out"
    told = interrupted_in_its_second_epoch(spec, folder, world, monkeypatch)
    (state,) = (folder / "unfinished").glob("*/last.pth")
    if change == "another machine":
        monkeypatch.setattr(fitting, "environment", lambda device: {"processor": "Z80"})
    else:
        written = torch.load(state)
        written["model"] = {f"other.{name}": each for name, each in written["model"].items()}
        torch.save(written, state)
        run(spec, folder, world)
        assert "last.pth to be of this model" in str(runs_of(folder))
    run(spec, folder, world, retry=True)
    assert told[2:4] == [1, 2]  # from the start
    assert "error" not in str(runs_of(folder))
    assert not list((folder / "unfinished").iterdir())


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("memory"), ValueError("nan")])
def test_a_state_stays_where_the_training_is_not_to_blame(tmp_path, error):
    store = Store(tmp_path)
    folder = tmp_path / "unfinished" / "key"
    folder.mkdir(parents=True)
    with pytest.raises(type(error)), store.unfinished("key"):
        raise error
    assert folder.exists() == (not isinstance(error, ValueError))
    for record, stays in (({"error": "disk"}, True), ({"valid": {}}, False)):
        folder.mkdir(parents=True, exist_ok=True)
        store.write("trials", "key", record)
        Store(tmp_path, tidy=False)
        assert folder.exists()
        Store(tmp_path)
        assert folder.exists() == stays


def test_seconds_of_an_epoch_leave_out_the_writing_of_its_state(world, tmp_path, monkeypatch):
    now = [0.0]

    def slow(self, state):
        now[0] += 1000.0

    monkeypatch.setattr(fitting, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Journal, "write", slow)
    monkeypatch.setattr(conduct, "Workers", Inline)
    run(spec_of(tmp_path, FEW), tmp_path / "out", world)
    found = runs_of(tmp_path / "out")["made-up_SASRec_L8_uncompressed_s1"]
    assert found["epoch_seconds"] == [0.0, 0.0]


def test_a_training_goes_on_where_its_state_cannot_be_written(world, tmp_path, monkeypatch):
    def full(self, state):
        raise CompressionError("Expected `out` to be a folder that can be written.")

    monkeypatch.setattr(Journal, "write", full)
    monkeypatch.setattr(conduct, "Workers", Inline)
    with pytest.warns(UserWarning, match="The training goes on without it"):
        run(spec_of(tmp_path, FEW), tmp_path / "out", world)
    assert "error" not in str(runs_of(tmp_path / "out"))


def test_a_training_that_fails_is_not_gone_on_with(world, tmp_path, monkeypatch):
    def fail(message):
        raise ValueError("Training loss is nan")

    monkeypatch.setattr(conduct, "Workers", Inline)
    attempt_at = Inline.attempt
    pipe = SimpleNamespace(send=fail)
    monkeypatch.setattr(Inline, "attempt", lambda self, work, _: attempt_at(self, work, pipe))
    run(spec_of(tmp_path, FEW), tmp_path / "out", world)
    assert "nan" in runs_of(tmp_path / "out")["made-up_SASRec_L8_uncompressed_s1"]["error"]
    assert not list((tmp_path / "out" / "unfinished").iterdir())


def test_a_run_that_fails_is_written_down_and_stops_no_other(world, tmp_path, inline):
    text = FEW.replace("[int8]", "[compressed, recovered, narrower]").replace("[1.5]", "[400]")
    folder = tmp_path / "out"
    run(spec_of(tmp_path, text), folder, world)
    runs = runs_of(folder)
    failed = {key for key, record in runs.items() if "error" in record}
    names = ("compressed", "recovered", "narrower")
    assert failed == {f"made-up_SASRec_L8_{name}_r400_s1" for name in names}
    assert "Expected a budget of" in runs["made-up_SASRec_L8_compressed_r400_s1"]["error"]
    assert len(runs) == 5
    write_summary(folder)
    table = (folder / "compare.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("- SASRec on made-up")]
    assert len(lines) == 2
    assert "length 8, ratio 400: compressed, recovered (seeds 1): Expected" in lines[0]
    assert "length 8, ratio 400: narrower (seeds 1): Expected a budget of" in lines[1]
    assert "which is the narrowest model, but got" in lines[1]
    # tried again only where that is asked for
    before = {path.name for path in (folder / "trials").glob("*.json")}
    _, printed = run(spec_of(tmp_path, text), folder, world)
    assert "5 runs, 5 of them finished" in printed
    _, printed = run(spec_of(tmp_path, text), folder, world, retry=True)
    assert "5 runs, 2 of them finished" in printed
    assert {path.name for path in (folder / "trials").glob("*.json")} >= before - failed


def test_where_float_cannot_be_that_small_int8_and_narrower_models_can(world, tmp_path, inline):
    names = ["narrower", "compressed", "recovered", "recovered-int8", "narrower-int8"]
    text = FEW.replace("[int8]", f"[{', '.join([*names, 'uncompressed-recovered'])}]")
    folder = tmp_path / "out"
    run(spec_of(tmp_path, text.replace("[1.5]", "[5]")), folder, world)
    runs = {record["contender"]: record for record in runs_of(folder).values()}
    for name in ("compressed", "recovered"):
        assert "Expected a budget of" in runs[name]["error"]
    whole = runs["uncompressed"]
    assert runs["recovered-int8"]["options"] == {"ratio": 5}
    assert runs["narrower"]["total_parameters"] <= whole["total_parameters"] / 5
    # which block an item is in comes on top of what a budget counts
    assert runs["recovered-int8"]["bytes"] <= whole["bytes"] / 5 + 41
    rounded = runs["narrower-int8"]
    assert rounded["bytes"] <= whole["bytes"] / 5
    assert rounded["total_parameters"] > runs["narrower"]["total_parameters"]
    assert rounded["bytes"] < 3 * rounded["total_parameters"]  # in float it would be four times
    assert rounded["epochs"] > 0
    assert runs["uncompressed-recovered"]["ratio"] is None
    assert runs["uncompressed-recovered"]["bytes"] == whole["bytes"]
    for found in (rounded, runs["uncompressed-recovered"]):
        users = np.load(folder / "runs" / f"{found['key']}.npy")
        assert found["test"]["ndcg@20"] == pytest.approx(users.mean(), abs=1e-6)


def test_what_is_planned_stays_when_contenders_are_added(world, tmp_path, inline):
    folder, text = tmp_path / "out", FEW.replace("[int8]", "[narrower]")
    run(spec_of(tmp_path, text), folder, world)
    plan = next((folder / "plans").glob("*.json"))
    planned = read_json(plan)
    planned["narrower"]["options"]["hidden_size"] = 6  # as an older version might have chosen
    plan.write_text(json.dumps(planned))
    run(spec_of(tmp_path, text.replace("[narrower]", "[narrower, one-rank]")), folder, world)
    again = read_json(plan)
    assert again["narrower"] == planned["narrower"]
    assert again["one-rank"]["options"]["ranks"]


def test_shares_are_of_the_seeds_that_both_have(tmp_path):
    """And say of how many; what has nothing to be divided by is a dash."""
    (tmp_path / "runs").mkdir()
    values = {
        ("uncompressed", None): {1: [0.1, 0.1], 2: [0.3, 0.3], 3: [0.2, 0.2]},
        ("compressed", 4.0): {1: [0.2, 0.2], 2: [0.2, 0.2], 3: [0.2, 0.2]},
        ("narrower", 4.0): {1: [0.05, 0.05]},
        ("hashing", 4.0): {9: [0.1, 0.1]},
    }
    for (contender, ratio), seeds in values.items():
        for seed, users in seeds.items():
            made = studies.record("lastfm", "SASRec", contender, ratio, seed)
            made |= {"key": f"{contender}{seed}", "length": 50}
            made["test"] = {**made["test"], "ndcg@20": float(np.mean(users))}
            (tmp_path / "runs" / f"{made['key']}.json").write_text(json.dumps(made))
            np.save(tmp_path / "runs" / f"{made['key']}.npy", np.float32(users))
    write_summary(tmp_path, latex=True)
    text = (tmp_path / "compare.md").read_text()
    assert "|  | users | seeds | uncompressed |" in text
    assert "| SASRec, lastfm, 50 | 2 | 3 | 0.2000 ± 0.1000 |" in text
    assert "| ÷ 4 | users | seeds | compressed | hashing | narrower |" in text
    assert "| SASRec, lastfm, 50 | 2 | 3 | 100% (100 to 100) | – | 50% (50 to 50) [1] |" in text
    assert "-0.1500 [-0.1500, -0.1500] |" in text  # narrower to compressed, of seed 1
    write_summary(tmp_path, against="narrower")
    text = (tmp_path / "compare.md").read_text()
    assert "| to narrower |" in text
    assert "+0.1500 [+0.1500, +0.1500] |" in text  # compressed to narrower
    assert "narrower has the higher" in (tmp_path / "compare.html").read_text()
    for path in (tmp_path / "runs").glob("*"):
        if not path.name.startswith("uncompressed"):
            path.unlink()
    write_summary(tmp_path)
    assert "to None" not in (tmp_path / "compare.md").read_text()


def test_tables_say_where_the_best_rate_is_the_highest_or_lowest(tmp_path):
    (tmp_path / "runs").mkdir()
    reached = {  # at .001, .003 and .01
        ("uncompressed", None): (0.1, 0.2, 0.3),
        ("compressed", 4.0): (0.1, 0.3, None),  # the highest failed
        ("narrower", 4.0): (0.3, 0.2, 0.1),
        ("narrower", 8.0): (0.3, None, None),
        ("hashing", 4.0): (0.3,),  # one rate is no search
    }
    for (contender, ratio), values in reached.items():
        for seed in (1, 2):
            made = studies.record("lastfm", "SASRec", contender, ratio, seed)
            rates = zip((0.001, 0.003, 0.01), values)
            made["search"] = [{"learning_rate": rate, "valid": valid} for rate, valid in rates]
            (tmp_path / "runs" / f"{made['key']}.json").write_text(json.dumps(made))
            np.save(tmp_path / "runs" / f"{made['key']}.npy", np.float32([0.1, 0.2]))
    write_summary(tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "The highest rate that was tried won 1 of 4 searches, the lowest 2: there" in text
    assert "(the highest won 1 of 4)" in (tmp_path / "compare.html").read_text()


def test_what_not_even_int8_can_be_is_said_before_anything_is_trained(world, tmp_path, inline):
    text = FEW.replace("[int8]", "[recovered-int8]").replace("[1.5]", "[400]")
    run(spec_of(tmp_path, text), tmp_path / "out", world)
    record = runs_of(tmp_path / "out")["made-up_SASRec_L8_recovered-int8_r400_s1"]
    assert re.search(r"Expected a budget of [\d,]+ bytes", record["error"])
    trials = [path.name for path in (tmp_path / "out" / "trials").glob("*.json")]
    assert not any("recovered-int8" in name for name in trials)


def test_a_rate_that_fails_is_not_the_best(world, tmp_path, inline, monkeypatch):
    text = FEW.replace("0.001]", "0.001, 0.5]")
    spec, folder = spec_of(tmp_path, text), tmp_path / "out"
    store = Store(folder)
    plain = recipe_without_ratio(spec, "uncompressed")
    cell = Cell("made-up", "SASRec", 8)
    store.write("trials", plain.trial_key(cell, 0.5, 1), {"error": "loss is nan"})
    run(spec, folder, world)
    record = runs_of(folder)["made-up_SASRec_L8_uncompressed_s1"]
    assert record["search"][2] == {"learning_rate": 0.5, "valid": None}
    assert record["learning_rate"] in (0.01, 0.001)


def test_processes_work_side_by_side_and_one_that_is_killed_is_replaced(
    world, tmp_path, ready_processes, monkeypatch
):
    folder = tmp_path / "out"
    killed = []

    class Killing(conduct.Workers):
        def begin(self, work):
            super().begin(work)
            if not killed:
                worker = next(w for w in self.workers if w.work is work)
                os.kill(worker.process.pid, signal.SIGKILL)
                killed.append(work.key)

    monkeypatch.setattr(conduct, "Workers", Killing)
    _, printed = run(spec_of(tmp_path, FEW), folder, world, jobs=2)
    trial = read_json(folder / "trials" / f"{killed[0]}.json")
    assert "ended by SIGKILL" in trial["error"]
    assert "ended by SIGKILL" in printed
    runs = runs_of(folder)
    assert len(runs) == 3
    assert not any("error" in record for record in runs.values())  # the other rate was there
    assert runs["made-up_SASRec_L8_paper_s1"]["environment"]["torch_threads"] == 1


def test_a_process_that_died_with_nothing_to_do_is_replaced(tmp_path, monkeypatch):
    class Pipe:
        def __init__(self, error=None):
            self.error, self.sent = error, []

        def send(self, work):
            if self.error:
                raise self.error
            self.sent.append(work)

    workers = Workers(1, None, tmp_path, None)
    dead = _Worker(SimpleNamespace(join=lambda: None), Pipe(BrokenPipeError()))
    alive = _Worker(SimpleNamespace(join=lambda: None), Pipe())
    workers.workers = [dead]
    monkeypatch.setattr(workers, "_start", lambda: workers.workers.append(alive) or alive)
    workers.begin("work")
    assert workers.workers == [alive]
    assert (alive.work, alive.pipe.sent) == ("work", ["work"])


def test_another_pipe_than_that_of_the_output_is_an_error(monkeypatch):
    def broken(*arguments, **options):
        raise BrokenPipeError

    monkeypatch.setattr("cprec_recbole.commands.compare.write_summary", broken)
    with pytest.raises(BrokenPipeError):
        main(["compare", "--summary"])


def test_an_error_is_printed_as_it_is(world, tmp_path, monkeypatch):
    class Failing(Inline):
        def attempt(self, work, pipe=None):
            return "ValueError: Neither [/data/x] exists nor [users]"

    monkeypatch.setattr(conduct, "Workers", Failing)
    _, printed = run(spec_of(tmp_path, FEW), tmp_path / "out", world)
    assert "failed: ValueError: Neither [/data/x] exists nor [users]" in printed


# the order of things


def schedule_of(tmp_path, text=STUDY, only=None):
    spec = spec_of(tmp_path, text)
    return Schedule(spec, Store(tmp_path / "out"), "cprec compare", only)


def finish(schedule, work, valid=0.1, error=None):
    """Pretend that work was done."""
    if error is None and isinstance(work, Planning):
        recipe = {"kind": "model", "options": {}}
        plan = {name: {**recipe, "options": {"name": name}} for name in work.contenders}
        schedule.store.write("plans", work.key, plan)
    elif error is None:
        record = {
            "learning_rate": work.rate,
            "best_epoch": 4,
            "valid": {"ndcg@20": valid},
            "options": work.recipe.options,
        }
        schedule.store.write_users(work.key, np.full(3, valid, np.float32))
        if work.contender == "uncompressed":
            schedule.store.path("weights", work.key, ".safetensors").write_text("weights")
        schedule.store.write("trials", work.key, record)
    schedule.done(work, error)


def test_the_most_telling_runs_come_first_and_nothing_twice(tmp_path):
    text = STUDY.replace("{made-up: 8}", "{a: [10, 20], b: 50}").replace(
        "[SASRec]", "[SASRec, GRU4Rec]"
    )
    schedule = schedule_of(tmp_path, text)
    order, keys = [], []
    while (work := schedule.next()) is not None:
        keys.append(work.key)
        if not isinstance(work, Planning):
            order.append((work.seed, work.cell.dataset, work.contender))
        finish(schedule, work)
    assert len(keys) == len(set(keys))
    assert schedule.open == []
    place = {name: i for i, name in enumerate(spec_of(tmp_path, text).contenders)}
    assert order == sorted(order, key=lambda o: (o[0], o[1], place[o[2]]))
    assert order[0] == (1, "a", "uncompressed")


def test_what_waits_is_not_handed_out(tmp_path):
    schedule = schedule_of(tmp_path)
    begun = []
    while (work := schedule.next()) is not None:
        begun.append(work)
    # both rates of the uncompressed model and of the fixed setting, and the plan of the others
    assert [getattr(work, "contender", "plan") for work in begun] == [
        *("uncompressed", "uncompressed", "plan", "paper", "paper")
    ]
    finish(schedule, begun[0], valid=0.1)
    assert schedule.next() is None  # the other rate is not finished
    finish(schedule, begun[1], valid=0.2)
    following = schedule.next()
    assert (following.contender, following.source.best_epoch) == ("int8", 4)
    assert following.source.key == begun[1].key  # the weights of the better rate
    others = schedule.next()
    assert (others.contender, others.seed, others.rate) == ("uncompressed", 2, 0.001)


RATES = """
datasets: {made-up: 8}
models: [SASRec]
seeds: [1, 2]
contenders: [uncompressed, int8]
settings: {paper: {ranks: [16, 4, 1]}}
learning_rates: [0.003, 0.001]
"""
FASTER = RATES.replace("[0.003", "[0.01, 0.003")


def all_done(tmp_path, text, valid_of, only=None, error_of=lambda work: None):
    """Do what a study wants; valid_of gives each training's quality. The trainings that it took."""
    schedule = schedule_of(tmp_path, text, only)
    done = []
    while (work := schedule.next()) is not None:
        if isinstance(work, Planning):
            finish(schedule, work, error=error_of(work))
            continue
        done.append(f"{work.contender} {work.rate} {work.seed}")
        finish(schedule, work, valid_of(work), error_of(work))
        assert len(done) < 100
    assert schedule.open == []
    return done


def slower_is_better(work):
    return 0.1 - (work.rate or 0)


def faster_is_better(work):
    return 0.1 + (work.rate or 0)


def published(tmp_path):
    """What is published of a study: the runs alone."""
    for name in ("trials", "weights", "plans"):
        for path in (tmp_path / "out" / name).iterdir():
            path.unlink()


@pytest.mark.parametrize("alone", [False, True])
def test_where_an_added_rate_is_worse_it_alone_is_trained_and_the_runs_stay(tmp_path, alone):
    assert len(all_done(tmp_path, RATES, slower_is_better)) == 8
    before = runs_of(tmp_path / "out")
    if alone:
        published(tmp_path)
    assert all_done(tmp_path, FASTER, slower_is_better) == [
        *("uncompressed 0.01 1", "paper 0.01 1")
    ]
    after = runs_of(tmp_path / "out")
    tried = [0.01, 0.003, 0.001]
    assert after == {
        key: record
        if "int8" in key
        else {
            **record,
            "search": [{"learning_rate": r, "valid": pytest.approx(0.1 - r)} for r in tried],
        }
        for key, record in before.items()
    }
    assert all_done(tmp_path, FASTER, slower_is_better) == []
    users = Store(tmp_path / "out").path("runs", "made-up_SASRec_L8_paper_s1", ".npy")
    assert np.load(users) == pytest.approx(0.099)


@pytest.mark.parametrize("alone", [False, True])
def test_where_an_added_rate_is_better_seeds_and_what_is_made_of_the_model_follow(tmp_path, alone):
    all_done(tmp_path, RATES, faster_is_better)
    if alone:
        published(tmp_path)
    trained = all_done(tmp_path, FASTER, faster_is_better)
    assert sorted(trained) == [
        *("int8 None 1", "int8 None 2"),
        *("paper 0.01 1", "paper 0.01 2", "uncompressed 0.01 1", "uncompressed 0.01 2"),
    ]
    runs = runs_of(tmp_path / "out")
    for key, record in runs.items():
        if "int8" in key:
            plain = "made-up_SASRec_L8_model-"
            assert re.fullmatch(rf"{plain}\w{{10}}_lr0.01_{key[-2:]}@0.11", record["source"])
        else:
            assert (record["learning_rate"], record["valid"]["ndcg@20"]) == (0.01, 0.11)
            assert len(record["search"]) == 3
    assert all_done(tmp_path, FASTER, faster_is_better) == []


def test_a_seed_that_fails_at_the_better_rate_has_failed_with_what_is_made_of_it(tmp_path):
    all_done(tmp_path, RATES, faster_is_better)
    all_done(
        tmp_path,
        FASTER,
        faster_is_better,
        error_of=lambda work: "no memory" if work.seed == 2 else None,
    )
    runs = runs_of(tmp_path / "out")
    failed = {key for key, record in runs.items() if "error" in record}
    assert failed == {f"made-up_SASRec_L8_{n}_s2" for n in ("uncompressed", "paper", "int8")}


def test_a_best_rate_that_is_in_the_study_no_more_is_kept(tmp_path):
    """Where the runs alone are there, nothing says that they had other rates."""
    all_done(tmp_path, RATES, slower_is_better)
    published(tmp_path)
    (tmp_path / "out" / "study.json").unlink(missing_ok=True)
    other = RATES.replace("0.001]", "0.01]").replace(", int8]", ", int8, uncompressed-recovered]")
    done = all_done(tmp_path, other, slower_is_better)
    assert sorted(done) == [
        *("paper 0.01 1", "uncompressed 0.001 1", "uncompressed 0.001 2", "uncompressed 0.01 1"),
        *(f"uncompressed-recovered {which}" for which in ("0.003 1", "0.003 2", "0.01 1")),
    ]
    runs = runs_of(tmp_path / "out")
    for name in ("uncompressed_s1", "uncompressed_s2", "paper_s1", "paper_s2"):
        assert runs[f"made-up_SASRec_L8_{name}"]["learning_rate"] == 0.001
    search = runs["made-up_SASRec_L8_paper_s2"]["search"]
    assert [tried["learning_rate"] for tried in search] == [0.003, 0.01, 0.001]


def test_what_was_made_of_another_training_is_made_again(tmp_path):
    """A machine may train another model under the same key."""
    all_done(tmp_path, RATES, faster_is_better)
    published(tmp_path)
    added = RATES.replace(", int8]", ", int8, uncompressed-recovered]")
    done = all_done(tmp_path, added, lambda work: 0.5, only=["*s1"])
    assert [name for name in done if "recovered" not in name] == [
        *("uncompressed 0.003 1", "int8 None 1")
    ]
    assert runs_of(tmp_path / "out")["made-up_SASRec_L8_int8_s1"]["source"].endswith("@0.5")


def test_a_rate_that_failed_is_tried_again_and_nothing_else(tmp_path):
    def error_of(work):
        return "no memory" if work.rate == 0.001 and work.seed == 1 else None

    assert len(all_done(tmp_path, RATES, slower_is_better, error_of=error_of)) == 8
    assert all_done(tmp_path, RATES, slower_is_better) == []
    schedule = schedule_of(tmp_path, RATES)
    schedule.store.forget_failures(schedule.goals)
    trained = all_done(tmp_path, RATES, slower_is_better)
    assert set(trained) == {  # it wins, so what is made of it and seed 2 follow
        *("uncompressed 0.001 1", "paper 0.001 1", "int8 None 1"),
        *("uncompressed 0.001 2", "paper 0.001 2", "int8 None 2"),
    }
    run = runs_of(tmp_path / "out")["made-up_SASRec_L8_uncompressed_s1"]
    assert [tried["valid"] for tried in run["search"]] == [
        *(pytest.approx(0.097), pytest.approx(0.099))
    ]


def test_what_failed_elsewhere_stays_on_record(tmp_path):
    all_done(tmp_path, RATES, slower_is_better, error_of=lambda work: "no memory")
    before = runs_of(tmp_path / "out")
    assert all("error" in record for record in before.values())
    some = schedule_of(tmp_path, RATES, only=["*_paper_s1"]).goals
    Store(tmp_path / "out").forget_failures(some)
    assert set(before) - set(runs_of(tmp_path / "out")) == {goal.key for goal in some}


def test_a_plan_that_fails_leaves_what_was_planned_before(tmp_path):
    all_done(tmp_path, STUDY, slower_is_better)
    more = STUDY.replace("[compressed,", "[compressed, hashing,").replace("[1, 2]", "[1, 2, 3]")
    all_done(
        *(tmp_path, more, slower_is_better),
        error_of=lambda work: "no memory" if isinstance(work, Planning) else None,
    )
    runs = runs_of(tmp_path / "out")
    assert "error" not in runs["made-up_SASRec_L8_compressed_r1.5_s3"]
    assert "error" in runs["made-up_SASRec_L8_hashing_r1.5_s3"]


def test_what_failed_at_all_rates_is_tried_at_those_that_are_added(tmp_path):
    def error_of(work):
        return "not a number" if work.rate in (0.003, 0.001) else None

    all_done(tmp_path, RATES, slower_is_better, error_of=error_of)
    before = runs_of(tmp_path / "out")
    assert all("error" in run for run in before.values())
    assert all_done(tmp_path, RATES, slower_is_better) == []  # for no other reason
    trained = all_done(tmp_path, FASTER, slower_is_better, error_of=error_of)
    assert sorted(trained) == [
        *("int8 None 1", "int8 None 2"),
        *("paper 0.01 1", "paper 0.01 2", "uncompressed 0.01 1", "uncompressed 0.01 2"),
    ]
    after = runs_of(tmp_path / "out")
    assert not any("error" in run for run in after.values())
    search = after["made-up_SASRec_L8_paper_s1"]["search"]
    assert [trial["valid"] for trial in search] == [pytest.approx(0.09), None, None]


@pytest.mark.parametrize("damage", ["missing", "cut", "not finite"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_run_without_its_users_is_made_whole_again(tmp_path, damage, alone):
    all_done(tmp_path, RATES, slower_is_better)
    if alone:
        published(tmp_path)
    users = tmp_path / "out" / "runs" / "made-up_SASRec_L8_paper_s1.npy"
    if damage == "missing":
        users.unlink()
    elif damage == "cut":
        users.write_bytes(users.read_bytes()[:90])
    else:
        np.save(users, np.full(3, np.nan, np.float32))
    # copied from the training; trained again where that was not kept
    trained = all_done(tmp_path, RATES, slower_is_better)
    assert trained == (["paper 0.001 1"] if alone else [])
    assert np.load(users) == pytest.approx(0.099)


def test_a_training_without_its_users_is_done_again(tmp_path):
    all_done(tmp_path, RATES, slower_is_better)
    for path in (tmp_path / "out" / "runs").glob("*paper_s1.*"):
        path.unlink()
    for path in (tmp_path / "out" / "trials").glob("*lr0.001_s1.json"):
        if read_json(path)["options"]["ranks"] == [16, 4, 1]:
            path.with_suffix(".npy").unlink()
    assert all_done(tmp_path, RATES, slower_is_better) == ["paper 0.001 1"]


def test_what_was_chosen_for_the_first_seed_stays(tmp_path):
    """Also where a plan is made anew, by other code, in a folder that was published."""
    first = STUDY.replace("[1, 2]", "[1]")
    all_done(tmp_path, first, slower_is_better)
    published(tmp_path)
    schedule = schedule_of(tmp_path)
    while (work := schedule.next()) is not None:
        if isinstance(work, Planning):
            plan = {n: {"kind": "model", "options": {"name": "other"}} for n in work.contenders}
            schedule.store.write("plans", work.key, plan)
            schedule.done(work)
        else:
            finish(schedule, work)
    runs = runs_of(tmp_path / "out")
    for name in ("compressed", "narrower"):
        assert runs[f"made-up_SASRec_L8_{name}_r1.5_s2"]["options"] == {"name": name}


def test_rates_may_be_added_but_not_taken_away(tmp_path):
    store = Store(tmp_path / "out")
    store.agree(spec_of(tmp_path, RATES))
    store.write("runs", "one", {})
    store.agree(spec_of(tmp_path, FASTER))
    with pytest.raises(
        CompressionError, match=r"to be \[0.01, 0.003, 0.001\].*; name these too, or use"
    ):
        store.agree(spec_of(tmp_path, RATES))


def test_an_original_without_weights_is_trained_again_for_what_is_made_of_it(tmp_path):
    first = RATES.replace("uncompressed, int8", "uncompressed")
    all_done(tmp_path, first, faster_is_better)
    published(tmp_path)
    assert all_done(tmp_path, RATES, lambda work: 0.5, only=["*int8_s1"]) == [
        *("uncompressed 0.003 1", "int8 None 1")
    ]
    run = runs_of(tmp_path / "out")["made-up_SASRec_L8_uncompressed_s1"]
    assert run["valid"]["ndcg@20"] == 0.5  # the one whose weights are there
    assert [tried["valid"] for tried in run["search"]] == [0.5, pytest.approx(0.101)]


def test_the_other_rate_wins_without_another_training_where_the_best_comes_out_lower(tmp_path):
    """As on another processor, where both are as good: its weights were kept."""
    all_done(tmp_path, RATES.replace("uncompressed, int8", "uncompressed"), faster_is_better)
    (best,) = (tmp_path / "out" / "weights").glob("*lr0.003_s1.*")
    best.unlink()
    assert all_done(tmp_path, RATES, lambda work: 0.05, only=["*int8_s1"]) == [
        *("uncompressed 0.003 1", "int8 None 1")
    ]
    runs = runs_of(tmp_path / "out")
    assert runs["made-up_SASRec_L8_uncompressed_s1"]["learning_rate"] == 0.001
    assert "_lr0.001_s1@" in runs["made-up_SASRec_L8_int8_s1"]["source"]


@pytest.mark.parametrize("added", [False, True])
def test_where_training_again_fails_the_run_stays_and_what_needs_it_fails(tmp_path, added):
    first = RATES.replace("uncompressed, int8", "uncompressed")
    text = RATES.replace("[0.003", "[0.0001, 0.003") if added else RATES
    all_done(tmp_path, first, faster_is_better)
    if added:  # another rate, which is worse, is there whole
        all_done(tmp_path, text, faster_is_better, only=["*uncompressed_s1"])
        for path in (tmp_path / "out" / "weights").iterdir():
            path.unlink()
        for path in (tmp_path / "out" / "trials").glob("*lr0.003*"):
            path.unlink()
    else:
        published(tmp_path)
    before = runs_of(tmp_path / "out")
    trained = all_done(
        tmp_path, text, faster_is_better, only=["*int8_s1"], error_of=lambda work: "no memory"
    )
    assert trained == ["uncompressed 0.003 1"]
    after = runs_of(tmp_path / "out")
    assert after.pop("made-up_SASRec_L8_int8_s1")["error"] == (
        "there is no made-up_SASRec_L8_uncompressed_s1: no memory"
    )
    assert after == before


def test_what_needs_a_failed_run_fails_with_it(tmp_path):
    schedule = schedule_of(tmp_path)
    while (work := schedule.next()) is not None:
        broken = not isinstance(work, Planning) and work.contender == "uncompressed"
        finish(schedule, work, error="no memory" if broken else None)
    runs = runs_of(tmp_path / "out")
    failed = {record["contender"] for record in runs.values() if "error" in record}
    assert failed == {"uncompressed", "recovered", "int8"}
    assert (
        "there is no made-up_SASRec_L8_uncompressed_s1: no memory"
        in (runs["made-up_SASRec_L8_int8_s1"]["error"])
    )


def test_only_some_runs_and_what_they_need(tmp_path):
    schedule = schedule_of(tmp_path, only=["*_recovered_r1.5_s2"])
    wanted = {(goal.contender, goal.seed) for goal in schedule.goals}
    assert wanted == {(name, seed) for name in ("uncompressed", "recovered") for seed in (1, 2)}
    with pytest.raises(CompressionError, match=r"`only` to be a pattern .* got 'x\*'"):
        schedule_of(tmp_path, only=["x*"])


def test_equal_trainings_have_one_name(tmp_path):
    spec = spec_of(tmp_path, STUDY + "  \n".join(["", "sharing: [none, cross_layer]"]))
    assert [n for n in spec.contenders if n.startswith("compressed-")] == [
        "compressed-none",
        "compressed-cross_layer",
    ]
    plain = recipe_without_ratio(spec, "uncompressed")
    cell = Cell("a", "SASRec", 8)
    same = type(plain)(plain.kind, dict(reversed(plain.options.items())))
    assert plain.trial_key(cell, 0.01, 1) == same.trial_key(cell, 0.01, 1)
    names = {
        plain.trial_key(cell, 0.01, 1),
        plain.trial_key(cell, 0.02, 1),
        plain.trial_key(cell, 0.01, 2),
        recipe_without_ratio(spec, "int8").trial_key(cell, 0.01, 1),
        recipe_without_ratio(spec, "paper").trial_key(cell, 0.01, 1),
    }
    assert len(names) == 5


# the file


def test_a_file_says_what_to_run(tmp_path):
    spec = spec_of(tmp_path)
    assert spec.contenders == (
        *("uncompressed", "compressed", "recovered", "narrower", "recjpq-random", "full", "int8"),
        "paper",
    )
    assert spec.settings["paper"] == own_options(
        CompressionConfig(ranks=(16, 4, 1), softmax="tree")
    )
    goals = list(spec.goals())
    assert goals[0] == Goal(Cell("made-up", "SASRec", 8), "uncompressed", None, 1)
    assert len({goal.key for goal in goals}) == len(goals) == 16
    numbered = spec_of(tmp_path, "settings: {8: {ranks: [8]}}\ncontenders: [8]\nratios: [4, 4.0]")
    assert numbered.contenders == ("uncompressed", "8")
    assert list(numbered.settings) == ["8"]
    assert numbered.ratios == {"ml-100k": (4.0,)}
    assert spec_of(tmp_path, "datasets: {a: [8, 8]}").datasets == {"a": (8,)}
    several = spec_of(tmp_path, "datasets: [a, b]\nratios: {a: [2, 4], b: 8}")
    assert several.ratios == {"a": (2.0, 4.0), "b": (8.0,)}
    everything = spec_of(tmp_path, "contenders: all")
    assert {"recovered", "hashing", "recjpq-svd", "tree"} <= set(everything.contenders)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset: ml-100k", "did you mean `datasets`"),
        ("models: [BERT]", "`models` to be out of NextItNet.*got 'BERT'"),
        ("ratios: [0.5]", "`ratios` to be a number of times"),
        ("ratios: []", "`ratios` to have one value"),
        (
            "ratios: {lastfm: 4}",
            "or a list for each of ml-100k, but got lastfm",
        ),
        ("seeds: []", "`seeds` to have one value"),
        ("seeds: [a]", "`seeds` to be whole numbers"),
        ("contenders: [pruning]", "`contenders` to be out of all, uncompressed.*got 'pruning'"),
        ("sharing: [all]", "`sharing` to be out of none"),
        ("learning_rates: [0]", "`learning_rates` to be numbers between"),
        ("datasets: {a: 0}", "`datasets` to give a a length"),
        ("datasets: {a/b: 5}", "`datasets` to hold names"),
        ("datasets: 5", "`datasets` to be names"),
        ("settings: {tree: {softmax: tree}}", "`settings` to have names"),
        ("settings: {mine: {rank: 3}}", "did you mean `ranks`"),
        ("settings: {mine: {dtype: int4}}", "setting mine to have `dtype` int8 or none, .*'int4'"),
        ("settings: [1]", "`settings` to hold names and values"),
        ("compression: {ranks: [4]}", "Expected an option out of softmax, tied, sharing"),
        ("compression: {softmax: flat}", "`softmax` to be one of"),
        ("options: {seed: 3}", "`options` to leave `seed` to the study"),
        ("options: {ranks: [3]}", "`options` to leave `ranks` to the study"),
        ("[1, 2]", "`study` to hold names and values"),
        ("1: 2", "`study` to hold names and values"),
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
        (("epochs: 2", "topk: [10], valid_metric: NDCG@10"), "to measure NDCG@20"),
        (("{made-up: 8}", "{missing: 8}"), "`dataset` to be ml-100k"),
        (("epochs: 2", "epochs: 2, eval_args: {mode: uni100}"), "`eval_args` to rank all items"),
        (
            ("epochs: 2", "epochs: 2, eval_args: {split: {LS: test_only}}"),
            "to split off one item of each user",
        ),
        (
            ("epochs: 2", "epochs: 2, eval_args: {order: RO, split: {LS: valid_and_test}}"),
            "`eval_args` to go by time",
        ),
        (
            ("epochs: 2", "epochs: 2, eval_args: {split: {RS: [8, 1, 1]}}"),
            "one item of each user",
        ),
        (("epochs: 2", "epochs: ten"), "`epochs` to be a whole number"),
        (("epochs: 2", "epochs: 2, metrics: [NDCG, ItemCoverage]"), "to be of users alone"),
    ],
)
def test_what_recbole_refuses_is_found_before_training(world, tmp_path, inline, change, words):
    spec = spec_of(tmp_path, STUDY.replace(*change))
    with pytest.raises(CompressionError, match=words):
        run(spec, tmp_path / "out", world)
    assert not (tmp_path / "out").exists()


def test_runs_of_other_options_are_not_mixed(world, finished, tmp_path, inline):
    folder, _, _ = finished
    for change in (("epochs: 2", "epochs: 3"), ("0.001]", "0.002]"), ("[1, 2]", "[2, 1]")):
        with pytest.raises(CompressionError, match=r"with which the runs in .* use another --out"):
            run(spec_of(tmp_path, STUDY.replace(*change)), folder, world)


def test_runs_of_other_interactions_are_not_mixed(world, tmp_path, inline):
    store = Store(tmp_path / "out")
    store.same_rows("made-up_SASRec_L8", "others")
    run(spec_of(tmp_path, FEW), tmp_path / "out", world)
    runs = runs_of(tmp_path / "out")
    assert all(
        "`data_path` to hold the interactions of which the runs of made-up_SASRec_L8" in r["error"]
        for r in runs.values()
    )
    store.path("data", "made-up_SASRec_L8").unlink()
    run(spec_of(tmp_path, FEW), tmp_path / "out", world, retry=True)
    run(spec_of(tmp_path, FEW.replace("[1]", "[1, 2]")), tmp_path / "out", world)
    assert not any("error" in record for record in runs_of(tmp_path / "out").values())


def test_damaged_weights_are_named_and_trained_again(world, tmp_path, inline):
    run(spec_of(tmp_path, FEW.replace("[int8]", "[uncompressed]")), tmp_path / "out", world)
    for path in (tmp_path / "out" / "weights").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    run(spec_of(tmp_path, FEW), tmp_path / "out", world)
    key = "made-up_SASRec_L8_int8_s1"
    error = runs_of(tmp_path / "out")[key]["error"]
    assert "to hold the weights of the uncompressed model" in error
    run(spec_of(tmp_path, FEW), tmp_path / "out", world, retry=True)
    assert "error" not in runs_of(tmp_path / "out")[key]


def test_contenders_may_be_added_but_not_changed(tmp_path):
    store = Store(tmp_path / "out")
    store.agree(spec_of(tmp_path, STUDY.replace("epochs: 2", "epochs: 20")))
    store.agree(spec_of(tmp_path))  # nothing was made with the others
    store.write("runs", "one", {})
    added = STUDY.replace("settings:", "settings:\n  other: {ranks: [8, 2]}")
    store.agree(spec_of(tmp_path, added))
    with pytest.raises(CompressionError, match="`settings: other` to be"):
        store.agree(spec_of(tmp_path, added.replace("[8, 2]", "[8, 4]")))
    store.agree(spec_of(tmp_path))  # what is not asked for any more does not matter


def test_runs_of_unknown_options_are_taken_with_a_warning(tmp_path):
    store = Store(tmp_path / "out")
    store.write("runs", "one", {})
    with pytest.warns(UserWarning, match="holds runs but no study.json"):
        store.agree(spec_of(tmp_path))
    store.agree(spec_of(tmp_path))


@pytest.mark.parametrize("jobs", [0, 1.5, True])
def test_jobs_are_counted(world, tmp_path, jobs):
    with pytest.raises(CompressionError, match="`jobs` to be 1 or more"):
        run(spec_of(tmp_path), tmp_path / "out", world, jobs=jobs)


# what is written


def test_the_tables_hold_the_figures_of_the_runs(finished):
    folder, _, _ = finished
    written = write_summary(folder, latex=True)
    assert {path.name for path in written} >= {"compare.csv", "compare.md", "compare.tex"}
    runs = runs_of(folder)
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert {row["key"] for row in rows} == KEYS
    for row in rows:
        record = runs[row["key"]]
        assert float(row["test_ndcg@20"]) == record["test"]["ndcg@20"]
        assert int(row["parameters_table"]) == record["parameters"]["table"]
        blocks = record["blocks"] or {"items": [], "ranks": []}
        for name, numbers in blocks.items():
            assert [int(n) for n in row[f"block_{name}"].split("/") if n] == numbers
        assert row["sharing"] == record["sharing"]
        assert int(row["tail_cases"]) == record["popularity"]["tail"]["cases"]
        assert row["error"] == ""
    overview, text = (folder / "compare.md").read_text().split("\n## SASRec on ")
    assert text.startswith("made-up, length 8 (59 test users)")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[1:]] == [
        *("| uncompressed", "| int8", "| paper"),
        *("| compressed", "| recovered", "| narrower", "| recjpq-random"),
    ]
    found = {line[0][2:]: line for line in lines[1:]}
    values = [r["test"]["ndcg@20"] for r in runs.values() if r["contender"] == "compressed"]
    mean, spread = np.mean(values), np.std(values, ddof=1)
    assert found["compressed"][5] == f"{mean:.4f} ± {spread:.4f}"
    users = {key: np.load(folder / "runs" / f"{key}.npy") for key in runs}
    difference = np.mean(
        [
            users[f"made-up_SASRec_L8_compressed_r1.5_s{s}"].astype(float)
            - users[f"made-up_SASRec_L8_uncompressed_s{s}"]
            for s in (1, 2)
        ]
    )
    assert found["compressed"][6].startswith(f"{difference:+.4f} [")
    assert found["compressed"][7] in ("not told apart", "better", "worse")
    assert found["uncompressed"][6:8] == ["", ""]
    plain = np.mean(
        [r["test"]["ndcg@20"] for r in runs.values() if r["contender"] == "uncompressed"]
    )
    assert "| ÷ 1.5 | users | seeds | compressed | recovered | narrower |" in overview
    assert f"| SASRec, made-up, 8 | 59 | 2 | {1 + difference / plain:.0%} (" in overview
    assert found["narrower"][8] != " |"
    assert found["int8"][8] == " |"  # of no ratio: there is no compressed model beside it
    latex = (folder / "compare.tex").read_text()
    assert latex.count("\\\\") == 1 + 7
    assert "$\\pm$" in latex


def test_a_summary_of_nothing_is_an_error(tmp_path):
    with pytest.raises(CompressionError, match="`out` to be the folder of a study"):
        write_summary(tmp_path)


def test_a_users_file_that_is_missing_or_damaged_is_named(finished, tmp_path):
    folder, _, _ = finished
    key = "made-up_SASRec_L8_int8_s1"
    (tmp_path / "runs").mkdir()
    record = read_json(folder / "runs" / f"{key}.json")
    (tmp_path / "runs" / f"{key}.json").write_text(json.dumps(record))
    write_summary(tmp_path)
    assert f"and so without intervals: {key}." in (tmp_path / "compare.md").read_text()
    for damaged in ([0.1, float("nan")], [[0.1]], []):
        np.save(tmp_path / "runs" / f"{key}.npy", np.array(damaged))
        with pytest.raises(
            CompressionError, match=rf"{key}\.npy to hold a number.*remove {key}\.json beside"
        ):
            write_summary(tmp_path)
    (tmp_path / "runs" / "x.json").write_text("{")
    with pytest.raises(CompressionError, match=r"x\.json to hold a run in JSON"):
        write_summary(tmp_path)


def test_the_command_runs_a_study_and_writes_its_tables(world, tmp_path, inline, capsys):
    text = FEW.replace("0.01, 0.001", "0.01")
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(text)
    arguments = ["compare", "--study", str(file), "--out", str(out), "--latex"]
    assert main([*arguments, "--data-path", world.data_path]) == 0
    printed = capsys.readouterr().out
    assert "3 runs, 0 of them finished before" in printed
    assert "failed" not in printed
    assert "compare.md" in printed
    record = read_json(out / "runs" / "made-up_SASRec_L8_int8_s1.json")
    assert record["command"] == (
        "cprec compare --study study.yaml --out FOLDER --data-path DATA "
        "--only made-up_SASRec_L8_int8_s1"
    )
    (out / "compare.md").unlink()
    assert main(["compare", "--summary", "--out", str(out)]) == 0
    assert (out / "compare.md").exists()
    assert main(["compare", "--summary", "--out", str(out), "--against", "paper"]) == 0
    text = (out / "compare.md").read_text()
    assert "| to paper |" in text
    assert "trainings in all, at one learning rate." in text
    page = (out / "compare.html").read_text()
    assert "paper has the higher NDCG@20 against int8" in page
    assert "At equal ratio, paper" not in page
    int8 = next(line for line in text.splitlines() if line.startswith("| int8 "))
    assert re.search(r"\[[-+][.\d]+, [-+][.\d]+\] \|$", int8)  # neither has a ratio


def test_the_command_says_how_many_runs_failed_also_when_it_did_nothing(
    world, tmp_path, inline, capsys
):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(FEW.replace("[int8]", "[compressed]").replace("ratios: [1.5]", "ratios: [90]"))
    arguments = ["compare", "--study", str(file), "--out", str(out)]
    only = ["--only", "*uncompressed_s1", "*_compressed_*", "--data-path", world.data_path]
    for _ in range(2):
        assert main([*arguments, *only]) == 1
        assert "1 of 2 runs failed, each for a reason" in capsys.readouterr().out
    assert "## Failed" in (out / "compare.md").read_text()


def test_a_full_disk_is_one_line(world, tmp_path, inline, capsys, monkeypatch):
    def full(store, key, record, trial):
        raise OSError(errno.ENOSPC, "No space left on device", f"{key}.json")

    monkeypatch.setattr(Store, "conclude", full)
    file = tmp_path / "study.yaml"
    file.write_text(FEW.replace("0.01, ", ""))
    arguments = ["compare", "--study", str(file), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--data-path", world.data_path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cprec: a file cannot be read or written: No space left on device (made")


def test_a_run_that_is_left_out_names_the_one_that_stands_for_it(world, tmp_path, inline, capsys):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(FEW.replace("[int8]", "[compressed, full]").replace("0.01, 0.001", "0.01"))
    arguments = ["compare", "--study", str(file), "--out", str(out)]
    only = ["--only", "made-up_SASRec_L8_uncompressed_s1", "*_full_*"]
    assert main([*arguments, *only, "--data-path", world.data_path]) == 0
    left_out, stands = (f"made-up_SASRec_L8_{n}_r1.5_s1" for n in ("full", "compressed"))
    text = f"{left_out}: left out, it would be the same model as {stands}"
    assert text in capsys.readouterr().out.replace("\n", " ")


def test_tables_are_written_where_whom_to_measure_against_did_not_run(
    world, tmp_path, inline, capsys
):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(FEW.replace("0.01, 0.001", "0.01"))
    arguments = ["compare", "--study", str(file), "--out", str(out), "--against", "paper"]
    only = ["--only", "*_int8_*", "--data-path", world.data_path]
    assert main([*arguments, *only]) == 0
    assert "No run of paper is finished" in capsys.readouterr().out
    assert "to paper" not in (out / "compare.md").read_text()
    assert main(["compare", "--summary", "--out", str(out), "--against", "paper"]) == 2
    assert "`against` to be out of int8, but got 'paper'" in capsys.readouterr().err


def test_whom_to_measure_against_is_checked_before_anything_is_trained(
    world, tmp_path, inline, capsys
):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(FEW)
    arguments = ["compare", "--study", str(file), "--out", str(out), "--against"]
    for wrong in ("papers", "uncompressed"):
        assert main([*arguments, wrong, "--data-path", world.data_path]) == 2
        printed = capsys.readouterr().err
        assert f"`against` to be out of int8, paper, but got {wrong!r}" in printed
        assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare"], "`model` to be one of"),
        (["compare", "--study", "s.yaml", "--model", "SASRec"], "all in its file, but got `model`"),
        (["compare", "--study", "s.yaml", "--epochs=3"], "all in its file, but got `epochs`"),
        (["compare", "--study", "s.yaml", "--controls", "tree"], "but got `controls`"),
        (["compare", "--study", "missing.yaml"], "missing.yaml"),
        (["compare", "--study", "s.yaml", "--seeds", "3"], "all in its file, but got `seeds`"),
        (["compare", "--study", "s.yaml", "--dataset", "x"], "all in its file, but got `dataset`"),
        (["compare", "--summary", "--only", "x"], "`only` without --summary"),
        (["compare", "--model", "SASRec", "--jobs", "2"], "`jobs` only with --study"),
        (["compare", "--model", "SASRec", "--latex"], "`latex` only with --study"),
        (["compare", "--model", "SASRec", "--against", "tree"], "`against` only with --study"),
        (["compare", "--summary", "--out", "nowhere"], "`out` to be the folder of a study"),
    ],
)
def test_bad_commands_are_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1
