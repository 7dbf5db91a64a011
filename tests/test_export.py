"""Exported graphs against `recommend`: the same items, the same scores, nothing kept twice."""

import collections
import json
import re
import subprocess
import sys

import pytest
import torch

from cprec_recbole import CompressionError, compress, export, load_pretrained, quantize
from cprec_recbole.commands.cli import main
from cprec_recbole.models.inputs import pad_histories
from tests.builders import SMALL, train

onnx = pytest.importorskip("onnx", reason="onnx is not there: pip install cprec_recbole[export]")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not there")
pytest.importorskip("onnxscript", reason="onnxscript is not there")

OPTIONS = {"ranks": [16, 4, 1], "cutoffs": [6, 20]}
K = 10
# each model, head, scheme and kind of rows
GRID = [
    ("NextItNet", "tree", "cross_block", True, "int8"),
    ("SASRec", "full", "cross_layer", False, "int8"),
    ("GRU4Rec", "full", "none", True, "int4"),
    ("GRU4Rec", "tree", "adjacent_layer", False, None),
]


def session_of(file):
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def small_of(trained, name, softmax, scheme, tied, dtype):
    options = {**OPTIONS, "softmax": softmax, "sharing": scheme, "tied": tied, "dtype": dtype}
    return compress(trained[name], **options)


@pytest.fixture(scope="module", params=GRID, ids=lambda row: "-".join(map(str, row)))
def exported(request, trained, tmp_path_factory):
    """A model and its ONNX file."""
    small = small_of(trained, *request.param)
    return small, export(small, tmp_path_factory.mktemp("onnx") / "small.onnx", k=K)


def requests(small, n):
    """Histories of all lengths and items to leave out, as a graph takes them and as lists."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 13, (n,), generator=generator).tolist()
    lists = [torch.randint(1, 41, (m,), generator=generator).tolist() for m in lengths]
    exclude = torch.randint(0, 41, (n, 5), generator=generator)
    history, *_ = pad_histories(lists, small.n_items, small.max_seq_length)
    return lists, history, exclude


def check_same(small, lists, exclude, items, scores):
    """Same scores, and the same items but where places are closer than 1e-5."""
    best = small.recommend(lists, K + 1, exclude=exclude)
    torch.testing.assert_close(scores, best.scores[:, :K], rtol=0, atol=1e-4)
    gaps = -best.scores.diff(dim=1)
    above = torch.cat([torch.full((len(gaps), 1), torch.inf), gaps[:, :-1]], dim=1)
    sure = (gaps > 1e-5) & (above > 1e-5)
    assert sure.float().mean() > 0.9
    assert torch.equal(items[sure], best.items[:, :K][sure])
    for row, left_out in zip(items.tolist(), exclude.tolist()):
        assert len(set(row)) == K
        assert not set(row) & {0, *left_out}


def test_a_thousand_histories_get_what_recommend_gives(exported):
    small, file = exported
    session = session_of(file)
    lists, history, exclude = requests(small, 1000)
    found = session.run(None, {"history": history.numpy(), "exclude": exclude.numpy()})
    check_same(small, lists, exclude, *map(torch.from_numpy, found))
    for n, m in ((1, 1), (2, 1), (1, 5)):
        inputs = {"history": history[:n].numpy(), "exclude": exclude[:n, :m].numpy()}
        found = session.run(None, inputs)
        check_same(small, lists[:n], exclude[:n, :m], *map(torch.from_numpy, found))


def test_a_model_with_one_state_for_a_history_is_exported_too(world, tmp_path):
    model = train(world.model("STAMP"), world, "STAMP")
    small = compress(model, ranks=[8, 4], cutoffs=[6])
    session = session_of(export(small, tmp_path / "small.onnx", k=K))
    lists, history, exclude = requests(small, 100)
    found = session.run(None, {"history": history.numpy(), "exclude": exclude.numpy()})
    check_same(small, lists, exclude, *map(torch.from_numpy, found))


def test_a_model_that_cannot_be_followed_is_refused(world, tmp_path):
    small = compress(world.model("SRGNN"), ranks=[4, 2], cutoffs=[6])
    with pytest.raises(CompressionError, match=r"torch.export can follow, but SRGNN is none: "):
        export(small, tmp_path / "small.onnx", k=K)
    assert not list(tmp_path.iterdir())


def test_the_signature_is_as_documented(exported):
    small, file = exported
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    session = session_of(file)
    kinds = {i.name: (i.type, i.shape) for i in (*session.get_inputs(), *session.get_outputs())}
    assert kinds["history"] == ("tensor(int64)", ["batch", small.max_seq_length])
    assert kinds["exclude"] == ("tensor(int64)", ["batch", "excluded"])
    assert kinds["items"] == ("tensor(int64)", ["batch", K])
    assert kinds["scores"] == ("tensor(float)", ["batch", K])
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert facts["max_length"] == str(small.max_seq_length)
    assert facts["n_items"] == str(small.n_items)
    assert facts["k"] == str(K)
    tokens = json.loads(file.with_suffix(".items.json").read_text())
    assert tokens == list(small.known_vocabulary().tokens)


def test_every_parameter_is_in_the_file_once(exported):
    _, file = exported
    stored = [t for t in onnx.load(file).graph.initializer if len(t.raw_data) >= 64]
    contents = collections.Counter((t.data_type, tuple(t.dims), t.raw_data) for t in stored)
    assert set(contents.values()) == {1}


@pytest.fixture(scope="module")
def large():
    """A NextItNet for 20,000 items with two pairs of shared kernels."""
    from cprec_recbole import CpNextItNet
    from tests.test_serving import catalogue_model

    with pytest.MonkeyPatch.context() as patch:
        layers = {"kernel_size": 3, "reg_weight": 1e-5}
        patch.setitem(SMALL, "NextItNet", {**SMALL["NextItNet"], **layers})
        return catalogue_model(CpNextItNet, 20_000)


@pytest.mark.parametrize(
    ("dtype", "to"), [("float", "onnx"), ("int8", "onnx"), ("int8", "torch"), ("int4", "onnx")]
)
def test_the_file_is_as_small_as_the_folder(large, dtype, to, tmp_path):
    small = large if dtype == "float" else quantize(large, dtype)
    folder = small.save_pretrained(tmp_path / "small")
    file = export(small, tmp_path / "small.bin", to)
    whole = sum(path.stat().st_size for path in folder.iterdir())
    # torch.export's own description of the graph is 100 to 200 kB whatever the catalogue
    assert file.stat().st_size <= 1.05 * whole + (200_000 if to == "torch" else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("small", "small.bin", "small.bin.items.json")
    ]


@pytest.mark.parametrize("row", GRID[2:], ids=lambda row: "-".join(map(str, row)))
def test_torch_export_gives_what_recommend_gives(trained, row, tmp_path):
    small = small_of(trained, *row)
    file = export(small, tmp_path / "small.pt2", to="torch", k=K)
    facts = {"cprec_recbole.json": ""}
    graph = torch.export.load(file, extra_files=facts).module()
    assert json.loads(facts["cprec_recbole.json"])["max_length"] == str(small.max_seq_length)
    lists, history, exclude = requests(small, 200)
    check_same(small, lists, exclude, *graph(history, exclude))
    check_same(small, lists[:1], exclude[:1, :1], *graph(history[:1], exclude[:1, :1]))


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_equal_scores_come_by_lower_id_from_either_graph(trained, dtype, tmp_path):
    small = compress(trained["GRU4Rec"], **OPTIONS, dtype=dtype)
    small.add_items([f"new-{i}" for i in range(60)])  # all at the mean of the last block
    file = export(small, tmp_path / "small.pt2", to="torch", k=60)
    _, history, exclude = requests(small, 3)
    items, scores = torch.export.load(file).module()(history, exclude)
    equal = scores[:, 1:] == scores[:, :-1]
    assert equal.sum() >= 59
    assert (items[:, 1:] > items[:, :-1])[equal].all()


def test_tokens_lie_beside_their_own_graph(trained, tmp_path):
    small, grown = (compress(trained["GRU4Rec"], **OPTIONS) for _ in range(2))
    grown.add_items(["new"])
    for name, model in (("film.v1", small), ("film.pt2", grown)):
        export(model, tmp_path / name, to="torch", k=3)
    found = {path.name: len(json.loads(path.read_text())) for path in tmp_path.glob("*.json")}
    assert found == {"film.v1.items.json": 40, "film.items.json": 41}
    small.vocabulary = small.item_tokens = None
    export(small, tmp_path / "film.pt2", to="torch", k=3)
    assert not (tmp_path / "film.items.json").exists()  # it was of another model


@pytest.fixture(scope="module")
def plain(trained):
    return compress(trained["GRU4Rec"], **OPTIONS)


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    return plain.save_pretrained(tmp_path_factory.mktemp("plain") / "small")


def test_the_model_is_left_as_it_was(plain, tmp_path):
    small = quantize(plain)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    best = small.recommend([1, 2], K)
    export(small, tmp_path / "small.pt2", to="torch", k=K)
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert torch.equal(small.recommend([1, 2], K).items, best.items)


def test_the_command_writes_what_export_writes(folder, capsys):
    assert main(["export", str(folder), "--to", "torch", "-k", str(K)]) == 0
    file = folder.with_name("small.pt2")
    assert f"Written: {file}" in capsys.readouterr().out
    graph = torch.export.load(file).module()
    items, _ = graph(torch.tensor([[1, 2, 0, 0, 0, 0, 0, 0]]), torch.tensor([[0]]))
    assert items.tolist() == load_pretrained(folder).recommend([1, 2], K).items.tolist()
    assert len(json.loads(folder.with_name("small.items.json").read_text())) == 40


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--to", "tflite"], "`to` to be one of onnx, torch, but got 'tflite'"),
        (["--to", "torch", "-k", "41"], "`k` to be from 1 to the 40 items .* but got 41"),
        (["--to", "torch", "-k", "0"], "`k` .* but got 0"),
        (["--to", "onnx", "--out", "."], "a file in a folder that can be written, but got ."),
        (
            ["--to", "onnx", "--out", "nowhere/small.onnx"],
            "that can be written, but got nowh",
        ),
        (["--to", "onnx", "--outt", "x"], "but got `outt`; did you mean `out`"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, arguments, match):
    before = list(folder.parent.iterdir())
    assert main(["export", str(folder), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(match, lines[0])
    assert list(folder.parent.iterdir()) == before


def test_what_cannot_be_exported_is_refused(trained, tmp_path, monkeypatch):
    file = tmp_path / "small.onnx"
    with pytest.raises(CompressionError, match="a compressed model, but got SASRec"):
        export(trained["SASRec"], file)
    small = compress(trained["SASRec"], **OPTIONS)
    with pytest.raises(CompressionError, match="`path` to be a path, but got None"):
        export(small, None)
    monkeypatch.setattr(sys.modules["cprec_recbole.serving.export"], "_LARGEST", 1000)
    with pytest.raises(CompressionError, match="ends at 2 GiB"):
        export(small, file)
    with pytest.raises(CompressionError, match=r"in float32, but got torch.float64; use"):
        export(small.double(), file)
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, signal, sys
from cprec_recbole import export, load_pretrained
small = load_pretrained(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda: export(small, sys.argv[2], to="torch", k=3),
              lambda: small.save_pretrained(sys.argv[1])):
    try:
        write()
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX's")
def test_a_disk_that_is_full_is_an_error_and_leaves_the_old_files(plain, tmp_path):
    folder = plain.save_pretrained(tmp_path / "small")
    (tmp_path / "small.pt2").write_text("old")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(folder), str(tmp_path / "small.pt2")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    path, saved = found.stdout.splitlines()
    assert path.startswith("Expected `path` to be a file that can be written")
    assert saved.startswith("Expected `folder` to be one that can be written")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (tmp_path / "small.pt2").read_text() == "old"
    assert not list(tmp_path.glob(".*"))
