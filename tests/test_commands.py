"""`cprec compress` and `cprec recommend`, from a checkpoint that RecBole wrote to answers."""

import json

import pytest

from cprec_recbole import load_pretrained
from cprec_recbole.commands.cli import main
from cprec_recbole.costs import part_sizes
from cprec_recbole.training.checkpoint import load_trained
from tests.test_checkpoint import trained

METRICS = {"metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10"}


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    return str(trained(world, "SASRec", tmp_path_factory.mktemp("checkpoint"), **METRICS))


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    assert main(["compress", checkpoint, "--ranks", "16,4", "--out", str(out)]) == 0
    return out


def test_a_checkpoint_is_read_with_its_data(world, host_name, tmp_path):
    from recbole.quick_start import load_data_and_model

    checkpoint = trained(world, host_name, tmp_path, **METRICS)
    found = load_trained(checkpoint)
    model = load_data_and_model(checkpoint)[1]
    for ours, theirs in zip(found.model.parameters(), model.parameters()):
        assert (ours == theirs).all()
    assert type(found.model) is type(model)
    assert len(found.valid._dataset) > 0


def test_compress_then_recommend(checkpoint, tmp_path, capsys):
    out = tmp_path / "small"
    command = ["compress", checkpoint, "--ratio", "1.2", "--out", str(out)]
    assert main([*command, "--recover", "2"]) == 0
    printed = capsys.readouterr().out
    assert "sharing" in printed
    assert "recover: epoch 2" in printed
    table = {line.split("│")[1].strip(): line for line in printed.splitlines() if "│" in line}
    assert {"parameters", "MB", "smaller", "valid ndcg@10", "test ndcg@10"} <= set(table)
    small = load_pretrained(out)
    assert f"{part_sizes(small).total:,}" in table["parameters"]
    original = load_trained(checkpoint).model
    assert part_sizes(small).total * 1.2 <= part_sizes(original).total

    assert main(["recommend", str(out), "--history", "i1, i2", "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    best = small.recommend_tokens(["i1", "i2"], 3)
    assert [line.split()[1] for line in lines] == best.tokens[0]


def test_rows_in_int8_are_recovered_and_kept_in_int8(checkpoint, tmp_path, capsys):
    out = tmp_path / "small"
    command = ["compress", checkpoint, "--out", str(out), "--ratio", "1.3"]
    assert main([*command, "--dtype", "int8", "--recover", "1"]) == 0
    printed = capsys.readouterr().out
    assert "compressed, int8" in printed
    assert "recovered" in printed
    assert load_pretrained(out).quantized == "int8"


REQUESTS = [  # a line, and its history, k and exclude_seen, or what is wrong with it
    ('["i1", "i2"]', (["i1", "i2"], 4, False)),
    ('{"user": "anna", "history": ["i3"]}', (["i3"], 4, False)),
    ('{"history": ["i1"], "k": 1, "exclude_seen": true}', (["i1"], 1, True)),
    ("[" * 3000, "line of JSON"),
    ('{"user": "ben"}', "`history`"),
    ('["x"]', "token of the catalogue"),
    ('["i1", 2.5]', "texts or whole numbers"),
    ('{"history": ["i3"], "k": 0}', "`k` to be from 1"),
    ('{"history": ["i3"], "exclude_seen": 1}', "`exclude_seen` to be true or false, but got 1"),
    ('{"history": ["i1"], "x": NaN}', "NaN is not JSON"),
    ('{"history": ["i1"], "user": "\\ud83d"}', (["i1"], 4, False)),  # half a character
    ('["i2", "y"]', (["i2"], 4, False)),
    ("\udcff\udcfe", "line of JSON"),  # what is no UTF-8
]


@pytest.mark.parametrize("source", ["file", "-"])
def test_many_users_are_answered_a_line_each(folder, source, tmp_path, capsys, monkeypatch):
    text = "\ufeff" + "\r\n\n".join(line for line, _ in REQUESTS)
    path = tmp_path / "users.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.setattr("sys.stdin", path.open())
    given = str(path) if source == "file" else "-"
    assert main(["recommend", str(folder), "--input", given, "-k", "4"]) == 1
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    small = load_pretrained(folder)
    for number, (answer, (_, expected)) in enumerate(zip(answers, REQUESTS, strict=True)):
        if isinstance(expected, str):
            assert expected in answer["error"]
            assert answer["line"] == 2 * number + 1
        else:
            history, k, exclude_seen = expected
            best = small.recommend_tokens(history, k, exclude_seen=exclude_seen)
            assert answer["items"] == best.tokens[0]
            assert answer["scores"] == pytest.approx(best.scores[0].tolist(), abs=1e-4)
    assert [answers[1]["user"], answers[10]["user"]] == ["anna", "\ud83d"]
    assert captured.err.count("'x'") == captured.err.count("'y'") == 1


def test_many_good_users_in_several_batches(folder, tmp_path, capsys):
    histories = [[f"i{i % 40}", f"i{(7 * i) % 40}"] for i in range(150)]
    path = tmp_path / "users.jsonl"
    path.write_text("\n".join(json.dumps({"n": i, "history": h}) for i, h in enumerate(histories)))
    assert main(["recommend", str(folder), "--input", str(path), "-k", "2"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["n"] for answer in answers] == list(range(150))
    best = load_pretrained(folder).recommend_tokens(histories, 2)
    assert [answer["items"] for answer in answers] == best.tokens


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--ratio", "1000"], "smallest possible model"),
        (["--size", "2 apples"], "`size`"),
        (["--recover", "-1"], "`recover` to be a whole number, 0 or more"),
        (["--recovr=1"], "got `recovr`"),
        (["--ratio", "1.1", "--max_loss=0.01"], "got `max_loss`"),
        (
            ["--ratio", "1.1", "--recover", "1", "--learning_rate=0"],
            "`learning_rate` to be a number above",
        ),
        (["--ratio", "1.1", "--learning_rate=0.01"], "`learning_rate` with --recover"),
        (["--ratio", "1.1", "--epochs=3"], "no `epochs`, as nothing here trains by it"),
        (["--out", "/dev/null/x"], "/dev/null cannot"),
    ],
)
def test_bad_arguments_of_compress_write_nothing(checkpoint, tmp_path, capsys, arguments, match):
    out = tmp_path / "small"
    assert main(["compress", checkpoint, "--out", str(out), *arguments]) == 2
    assert match in capsys.readouterr().err
    assert not out.exists()


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("hello")
    for name in ("text.pth", "none.pth"):
        assert main(["compress", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert "`checkpoint`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--history", "x"], "history 0 has none"),
        (["--history", "i1", "-k", "0"], "`k`"),
        (["--history", "i1", "--unknown", "ask"], "`unknown` to be one of"),
        (["--input", "/nowhere/users.jsonl"], "`input` to be a file that can be read"),
        (["--history", "i1", "--exclude", "i2"], "but got `exclude`"),
    ],
)
def test_bad_arguments_of_recommend_are_named(folder, capsys, arguments, match):
    assert main(["recommend", str(folder), *arguments]) == 2
    assert match in capsys.readouterr().err
    assert main(["recommend", str(folder / "none"), "--history", "i1"]) == 2
    assert "`folder`" in capsys.readouterr().err
