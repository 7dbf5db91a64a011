"""The examples and the published configurations run as they are written, with fewer epochs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cprec_recbole.config import CompressionConfig
from cprec_recbole.host.library import recbole_config
from tests.builders import World

ROOT = Path(__file__).parent.parent
FEW_USERS = "--user_inter_num_interval=[0,60]"
SMALL_DATA = ["--datasets", World.name, "--data-path", "."]
CONFIGS = sorted((ROOT / "recbole_configs").glob("Cp*.yaml"))


@pytest.mark.parametrize(
    ("script", "arguments", "printed"),
    [
        ("quickstart.py", ["--epochs=1", "--block_num=1", FEW_USERS], "recommended films: ["),
        (
            "compress_trained.py",
            ["--epochs=1", "--MAX_ITEM_LIST_LENGTH=5", FEW_USERS],
            "compressed: ",
        ),
        ("compare.py", ["--epochs=1", "--MAX_ITEM_LIST_LENGTH=5", FEW_USERS], "NDCG@20"),
        (
            "trained.py",
            ["--models", "GRU4Rec", "--ratios", "1.5", "--epochs", "1", *SMALL_DATA],
            "GRU4Rec-made-up-2020/1.5/narrower",
        ),
    ],
)
def test_an_example_runs(script, arguments, printed, tmp_path):
    World.made_up(tmp_path, n_users=100, n_items=400)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_a_softmax_put_together_again_is_the_models_own(tmp_path):
    World.made_up(tmp_path, n_users=100, n_items=400)
    arguments = [
        "--models",
        "GRU4Rec",
        "--epochs",
        "1",
        "--rates",
        "0.003",
        "--out",
        ".",
        *SMALL_DATA,
    ]
    script = str(ROOT / "examples" / "tree.py")
    subprocess.run(
        [sys.executable, script, *arguments], check=True, capture_output=True, cwd=tmp_path
    )
    (row,) = [json.loads(line) for line in (tmp_path / "tree.jsonl").read_text().splitlines()]
    for softmax in ("full", "tree"):
        again = row["means"][f"blocks of {softmax}, items of {softmax}"]
        assert again == pytest.approx(row[softmax]["test"], abs=1e-4)
    assert "| GRU4Rec | made-up | 2020 |" in (tmp_path / "tree.md").read_text()


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "quickstart.py",
        "compress_trained.py",
        "compare.py",
        "trained.py",
        "tree.py",
        "__init__.py",  # so that `python -m examples.serve` finds it; see test_serve.py
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_one_that_recbole_takes(path):
    model, dataset = path.stem.split("_")
    assert (model, dataset) in {
        (f"Cp{m}", d) for m in ("NextItNet", "SASRec", "GRU4Rec") for d in ("ml-100k", "ml-1m")
    }
    options = yaml.safe_load(path.read_text())
    config = recbole_config(model, "ml-100k", {}, [str(path)])
    for key, value in options.items():
        assert config[key] == value
    names = CompressionConfig.option_names()
    assert set(options) & set(names), "a configuration that compresses nothing"
    defaults = recbole_config(model, "ml-100k", {})
    same = [key for key, value in options.items() if defaults[key] == value]
    assert same == [], "only what differs from the defaults belongs into a configuration"


def test_there_is_a_configuration_for_every_model_and_data_set():
    assert len(CONFIGS) == 6
