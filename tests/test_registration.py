"""When RecBole is imported and told of the models; each case in a process of its own."""

import os
import subprocess
import sys

import pytest

from cprec_recbole import compress

RUNS = ("recbole.config", "recbole.trainer", "recbole.quick_start", "recbole.evaluator", "sklearn")


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


LIGHT = f"""
import importlib, pkgutil, sys
import cprec_recbole, cprec_recbole.embedding, cprec_recbole.softmax, cprec_recbole.costs
import cprec_recbole.losses
for name in ("models", "search", "serving"):
    package = importlib.import_module("cprec_recbole." + name)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(package.__name__ + "." + module.name)
from cprec_recbole.commands.cli import main
assert main(["recommend", sys.argv[1], "--history", "i1,i2", "-k", "1"]) == 0
print(*cprec_recbole.load_pretrained(sys.argv[1]).recommend_tokens(["i1", "i2"], 3).tokens[0])
assert not set({RUNS}) & set(sys.modules), set({RUNS}) & set(sys.modules)
import torch
assert not torch.is_anomaly_enabled()
from recbole.quick_start import run_recbole
import recbole.data.dataset, recbole.trainer
from recbole.utils import get_model
assert get_model("CpSASRec") is cprec_recbole.CpSASRec
assert recbole.trainer.CpSASRecTrainer
"""
TELL = """
import cprec_recbole, sys
assert "torch" not in sys.modules
from recbole.utils import get_model
assert get_model("CpGRU4Rec") is cprec_recbole.CpGRU4Rec
from recbole.trainer import CpGRU4RecTrainer
from recbole.config import Config
assert hasattr(Config.compatibility_settings, "__wrapped__")
from cprec_recbole import models
assert models.CpSASRec is cprec_recbole.CpSASRec
import cprec_recbole.compression.compress, cprec_recbole.serving.export
for name in ("compress", "recover", "export", "quantize"):
    assert callable(getattr(cprec_recbole, name)), name
assert set(cprec_recbole.__all__) <= set(dir(cprec_recbole))
for name in cprec_recbole.__all__:
    getattr(cprec_recbole, name)
try:
    cprec_recbole.no_such
except AttributeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    options = {"ranks": [16, 4, 1], "cutoffs": [6, 20], "dtype": "int8"}
    return compress(trained["SASRec"], **options).save_pretrained(tmp_path_factory.mktemp("small"))


def test_a_folder_is_loaded_and_recommends_without_what_runs_recbole(folder):
    assert len(run(LIGHT, folder)) == 3 + 3  # place, token, score; three tokens


def test_recbole_knows_the_models_and_functions_win_over_modules_of_their_name():
    assert run(TELL)[-1] == "no_such"
