import copy

import pytest

from cprec_recbole import CompressionConfig
from cprec_recbole.commands.cli import main, recbole_options
from cprec_recbole.commands.report import size_rows
from cprec_recbole.costs import (
    describe_sharing,
    estimate,
    layer_parameters,
    part_sizes,
    shared_layers,
)
from cprec_recbole.host.library import recbole_config
from cprec_recbole.models import spec_of
from cprec_recbole.sharing import share, sharing_plan
from tests.builders import SCHEMES


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_estimate_is_what_a_built_model_has(world, host_name, scheme):
    place = SCHEMES.index(scheme)
    options = {"softmax": ("full", "tree")[place % 2], "tied": place in (0, 3)}
    options |= {"ranks": [16, 4, 1], "sharing": scheme}
    model = world.model(f"Cp{host_name}", **options)
    config = world.config(f"Cp{host_name}")
    dataset = world.loaders(config)[0]._dataset
    host = model.spec.build_inner(config, dataset)
    found = estimate(model.spec, host, CompressionConfig(**options), model.n_items, 16)
    assert found.sizes == part_sizes(model)
    assert found.sizes.total == count(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_that_share_already_are_counted_once(world, scheme):
    host = world.model("SASRec", n_layers=3)
    spec = spec_of(host)
    layers = spec.layers(host)
    for (module, name), (other, other_name) in zip(layers[1], layers[0]):
        setattr(module, name, getattr(other, other_name))
    left = layer_parameters(spec, host, scheme)
    copied = copy.deepcopy(host)
    share(spec.layers(copied), sharing_plan(scheme, 3, spec.layers_per_block))
    assert len(left) == len({id(p) for p in left}) == sum(1 for _ in copied.parameters()) - 1
    assert sum(p.numel() for p in left) == count(copied) - host.n_items * 16


def test_parts_of_recboles_own_model_add_up(world, host_name):
    model = world.model(host_name)
    sizes = part_sizes(model)
    assert sizes.table == model.n_items * 16
    assert sizes.softmax == 0
    assert sizes.total == count(model)


def test_uncompressed_has_the_parameters_of_recboles_own(world, host_name):
    ours = world.model(f"Cp{host_name}", **CompressionConfig.uncompressed().as_dict())
    assert part_sizes(ours) == part_sizes(world.model(host_name))


def test_a_scheme_that_shares_nothing_says_so(world):
    model = world.model("CpSASRec", n_layers=1, sharing="cross_block", ranks=[16])
    assert shared_layers(model) == "cross_block 1/1, nothing to share"
    assert describe_sharing("none", 4, 4) == "none 4/4"
    assert describe_sharing("cross_block", 20, 2) == "cross_block 2/20"


def sizes(model, items=None, **options):
    config = recbole_config(f"Cp{model}", "ml-100k", {})
    return size_rows(config, CompressionConfig(**options), items)


def test_nextitnet_at_recboles_defaults_is_smaller_than_the_promise():
    """Ranks 64/16/4 and cross_block on MovieLens-100K: at least 4.5 times fewer parameters."""
    title, rows = sizes("NextItNet", ranks=(64, 16, 4), sharing="cross_block")
    assert title == "NextItNet on ml-100k (1,682 items)"
    assert rows[0]["parameters"] == "361,472"
    assert float(rows[1]["smaller"].rstrip("x")) >= 4.5


def test_sizes_of_a_million_items_need_no_table():
    title, rows = sizes("SASRec", 10_000_000)
    assert title.startswith("SASRec for 10,000,000 items; its ")
    assert title.endswith(", 10,000,001")
    assert rows[1]["block ends"] == f"{len(rows[1]['ranks'].split('/'))} blocks"
    assert rows[0]["table"] == "640,000,064"
    assert {row["sharing"].split()[0] for row in rows[1:]} == set(SCHEMES)


def test_a_choice_of_ones_own_is_varied_without_contradiction():
    _, rows = sizes("GRU4Rec", 500, ranks=(32, 8), cutoffs=(0.2,), softmax="tree")
    assert {row["ranks"] for row in rows[1:]} == {"32/8"}
    assert rows[1]["softmax"] == "tree"
    for four_blocks in ((100, 400, 900), (0.1, 0.3, 0.6)):
        _, rows = sizes("GRU4Rec", 2000, cutoffs=four_blocks)
        assert {row["ranks"] for row in rows[1:]} == {"32/16/8/8"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--items=100", "--blok_num=3"], "got `blok_num`; did you mean `block_num`"),
        (["--items=0"], "`items` to be a whole number, 1 or more"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, match):
    assert main(["report", "NextItNet", *arguments]) == 2
    assert match in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "SASRec", "--ranks", "8,16"], "`ranks` not to rise"),
        (["report", "SASRec", "--sharing", "all"], "`sharing` to be one of"),
        (["compare", "--model", "SASRec", "epochs=3"], "Expected options as --name=value"),
        (["compare", "--model", "SASRec", "--epochs"], "Expected a value for --epochs"),
        (["report", "SASRec", "--hidden_size=abc"], "`hidden_size`"),
        (["report", "SASRec", "--items=9", "--n_heads=3"], "RecBole says: The hidden size (64)"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments, words, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.startswith("cprec: ")
    assert printed.count("\n") == 1
