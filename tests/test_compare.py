import copy
import dataclasses
import io
import json
import math
import re

import pytest
import torch
from rich.console import Console

from cprec_recbole import CompressionConfig, CompressionError
from cprec_recbole.commands.cli import main, recbole_options
from cprec_recbole.compare import Contender, Experiment, as_markdown, as_table, contenders, save
from cprec_recbole.compare.controls import find_controls
from cprec_recbole.compare.results import Comparison, Run, as_json
from tests.builders import SMALL

UNI = {"split": {"RS": [0.8, 0.1, 0.1]}, "mode": {"valid": "uni10", "test": "uni10"}}
CHEAP = {"epochs": 2, "train_batch_size": 512, "MAX_ITEM_LIST_LENGTH": 8}


def cheap(world, model):
    return {
        **CHEAP,
        **SMALL[model],
        "data_path": world.data_path,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }


@pytest.fixture(scope="module")
def comparison(world):
    columns = contenders("SASRec", CompressionConfig(ranks=(16, 4, 1)), with_stock=True)
    experiment = Experiment(columns, world.name, seeds=2, options=cheap(world, "SASRec"))
    seen = []
    result = experiment.run("cprec compare", lambda *epoch: seen.append(epoch))
    assert [(name, seed, epoch) for name, seed, epoch, _ in seen] == [
        (name, seed, epoch)
        for seed in (2020, 2021)
        for name in ("uncompressed", "compressed", "RecBole's own")
        for epoch in (0, 1)
    ]
    return result


def test_every_contender_is_trained_with_every_seed(comparison):
    assert [(run.contender, run.seed) for run in comparison.runs] == [
        (name, seed) for seed in comparison.seeds for name in comparison.contenders
    ]
    for run in comparison.runs:
        assert len(run.epoch_seconds) == len(run.valid_curve) == 2
        assert set(run.test) == {f"{m}@{k}" for m in ("hit", "mrr", "ndcg") for k in (5, 20)}
        assert run.score_ms > 0
        assert run.parameters["total"] == sum(
            run.parameters[part] for part in ("table", "layers", "softmax")
        )
        # RecBole's checkpoint holds Adam's two moments beside the weights
        assert run.checkpoint_bytes > 2 * run.weight_bytes > 8 * run.parameters["total"]


def test_the_uncompressed_column_has_recboles_own_size(comparison):
    sizes = {run.contender: run.parameters for run in comparison.runs}
    assert sizes["uncompressed"] == sizes["RecBole's own"]
    assert sizes["compressed"]["table"] < sizes["uncompressed"]["table"]
    assert sizes["compressed"]["layers"] < sizes["uncompressed"]["layers"]


def test_the_same_seed_gives_the_same_figures(world):
    columns = contenders("GRU4Rec", CompressionConfig(ranks=(16, 4, 1)))
    results = [
        Experiment(columns, world.name, options=cheap(world, "GRU4Rec")).run("", lambda *e: None)
        for _ in range(2)
    ]
    for a, b in zip(results[0].runs, results[1].runs):
        assert (a.test, a.valid_curve) == (b.test, b.valid_curve)


def test_a_contender_that_fails_is_left_out_and_named(world):
    columns = contenders("SASRec", CompressionConfig(ranks=(16, 4, 1)))
    columns.append(Contender("too-fast", "CpSASRec", {"learning_rate": 1e29}))
    found = Experiment(columns, world.name, options=cheap(world, "SASRec")).run("", lambda *e: None)
    assert {run.contender for run in found.runs} == {"uncompressed", "compressed"}
    (reason,) = found.failed.values()
    assert re.match(r"seed 2020: ValueError: Training loss is nan \(", reason)
    assert f"Failed, and left out:\n\n- too-fast, {reason}" in as_markdown(found)
    assert json.loads(as_json(found))["failed"] == {"too-fast": reason}
    with pytest.raises(CompressionError, match=r"too-fast, which all others .* loss is nan"):
        Experiment(columns[2:], world.name, options=cheap(world, "SASRec")).run("", lambda *e: None)


def test_a_table_of_many_contenders_has_a_row_for_each(comparison):
    many = copy.deepcopy(comparison)
    for i in range(9):
        many.contenders[f"control-{i}"] = many.contenders["compressed"]
        runs = [run for run in comparison.runs if run.contender == "compressed"]
        many.runs += [dataclasses.replace(run, contender=f"control-{i}") for run in runs]
    screen = Console(width=140, record=True, file=io.StringIO())
    screen.print(as_table(many))
    lines = screen.export_text().splitlines()
    (header,) = (line for line in lines if "NDCG@20" in line)
    assert "NDCG@5 " not in header
    assert header.index("NDCG@20") < header.index("bytes of weights") < header.index("ms to")
    (first,) = (line for line in lines if "│ uncompressed " in line)
    (last,) = (line for line in lines if "│ control-8 " in line)
    ndcg = many.figure("control-8", lambda run: run.test["ndcg@20"])
    assert f"{ndcg.mean:.4f} ± {ndcg.spread:.4f}" in last
    base = many.figure("uncompressed", lambda run: run.test["ndcg@20"]).mean
    assert (f"x {ndcg.mean / base:.2f}" if ndcg.mean / base >= 0.75 else "÷") in last
    assert not re.search("[x÷] [0-9]", first)  # it is what the others are measured against
    assert "…" not in "".join(lines)


def test_json_holds_what_a_sceptic_would_ask_for(comparison):
    found = json.loads(as_json(comparison))
    assert found["seeds"] == [2020, 2021]
    assert found["command"] == "cprec compare"
    assert found["settings"]["epochs"] == 2
    assert found["dataset"]["evaluation"]["split"] == {"LS": "valid_and_test"}
    assert found["contenders"]["compressed"]["ranks"] == [16, 4, 1]
    assert found["configuration"]["uncompressed"]["learning_rate"] == 0.001
    assert found["environment"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert {"processor", "cores", "recbole", "numpy", "python"} <= set(found["environment"])
    values = [run["test"]["ndcg@20"] for run in found["runs"] if run["contender"] == "compressed"]
    assert found["summary"]["compressed"]["NDCG@20"]["mean"] == pytest.approx(sum(values) / 2)
    assert found["summary"]["compressed"]["NDCG@20"]["spread"] == pytest.approx(
        abs(values[0] - values[1]) / math.sqrt(2)
    )


def test_tables_show_mean_spread_and_ratio():
    def run(contender, seed, ndcg, total):
        parts = {"table": total - 10, "layers": 10, "softmax": 0, "total": total}
        return Run(
            contender, seed, {}, {"ndcg@20": ndcg}, [ndcg], 1, [2.0], parts, "none 1/1", 4, 12, 1.0
        )

    comparison = Comparison(
        command="cprec compare --model SASRec",
        dataset={"name": "made-up", "users": 5, "items": 9, "test_cases": 5, "evaluation": UNI},
        seeds=[1, 2],
        settings={},
        contenders={"uncompressed": {"model": "CpSASRec"}, "compressed": {"model": "CpSASRec"}},
        configuration={},
        environment={"gpu": None, "processor": "P", "cores": 2, "torch_threads": 1}
        | dict.fromkeys(("recbole", "torch", "numpy", "python"), "1"),
        runs=[
            run("uncompressed", 1, 0.10, 1000),
            run("uncompressed", 2, 0.12, 1000),
            run("compressed", 1, 0.11, 200),
            run("compressed", 2, 0.11, 200),
        ],
    )
    text = as_markdown(comparison)
    assert "| NDCG@20 | 0.1100 ± 0.0141 | 0.1100 | x 1.00 |" in text
    assert "| parameters | 1,000 | 200 | ÷ 5.0 |" in text
    assert "HR@5" not in text  # a metric that was not measured has no row
    assert "split {'RS': [0.8, 0.1, 0.1]}, mode uni10, 5 cases; seeds 1 to 2" in text
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(as_table(comparison))
    assert "0.1100 ± 0.0141" in console.export_text()


def test_controls_are_columns_beside_the_compressed_model(world):
    compression = CompressionConfig(ranks=(16, 4, 1))
    names = ["uncompressed", "compressed", "narrower", "narrower-int8", "int8"]
    names += ["uniform-svd-recovered", "uncompressed-recovered"]
    controls = find_controls(["full", *names[2:]])
    columns = contenders("SASRec", compression, controls=controls)
    experiment = Experiment(columns, world.name, options=cheap(world, "SASRec"))
    found = experiment.run("", lambda *epoch: None)
    assert list(found.contenders) == names  # "full" is what the compressed model is
    runs = {run.contender: run for run in found.runs}
    assert runs["narrower"].parameters["total"] <= runs["compressed"].parameters["total"]
    assert runs["int8"].parameters == runs["uncompressed"].parameters
    assert runs["int8"].served_bytes < 0.4 * runs["uncompressed"].served_bytes
    assert runs["int8"].epoch_seconds == []
    trained = runs["narrower-int8"]
    assert len(trained.epoch_seconds) == len(runs["narrower"].epoch_seconds) == 2
    assert trained.checkpoint_bytes == trained.weight_bytes == 0  # both would be in float
    assert trained.served_bytes <= runs["compressed"].served_bytes
    assert runs["uncompressed-recovered"].parameters == runs["uncompressed"].parameters
    assert len(runs["uniform-svd-recovered"].valid_curve) == 1
    text = as_markdown(found)
    assert "| seconds an epoch |" in text
    assert "nan" not in text
    assert "NaN" not in as_json(found)


def test_controls_need_what_they_are_measured_by(world):
    controls = find_controls(["narrower"])
    columns = contenders("SASRec", CompressionConfig(ranks=(16, 4)), controls=controls)
    for some in ([columns[0], columns[2]], columns[1:]):
        experiment = Experiment(some, world.name, options=cheap(world, "SASRec"))
        with pytest.raises(CompressionError, match="`compressed` before the control narrower"):
            experiment.run("", lambda *epoch: pytest.fail("trained"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"seeds": 0}, "`seeds` to be 1 or more, but got 0"),
        (
            {"options": {"epoch": 3}},
            "^Expected an option out of the [0-9]+ known, but got `epoch`; did you mean `epochs`",
        ),
        ({"dataset": "no-such-data"}, "`dataset` to be ml-100k, or the name of a folder"),
        ({"config_files": ["missing.yaml"]}, "`config` to be a YAML file, but missing.yaml"),
        ({"options": {"epochs": 0}}, "`epochs` to be a whole number, 1 or more, but got 0"),
        ({"options": {"eval_step": 0}}, "`eval_step` to be a whole number, 1 or more, but got 0"),
        ({"options": {"topk": [10]}}, "`valid_metric` to be one of Hit@10.*got NDCG@20"),
        ({"options": {"metrics": ["Hits"]}}, "RecBole refuses these options: .*Hits"),
        ({"options": {"seed": "abc"}}, "`seed`"),
    ],
)
def test_bad_experiments_are_refused_before_training(arguments, match):
    columns = contenders("SASRec", CompressionConfig())
    with pytest.raises(CompressionError, match=match):
        Experiment(columns, **{"dataset": "ml-100k", **arguments})


def test_blocks_that_do_not_fit_the_catalogue_are_refused_before_training(world):
    for wrong in ({"ranks": (128, 16)}, {"cutoffs": (500, 900)}):
        columns = contenders("SASRec", CompressionConfig(**wrong))
        experiment = Experiment(columns, world.name, options=cheap(world, "SASRec"))
        with pytest.raises(CompressionError, match="|".join(wrong)):
            experiment.run("", lambda *epoch: pytest.fail("trained"))


def test_files_win_over_the_defaults_and_options_over_the_files(world, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("epochs: 7\ntopk: [10]\nvalid_metric: MRR@10\n")
    columns = contenders("SASRec", CompressionConfig())
    experiment = Experiment(columns, "ml-100k", 1, {"epochs": 3}, [str(file)])
    config = experiment._config(columns[1], None)
    assert (config["epochs"], config["topk"], config["stopping_step"]) == (3, [10], 5)


def test_the_commands_read_compression_options_from_files(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text("ranks: [32, 8]\nsharing: none\nsoftmax: tree\n")
    assert (
        main(["report", "SASRec", "--items=1000", "--config", str(file), "--sharing=cross_layer"])
        == 0
    )
    first = next(line for line in capsys.readouterr().out.splitlines() if "32/8" in line)
    assert "tree" in first
    assert "cross_layer 1/2" in first


def test_evaluating_every_second_epoch_counts_epochs(world):
    columns = contenders("GRU4Rec", CompressionConfig(ranks=(16, 4)))[1:]
    options = {**cheap(world, "GRU4Rec"), "epochs": 4, "eval_step": 2}
    run = Experiment(columns, world.name, options=options).run("", lambda *epoch: None).runs[0]
    assert len(run.valid_curve) == 2
    assert run.best_epoch == 2 * (1 + max(range(2), key=lambda i: (run.valid_curve[i], i)))


def test_the_command_writes_its_files_and_prints_the_table(world, tmp_path, capsys):
    options = {**cheap(world, "SASRec"), "epochs": 1}
    status = main(
        [
            *("compare", "--model", "SASRec", "--dataset", world.name, "--out", str(tmp_path)),
            *("--ranks", "16,4,1", "--softmax", "tree", "--length", "10", "--loss_memory=64MiB"),
            *(
                f"--{key}={value}"
                for key, value in options.items()
                if key != "MAX_ITEM_LIST_LENGTH"
            ),
        ]
    )
    assert status == 0
    printed = capsys.readouterr().out
    assert "NDCG@20" in printed
    assert "seconds an epoch" in printed
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["settings"]["MAX_ITEM_LIST_LENGTH"] == 10
    assert found["contenders"]["compressed"]["softmax"] == "tree"
    for contender in ("uncompressed", "compressed"):
        assert found["contenders"][contender]["loss_memory"] == 64 * 2**20
    assert found["command"].startswith("cprec compare --model SASRec --dataset made-up")
    assert "NDCG@20" in (tmp_path / "compare.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.md"}


def test_the_report_names_all_blocks_of_a_large_catalogue(capsys):
    assert main(["report", "SASRec", "--items", "1000000"]) == 0
    printed = capsys.readouterr().out
    assert "7 blocks end at 20,001, 80,951, 182,855, 325,712, 509,522, 734,285, 1,000," in printed
    assert "64/16/4/4/4/4/4" in printed
    assert "…" not in printed


def test_the_report_command_prints_sizes(capsys):
    assert main(["report", "SASRec", "--items", "100000", "--ranks", "64,8"]) == 0
    printed = capsys.readouterr().out
    assert "SASRec for 100,000 items" in printed
    assert "64/8" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "SASRec", "--ranks", "8,16"], "`ranks` not to rise"),
        (["report", "SASRec", "--sharing", "all"], "`sharing` to be one of"),
        (["compare", "--model", "SASRec", "--controls", "pruning"], "`controls` to be all or out"),
        (["compare", "--model", "SASRec", "--loss_memory=1"], "`loss_memory` to be a size"),
        (["compare", "--model", "SASRec", "--epoch=3"], "did you mean `epochs`"),
        (["compare", "--model", "SASRec", "epochs=3"], "Expected options as --name=value"),
        (["compare", "--model", "SASRec", "--epochs"], "Expected a value for --epochs"),
        (["compare", "--model", "SASRec", "--out", __file__], "`out` to be a folder"),
        (["compare", "--model", "SASRec", "--config", __file__], "`config` to be a YAML file"),
        (["report", "SASRec", "--hidden_size=abc"], "`hidden_size`"),
        (["report", "SASRec", "--items=9", "--n_heads=3"], "RecBole says: The hidden size (64)"),
        (["compare", "--model", "SASRec", "--softmax=tree", "--loss_type=BPR"], "`loss_type`"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments, words, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.startswith("cprec: ")
    assert printed.count("\n") == 1


def test_one_rank_is_a_list_of_one(capsys):
    assert main(["report", "SASRec", "--items=1000", "--ranks=64"]) == 0
    assert main(["report", "SASRec", "--items=1000", "--ranks=128"]) == 2
    assert "`ranks` to be at most the embedding size 64" in capsys.readouterr().err


def test_recbole_options_are_read_as_yaml():
    options = recbole_options(
        ["--epochs=3", "--metrics=[Hit]", "--learning_rate", "0.01", "--x=a-b"]
    )
    assert options == {"epochs": 3, "metrics": ["Hit"], "learning_rate": 0.01, "x": "a-b"}
    dashes = recbole_options(["--data-path=a-b", "--train-batch-size", "8"])
    assert dashes == {"data_path": "a-b", "train_batch_size": 8}
    texts = {"user_inter_num_interval": "[5,inf)", "field_separator": ",", "data_path": "2020"}
    assert recbole_options([f"--{name}={text}" for name, text in texts.items()]) == texts
    quoted = ['--item_inter_num_interval="(5,10]"', "--user_inter_num_interval=null"]
    assert list(recbole_options(quoted).values()) == ["(5,10]", None]
    assert recbole_options(['--field_separator="\\t"']) == {"field_separator": "\t"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "compare.json"
    save("old", path)
    with pytest.raises(UnicodeEncodeError):
        save("new \ud800", path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # as the umask has it
