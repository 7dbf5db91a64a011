"""On a GPU: what the CPU does. Skipped where there is none."""

import copy
import json

import pytest
import torch

from cprec_recbole import compress, evaluate, load_pretrained, recover, run_recbole
from cprec_recbole.commands.cli import main
from cprec_recbole.compare.trial import Data, fit
from cprec_recbole.models.eval_mode import without_dropout
from tests.oracles import best_items

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
BLOCKS = {"ranks": [16, 4, 1]}
SAME = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order


@pytest.fixture(autouse=True)
def in_float32():
    """cuDNN's convolutions are in TensorFloat-32 by default, which keeps three digits."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def test_what_training_measures_is_what_the_trained_model_has(world, host_name, tmp_path):
    """The search must see the steps of PyTorch's fused optimizers, which count no versions."""
    config = world.config(f"Cp{host_name}", epochs=3, learning_rate=0.03, ranks=[16])
    data = Data.of(config)
    model, found = fit(config, data, tmp_path)
    assert model.table.partition.item_at.device.type == "cuda"
    assert evaluate(model, data.valid) == pytest.approx(found["valid"])


def on_gpu(model):
    return copy.deepcopy(model).to("cuda")


@pytest.mark.parametrize("softmax", ["full", "tree"])
@pytest.mark.parametrize("tied", [True, False])
def test_scores_loss_and_gradients_are_those_of_the_cpu(world, host_name, softmax, tied):
    name, options = f"Cp{host_name}", {"softmax": softmax, "tied": tied}
    model = world.model(name, use_gpu=False, **options, **BLOCKS).train()
    there = on_gpu(model)
    batch = world.batch(name, use_gpu=False, **options, **BLOCKS)
    with without_dropout(model), without_dropout(there):
        losses = [m.calculate_loss(batch.to(d)) for m, d in ((there, "cuda"), (model, "cpu"))]
    torch.testing.assert_close(losses[0].cpu(), losses[1], **SAME)
    for loss in losses:
        loss.backward()
    for (key, ours), theirs in zip(model.named_parameters(), there.parameters()):
        apart = (theirs.grad.cpu() - ours.grad).abs().max()
        # 1e-10: the softmax over keys does not see their bias, whose gradient is rounding alone
        assert apart <= 1e-4 * ours.grad.abs().max() + 1e-10, key
    batch = world.evaluation_batch(name, use_gpu=False)
    with torch.no_grad():
        dense = there.eval().full_sort_predict(batch.to("cuda"))
        torch.testing.assert_close(
            dense.cpu(), model.eval().full_sort_predict(batch.to("cpu")), **SAME
        )


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("softmax", ["full", "tree"])
def test_a_model_there_is_compressed_recovered_kept_and_recommends(
    world, trained, host_name, softmax, dtype, tmp_path
):
    model = on_gpu(trained[host_name])
    data, _, _ = world.loaders(world.config(host_name))
    small = compress(model, softmax=softmax, dtype=dtype, data=data, **BLOCKS)
    assert {p.device.type for p in small.parameters()} == {"cuda"}
    before = copy.deepcopy(small.state_dict())
    recover(small, model, data, epochs=1, progress=False)
    assert any(not torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert {p.device.type for p in small.parameters()} == {"cuda"}
    folder = small.save_pretrained(tmp_path / "small")
    loaded = {d: load_pretrained(folder, device=d) for d in ("cuda", "cpu")}
    histories = [[1, 2, 3], [4], list(range(1, 9))]
    best = loaded["cuda"].recommend(histories, k=6)
    torch.testing.assert_close(
        best.scores.cpu(), loaded["cpu"].recommend(histories, k=6).scores, **SAME
    )
    padded, lengths = torch.zeros(3, 8, dtype=torch.int64), torch.tensor([3, 1, 8])
    for row, history in zip(padded, histories):
        row[: len(history)] = torch.tensor(history)
    with torch.no_grad():
        hidden = loaded["cuda"](padded.to("cuda"), lengths.to("cuda"))
        dense = loaded["cuda"].softmax.scores(hidden).cpu()
    for row in range(3):
        assert best.items[row].tolist() == best_items(dense[row].tolist(), 6)
    (new,) = loaded["cuda"].add_items(["new"], like=[["i1"]])
    assert loaded["cuda"].recommend([[1, 2]], k=1, allowed=[new]).items.tolist() == [[new]]


def test_training_runs_there(world, host_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run"])
    options = world.options(f"Cp{host_name}", epochs=3, state="ERROR", **BLOCKS)
    result = run_recbole(model=f"Cp{host_name}", dataset=world.name, config_dict=options)
    assert 0 < result["test_result"]["ndcg@10"] < 1


def test_a_study_runs_there(world, tmp_path, capsys):
    study = tmp_path / "study.yaml"
    study.write_text(
        f"datasets: {{{world.name}: 8}}\nmodels: [GRU4Rec]\nratios: [1.5]\nseeds: [1]\n"
        "contenders: [uncompressed, int8, recovered-int8, narrower, recjpq-svd, all]\n"
        "learning_rates: [0.01]\noptions: {epochs: 1, embedding_size: 16, hidden_size: 20}\n"
    )
    arguments = ["compare", "--study", str(study), "--data-path", world.data_path]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out/runs").glob("*.json")]
    assert len(runs) > 10
    assert not [run["error"] for run in runs if "Expected" not in run.get("error", "Expected")]
