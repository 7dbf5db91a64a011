"""Options are values, wherever they come from: nothing of a file or a command line is run."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from recbole.config import Config

from cprec_recbole import CompressionError, run
from cprec_recbole.commands.cli import main
from cprec_recbole.host.library import recbole_config
from cprec_recbole.training.checkpoint import load_trained
from tests.test_checkpoint import trained
from tests.test_train_command import arguments

TEXTS = ["2024", "[1]", "True", "1e-3", "(" * 300, ""]
UNPICKLED = ["dataset_save_path", "dataloaders_save_path", "pre_model_path", "mf_pretrain_path"]


class RunsCode:
    """A pickle that leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (Path(self.marker), "ran")


def code(marker):
    return f"__import__('pathlib').Path({str(marker)!r}).write_text('ran')"


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_a_text(world, tmp_path, text):
    options = world.options("CpSASRec", note=text)
    assert recbole_config("CpSASRec", world.name, options)["note"] == text
    file = tmp_path / "options.yaml"
    file.write_text(json.dumps({"note": text}))
    of_file = recbole_config("CpSASRec", world.name, world.options("CpSASRec"), [str(file)])
    assert of_file["note"] == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 1e-3), ("{'a': None}", {"a": None}), ("true", True), ("(1, 2)", (1, 2))],
        *[("'x'", "x"), ("[5,inf)", "[5,inf)"), ("key", "key"), ("2**3", "2**3")],
        *[("{1, 2}", "{1, 2}"), ("[" * 300, "[" * 300), ("a\0b", "a\0b")],
    ],
)
def test_recbole_reads_texts_as_before_but_evaluates_none(world, monkeypatch, text, value):
    monkeypatch.setattr("sys.argv", ["script", *([f"--other={text}"] if "=" not in text else [])])
    config = Config("CpSASRec", world.name, config_dict=world.options("CpSASRec", note=text))
    assert (config["note"], config["other"]) == (value, value)


def test_no_code_of_a_text_is_run(world, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    text = code(marker)
    monkeypatch.setattr("sys.argv", ["script", f"--other={text}"])
    assert Config("CpSASRec", world.name, config_dict=world.options("SASRec", x=text))["x"] == text
    assert recbole_config("CpSASRec", world.name, world.options("SASRec", x=text))["x"] == text
    assert not marker.exists()


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--model", "CpSASRec", "--config"],
        ["compare", "--model", "SASRec", "--config"],
        ["report", "SASRec", "--config"],
        ["compare", "--out", "out", "--study"],
    ],
)
def test_a_file_makes_nothing_but_plain_values(tmp_path, capsys, command):
    file = tmp_path / "options.yaml"
    for tag in ("object/apply:os.getcwd []", "tuple [1]"):
        file.write_text(f"epochs: !!python/{tag}\n")
        assert main([*command, str(file)]) == 2
        assert "to be a YAML file" in capsys.readouterr().err


@pytest.mark.parametrize("name", UNPICKLED)
def test_what_recbole_would_unpickle_is_refused(world, tmp_path, capsys, name):
    marker, file, options = (tmp_path / each for each in ("ran", "evil.pth", "options.yaml"))
    file.write_bytes(pickle.dumps(RunsCode(marker)))
    options.write_text(yaml.safe_dump({name: str(file)}))
    with pytest.raises(CompressionError, match=f"Expected no `{name}`"):
        run("CpSASRec", world.name, config_dict=world.options("CpSASRec", **{name: str(file)}))
    for more in ([f"--{name}={file}"], ["--config", str(options)]):
        assert main([*arguments(world, "CpSASRec"), *more]) == 2
        assert f"Expected no `{name}`" in capsys.readouterr().err
    assert not marker.exists()


def test_a_saved_data_set_is_not_read(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("saved").mkdir()
    evil = pickle.dumps(RunsCode(tmp_path / "ran"))
    for name in ("SequentialDataset", "for-CpSASRec-dataloader"):
        Path(f"saved/{world.name}-{name}.pth").write_bytes(evil)
    assert main(arguments(world, "CpSASRec")) == 0
    compare = ["compare", *arguments(world, "SASRec")[1:], "--ranks", "8,4", "--out", "out"]
    assert main(compare) == 0
    assert not Path("ran").exists()


def test_the_best_weights_of_an_interrupted_run_are_read_without_running_them(
    world, tmp_path, capsys
):
    out, marker = tmp_path / "out", tmp_path / "ran"
    command = [*arguments(world, "CpSASRec"), "--out", str(out)]
    assert main(command) == 0
    (out / "result.json").unlink()
    torch.save({"state_dict": RunsCode(marker)}, out / "best.pth")
    assert main([*command, "--resume"]) == 2
    assert "it was not run" in capsys.readouterr().err
    assert not marker.exists()


def test_a_data_set_brings_no_pickle(tmp_path, world):
    import recbole.model.general_recommender.ldiffrec as ldiffrec

    marker = tmp_path / "ran"
    (tmp_path / "item_emb.npy").write_bytes(pickle.dumps(RunsCode(marker)))
    with pytest.raises(ValueError, match="pickle"):
        ldiffrec.np.load(tmp_path / "item_emb.npy", allow_pickle=True)
    assert not marker.exists()


def test_a_data_set_is_the_name_of_a_folder(world):
    for name in ("../made-up", "a/b", "", ".."):
        with pytest.raises(CompressionError, match="`dataset` to be the name of a folder"):
            recbole_config("CpSASRec", name, world.options("CpSASRec"))


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    return trained(world, "SASRec", tmp_path_factory.mktemp("checkpoint"))


def changed(checkpoint, file, **options):
    """The checkpoint with other options."""
    found = torch.load(checkpoint, weights_only=False)
    found["config"].final_config_dict.update(options)
    torch.save(found, file, pickle_protocol=4)
    return file


def test_of_a_checkpoint_only_what_the_model_and_its_data_need_is_read(
    world, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "ran"
    Path("evil.pth").write_bytes(pickle.dumps(RunsCode(marker)))
    options = {"note": code(marker), "hidden_act": "gelu", "learner": code(marker)}
    options |= dict.fromkeys(("save_dataset", "save_dataloaders", "log_wandb"), True)
    options |= dict.fromkeys(UNPICKLED, "evil.pth")
    options["checkpoint_dir"] = str(tmp_path / "elsewhere")
    found = load_trained(changed(checkpoint, tmp_path / "changed.pth", **options))
    config = found.train.config
    assert "note" not in config
    assert config["learner"] == "adam"
    assert not any(config[name] for name in ("save_dataset", "log_wandb", *UNPICKLED))
    assert sorted(os.listdir()) == ["changed.pth", "evil.pth"]


@pytest.mark.parametrize("option", ["dataset", "metrics"])
def test_a_checkpoint_whose_options_are_code_is_refused(checkpoint, tmp_path, option):
    marker = tmp_path / "ran"
    text = [code(marker)] if option == "metrics" else code(marker)
    with pytest.raises(CompressionError):
        load_trained(changed(checkpoint, tmp_path / "changed.pth", **{option: text}))
    assert not marker.exists()


def test_a_checkpoint_of_a_model_that_cannot_be_compressed_is_refused(checkpoint, tmp_path):
    file = changed(checkpoint, tmp_path / "changed.pth", model="S3Rec")
    with pytest.raises(CompressionError, match="`checkpoint` to be of one of NextItNet, SASRec"):
        load_trained(file)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"strategy": "none"}, "none"),
        ({"distribution": "none", "sample_num": "none"}, "none"),
        ({"strategy": "by", "by": 2, "distribution": "uniform", "dynamic": "none"}, "uniform"),
        (None, "none"),
    ],
)
def test_negatives_as_older_versions_of_recbole_wrote_them(checkpoint, tmp_path, written, read):
    loss = "CE" if read == "none" else "BPR"
    options = {"train_neg_sample_args": written, "loss_type": loss}
    found = load_trained(changed(checkpoint, tmp_path / "changed.pth", **options))
    negatives = found.train.config["train_neg_sample_args"]
    assert negatives["distribution"] == read
    assert read == "none" or negatives["sample_num"] == 2


# which of several is used


@pytest.fixture
def file(world, tmp_path):
    """A file as RecBole's users keep it: data set, model and options of several models."""
    options = {**world.options("CpSASRec"), "rank": 8, "reg_weight": 0.1, "ranks": [8, 4]}
    options |= {"model": "CpSASRec", "dataset": world.name, "cutoffs": [0.3], "epochs": 1}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(options))
    return str(path)


@pytest.mark.parametrize("flag", ["--config", "--config-files"])
def test_a_file_says_what_the_command_line_does_not(world, file, tmp_path, capsys, flag):
    assert main(["train", f"{flag}={file}", "--out", str(tmp_path / "out")]) == 0
    assert f"CpSASRec on {world.name}" in capsys.readouterr().out
    config = torch.load(tmp_path / "out" / "best.pth", weights_only=False)["config"]
    assert (config["ranks"], config["rank"]) == ([8, 4], 8)


def test_the_command_line_wins_over_files_and_a_later_file_over_an_earlier_one(
    world, file, tmp_path, capsys
):
    later = tmp_path / "later.yaml"
    later.write_text("ranks: [4, 2]\nlearning_rate: 1e-2\nepochs: 2\nshow_progress: true\n")
    more = ["--model", "CpGRU4Rec", "--epochs=1", "--cutoffs", "0.5", "--embedding_size=16"]
    out = tmp_path / "out"
    assert main(["train", f"--config_files={file} {later}", *more, "--out", str(out)]) == 0
    assert f"CpGRU4Rec on {world.name}" in capsys.readouterr().out
    config = torch.load(out / "best.pth", weights_only=False)["config"]
    assert config["ranks"] == [4, 2]
    assert (config["learning_rate"], config["epochs"], config["cutoffs"]) == (0.01, 1, [0.5])
    assert config["show_progress"] is True  # no default of ours wins over a file


def test_compare_and_report_take_the_data_set_of_a_file(world, file, tmp_path, capsys):
    own = {**yaml.safe_load(Path(file).read_text()), "model": "SASRec"}
    del own["ranks"], own["cutoffs"]
    Path(file).write_text(yaml.safe_dump(own))
    assert main(["compare", "--config", file, "--out", str(tmp_path / "out")]) == 0
    assert f"SASRec on {world.name}" in (tmp_path / "out" / "compare.md").read_text()
    capsys.readouterr()
    assert main(["report", "SASRec", "--config", file]) == 0
    assert f"SASRec on {world.name} (40 items)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "`model` to be the name of a model, but got none; use --model"),
        (["train", "--model", "CpSASRec", "--config_file=none.yaml"], "none.yaml is none"),
        (["train", "--model", "CpSASRec", "--rankss=4"], "did you mean `ranks`"),
        (["train", "--model", "CpSASRec", "--rank=4"], "but got `rank`"),
        (["compare"], "`model` to be one of NextItNet"),
    ],
)
def test_what_is_not_used_is_refused(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_config_file_names_nothing(world, checkpoint, tmp_path, capsys):
    command = ["compress", checkpoint, "--ranks", "8,4", "--out", str(tmp_path / "small")]
    assert main([*command, "--config_file=x.yaml"]) == 2
    assert "but got `config_file`" in capsys.readouterr().err
