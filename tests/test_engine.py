"""Answers with the layers in onnxruntime against answers in torch."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cprec_recbole import CompressionError, compress, load_pretrained, quantize
from cprec_recbole.models import engine as engines
from tests.builders import HOSTS, MORE_HOSTS

pytest.importorskip("onnx", reason="onnx is not there: pip install cprec_recbole[fast]")
pytest.importorskip("onnxruntime", reason="onnxruntime is not there")

BLOCKS = {"ranks": [8, 4], "cutoffs": [6]}
FOLLOWED = ("NextItNet", "SASRec", "GRU4Rec", "BERT4Rec", "LightSANs", "NARM", "STAMP", "SINE")
HISTORIES = [[4], [1, 2, 3], list(range(1, 9)), [7, 7], list(range(3, 20)), [5, 6, 7, 8, 9]]


def saved(world, name, folder, dtype=None, **options):
    model = compress(world.model(name, **options), dtype=dtype, **BLOCKS).eval()
    return model.save_pretrained(folder / "small")


def graphs(folder):
    return sorted(path.name for path in folder.glob("layers-*"))


def check_same(one, other, histories=HISTORIES):
    for rows in (histories * 12, *([row] for row in histories)):
        best, wanted = one.recommend(rows, k=6), other.recommend(rows, k=6)
        torch.testing.assert_close(best.scores, wanted.scores, rtol=1e-4, atol=1e-6)
        sure = wanted.scores.diff(dim=1).abs().min(1).values > 1e-5
        assert torch.equal(best.items[sure], wanted.items[sure])


@pytest.mark.parametrize("name", [*HOSTS, *MORE_HOSTS])
def test_every_model_answers_the_same_in_either_engine(world, name, tmp_path):
    folder = saved(world, name, tmp_path)
    fast, plain = load_pretrained(folder), load_pretrained(folder, engine="torch")
    assert fast.engine == ("onnx" if name in FOLLOWED else "torch")
    assert plain.engine == "torch"
    check_same(fast, plain)
    again = load_pretrained(folder)
    assert again.engine == fast.engine
    check_same(again, plain)
    assert len(graphs(folder)) == 1
    if name not in FOLLOWED:
        with pytest.raises(CompressionError, match="got onnx, which cannot be had: its layers"):
            load_pretrained(folder, engine="onnx")


@pytest.mark.parametrize("few", [0, engines.FEW_ITEMS])
@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("name", [*HOSTS, "BERT4Rec"])
def test_blocks_are_looked_up_in_the_graph(world, name, dtype, few, tmp_path, monkeypatch):
    monkeypatch.setattr("cprec_recbole.embedding.FEW_ITEMS", few)
    monkeypatch.setattr(engines, "FEW_ITEMS", few)
    folder = saved(world, name, tmp_path, dtype)
    fast, plain = load_pretrained(folder), load_pretrained(folder, engine="torch")
    assert fast.engine == "onnx"
    check_same(fast, plain)


@pytest.mark.parametrize("training", ["all_positions", "last_position"])
@pytest.mark.parametrize("name", HOSTS)
def test_models_of_the_package_are_followed_as_they_are_trained(world, name, training):
    model = world.model(f"Cp{name}", training=training, **BLOCKS).eval()
    assert model.engine == "torch"

    wanted = [model.recommend([row], k=6) for row in HISTORIES]
    model.engine = "onnx"
    for row, best in zip(HISTORIES, wanted):
        found = model.recommend([row], k=6)
        torch.testing.assert_close(found.scores, best.scores, rtol=1e-4, atol=1e-6)


def test_a_change_of_weights_is_seen(world, tmp_path):
    folder = saved(world, "SASRec", tmp_path)
    auto, onnx, plain = (load_pretrained(folder, engine=e) for e in ("auto", "onnx", "torch"))
    models = (auto, onnx, plain)
    for model in models:
        model.recommend([1, 2], k=3)
        with torch.no_grad():
            model.inner.LayerNorm.weight.mul_(2)
    assert [model.engine for model in models] == ["torch", "onnx", "torch"]
    check_same(auto, plain)
    check_same(onnx, plain)
    new = [model.add_items(["new"], like=[["i1"]]) for model in models]
    check_same(onnx, plain, [[1, *new[0]], new[0]])
    assert onnx.engine == "onnx"
    auto.engine = "auto"
    assert auto.engine == "onnx"
    assert [quantize(model).engine for model in models] == ["torch", "onnx", "torch"]


def test_a_replaced_module_is_seen(world, tmp_path):
    folder = saved(world, "GRU4Rec", tmp_path)
    auto, onnx, plain = (load_pretrained(folder, engine=e) for e in ("auto", "onnx", "torch"))
    for model in (auto, onnx, plain):
        before = model.recommend([1, 2], k=3).scores
        model.inner.emb_dropout = torch.nn.Sigmoid()
    assert not torch.allclose(onnx.recommend([1, 2], k=3).scores, before, rtol=1e-3)
    assert [auto.engine, onnx.engine] == ["torch", "onnx"]
    check_same(auto, plain)
    check_same(onnx, plain)


def test_a_folder_keeps_its_graph_until_it_is_saved_again(world, tmp_path, monkeypatch):
    folder = saved(world, "GRU4Rec", tmp_path)
    assert graphs(folder) == []
    load_pretrained(folder).recommend([1], k=1)
    (first,) = graphs(folder)
    monkeypatch.setattr(engines, "_traced", None)  # it is read, and not made again
    assert load_pretrained(folder).engine == "onnx"
    monkeypatch.undo()
    (folder / first).write_bytes((folder / first).read_bytes()[:-9])
    assert load_pretrained(folder).engine == "onnx"
    assert graphs(folder) == [first]
    model = load_pretrained(folder)
    with torch.no_grad():
        model.inner.dense.weight.mul_(2)
    model.save_pretrained(folder)
    assert graphs(folder) == []
    fast, plain = load_pretrained(folder), load_pretrained(folder, engine="torch")
    check_same(fast, plain)
    (second,) = graphs(folder)
    assert second != first


def test_a_folder_that_cannot_be_written_keeps_nothing(world, tmp_path, monkeypatch):
    folder = saved(world, "GRU4Rec", tmp_path)

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(engines, "write_whole", refuse)
    fast = load_pretrained(folder)
    assert fast.engine == "onnx"
    check_same(fast, load_pretrained(folder, engine="torch"))
    assert graphs(folder) == []


def test_without_onnxruntime_torch_answers(world, tmp_path, monkeypatch):
    folder = saved(world, "GRU4Rec", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = load_pretrained(folder)
    assert model.engine == "torch"
    model.recommend([1, 2], k=3)
    with pytest.raises(CompressionError, match=r"got onnx, which cannot be had: .*\[fast\]"):
        load_pretrained(folder, engine="onnx")
    with pytest.raises(CompressionError, match="onnx"):
        model.engine = "onnx"
    assert model.engine == "torch"
    monkeypatch.undo()
    with pytest.raises(CompressionError, match=r"in torch\.float64, and not in float32"):
        model.double().engine = "onnx"
    with pytest.raises(CompressionError, match="`engine` to be"):
        model.engine = "tensorrt"


def test_threads_answer_beside_each_other(world, tmp_path):
    folder = saved(world, "SASRec", tmp_path)
    fast, plain = load_pretrained(folder), load_pretrained(folder, engine="torch")
    rows = HISTORIES * 10
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: fast.recommend([row], k=5).scores, rows))
    for row, scores in zip(rows, found):
        torch.testing.assert_close(scores, plain.recommend([row], k=5).scores, rtol=1e-4, atol=1e-6)
