"""What each of the ten models must do; the heavy grids over three of them are elsewhere."""

import copy
import re

import pytest
import torch

from cprec_recbole import (
    CompressionConfig,
    CompressionError,
    compress,
    load_pretrained,
    recover,
    run_recbole,
)
from cprec_recbole.commands.cli import main
from cprec_recbole.compression.original import Original
from cprec_recbole.costs import estimate, part_sizes, shared_layers
from cprec_recbole.models import MODELS, spec_named
from cprec_recbole.models.eval_mode import without_dropout
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.training.trainer import n_targets
from tests.builders import HOSTS, MORE_HOSTS, train
from tests.oracles import best_items

ALL = (*HOSTS, *MORE_HOSTS)
BLOCKS = {"ranks": [16, 4, 1]}
STACKED = ("NextItNet", "SASRec", "GRU4Rec", "BERT4Rec", "LightSANs", "GCSAN", "NARM")


@pytest.fixture(params=ALL)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def originals(world):
    """RecBole's models, trained for a moment, every parameter moved besides; not to be changed."""
    made = {}

    def original(name):
        if name not in made:
            model = train(world.model(name), world, name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            made[name] = model
        return made[name]

    return original


def lossless(model, **options):
    return compress(model, ranks=[Original.of(model).dim], sharing="none", **options)


def test_there_are_ten():
    assert [model.__name__ for model in MODELS[:10]] == [f"Cp{name}" for name in ALL]


@pytest.mark.parametrize("tied", [True, False])
def test_with_nothing_to_lose_the_scores_are_the_originals(world, originals, name, tied):
    model = originals(name)
    same = lossless(model, tied=tied)
    batch = world.evaluation_batch(name)
    with torch.no_grad():
        torch.testing.assert_close(
            same.full_sort_predict(batch)[:, 1:],
            model.full_sort_predict(batch)[:, 1:],
            atol=1e-5,
            rtol=0,
        )
        torch.testing.assert_close(same.predict(batch), model.predict(batch), atol=1e-5, rtol=0)
    again = lossless(lossless(model))  # a Cp model that has lost nothing is an original too
    assert torch.equal(again.full_sort_predict(batch), lossless(model).full_sort_predict(batch))


def test_the_loss_is_the_originals(world, originals, name):
    model, same = originals(name), lossless(originals(name))
    batch = world.batch(name if name in MORE_HOSTS else f"Cp{name}", training="last_position")
    with torch.no_grad():
        own, ours = model.calculate_loss(batch), same.calculate_loss(batch)
    # RecBole's softmax counts the padding item among the others, which ours never does
    assert ours < own < ours + 2 / same.n_items


def test_what_is_compressed_is_recovered_saved_and_recommends(world, originals, name, tmp_path):
    model = originals(name)
    before = copy.deepcopy(model.state_dict())
    data, _, _ = world.loaders(world.config(name))
    small = compress(model, sharing="cross_layer", softmax="tree", data=data, **BLOCKS)
    assert type(small).__name__ == f"Cp{name}"
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    original = Original.of(model)
    options = small.compression
    sizes = estimate(original.spec, model, options, original.n_items, original.dim).sizes
    assert part_sizes(small) == sizes
    recover(small, model, data, epochs=1, progress=False)
    loaded = load_pretrained(small.save_pretrained(tmp_path / "small"))
    for each in (small, loaded):
        best = each.eval().recommend([[1, 2, 3], [4]], k=6)
        histories = torch.tensor([[1, 2, 3], [4, 0, 0]])
        histories = torch.nn.functional.pad(histories, (0, each.max_seq_length - 3))
        dense = each.softmax.scores(each(histories, torch.tensor([3, 1])))
        assert best.items.tolist() == [best_items(row, 6) for row in dense.tolist()]
    again, once = (each.recommend([1, 2, 3], 7).scores for each in (loaded, small))
    torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-6)
    tokens = loaded.recommend_tokens([["i1", "i2"]], k=3).tokens[0]
    assert len(set(tokens)) == 3
    assert all(re.fullmatch(r"i\d+", token) for token in tokens)


def test_a_budget_is_met(originals, name):
    model = originals(name)
    n_parameters = sum(p.numel() for p in model.parameters())
    small = compress(model, ratio=1.1, verbose=False)
    kept = sum(p.numel() for p in small.parameters())
    assert kept * 1.1 <= n_parameters
    assert small.choice.parameters == kept


@pytest.mark.parametrize(("softmax", "tied"), [("full", True), ("tree", False)])
def test_a_step_lowers_the_loss_and_recommendations_are_exact(world, name, softmax, tied):
    options = {"softmax": softmax, "tied": tied, **BLOCKS}
    model = world.model(f"Cp{name}", **options)
    losses = losses_of(model, world.batch(f"Cp{name}", **options))
    assert losses[-1] < losses[0]
    model.eval()
    batch = world.evaluation_batch(f"Cp{name}")
    dense = model.full_sort_predict(batch)
    wanted = dense.gather(1, batch["item_id"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(model.predict(batch), wanted)
    best = model.recommend(batch["item_id_list"], k=5)
    assert best.items.tolist() == [best_items(row, 5) for row in dense.tolist()]
    torch.testing.assert_close(best.scores, dense.gather(1, best.items))


def losses_of(model, batch):
    """Losses before each of eight steps on one batch."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    with without_dropout(model):
        for _ in range(8):
            optimizer.zero_grad()
            loss = model.calculate_loss(batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def test_gradients_reach_every_part(world, name):
    model = world.model(f"Cp{name}", **BLOCKS)
    for batch in world.loaders(world.config(f"Cp{name}", **BLOCKS))[0]:
        model.calculate_loss(batch).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert without == []


def test_one_history_and_several_agree_and_the_newest_items_count(world, name):
    model = world.model(f"Cp{name}", **BLOCKS)
    histories = [[4], [1, 2, 3, 4, 5], [7, 7], list(range(1, 13))]
    together = model.recommend(histories, k=6)
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(h) for h in histories], batch_first=True)
    assert torch.equal(model.recommend(rows, k=6).items, together.items)
    for row, history in enumerate(histories):
        alone = model.recommend(history[-8:], k=6)
        torch.testing.assert_close(alone.scores[0], together.scores[row])


@pytest.mark.parametrize("name", MORE_HOSTS)  # test_models.py has the others
def test_bpr_trains_too(world, name):
    options = {"loss_type": "BPR", **BLOCKS}
    model = world.model(f"Cp{name}", **options)
    batch = world.batch(f"Cp{name}", training=model.compression.training, **options)
    losses = losses_of(model, batch)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("softmax", ["full", "tree"])
def test_sine_has_a_third_loss(world, softmax):
    """The softmax's and how alike the concepts are; RecBole's own is the reference."""
    host = world.model("SINE", loss_type="NLL")
    batch = world.batch("SINE", loss_type="NLL")
    same = compress(host, CompressionConfig.uncompressed("last_position"))
    alike = host.reg_loss_ratio * host.calculate_reg_loss()
    torch.manual_seed(0)
    scores = host.full_sort_predict(batch)[:, 1:]  # ours leaves the padding item out
    expected = torch.nn.functional.cross_entropy(scores, batch["item_id"] - 1) + alike
    torch.testing.assert_close(same.calculate_loss(batch), expected)
    small = world.model("CpSINE", loss_type="NLL", softmax=softmax, **BLOCKS)
    losses = losses_of(small, batch)
    assert losses[-1] < losses[0]
    with pytest.raises(CompressionError, match="`loss_type` to be CE or BPR, but got 'NLL'"):
        world.config("CpNARM", loss_type="NLL")


def test_items_that_are_added_are_recommended_and_read(originals, name):
    small = compress(originals(name), **BLOCKS)
    (new,) = small.add_items(["new"], like=[["i1"]])
    assert small.recommend([[1, 2]], k=1, allowed=[new]).items.tolist() == [[new]]
    with_new, without = (small.recommend([row], k=3).scores for row in ([1, 2, new], [1, 2]))
    assert torch.isfinite(with_new).all()
    assert not torch.equal(with_new, without)


def test_a_batch_without_anything_hidden_has_no_loss_and_counts_for_nothing(world):
    model, batch = world.model("CpBERT4Rec"), world.batch("CpBERT4Rec")
    assert n_targets(batch) == int((batch["MASK_INDEX"] > 0).sum()) > 0
    batch["MASK_INDEX"] = torch.zeros_like(batch["MASK_INDEX"])
    assert n_targets(batch) == 0
    loss = model.calculate_loss(batch)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


@pytest.mark.parametrize("name", MORE_HOSTS)
def test_one_state_for_a_history_means_rows_of_prefixes(world, name, capsys):
    model = world.model(f"Cp{name}")
    assert model.compression.training == "last_position"
    with pytest.raises(CompressionError, match=f"`training` to be last_position for {name}"):
        world.model(f"Cp{name}", training="all_positions")
    with pytest.raises(CompressionError, match="hidden state at every position"):
        model.hidden_states(torch.tensor([[1, 2]]))
    assert main(["report", name, "--training", "all_positions", "--items", "9"]) == 2
    assert f"last_position for {name}" in capsys.readouterr().err
    assert main(["report", name, "--items", "900"]) == 0


def test_sharing_says_where_it_shares_nothing(world, name):
    model = world.model(f"Cp{name}", sharing="cross_layer")
    words = shared_layers(model)
    assert words.endswith("nothing to share") == (name not in STACKED)
    layers = spec_named(name).layers(model.inner)
    parameters = [[getattr(m, n) for m, n in layer] for layer in layers]
    assert all(a is b for a, b in zip(*parameters[-2:]))


@pytest.mark.parametrize("name", MORE_HOSTS)  # test_commands.py has the others
def test_trained_and_compressed_from_the_command_line(world, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "saved")
    options = world.options(name, checkpoint_dir=folder, state="ERROR")
    monkeypatch.setattr("sys.argv", ["run"])
    run_recbole(model=name, dataset=world.name, config_dict=options)
    checkpoint = next((tmp_path / "saved").glob(f"{name}-*.pth"))
    arguments = ["--ratio", "1.1", "--out", "small", f"--data_path={world.data_path}"]
    assert main(["compress", str(checkpoint), *arguments]) == 0
    small = load_pretrained("small")
    assert isinstance(small, CompressedRecommender)
    assert main(["recommend", "small", "--history", "i1,i2", "-k", "3"]) == 0
    result = run_recbole(model=f"Cp{name}", dataset=world.name, config_dict=options, saved=False)
    assert result["test_result"]


def test_other_models_are_refused_with_the_names_of_those_that_fit(world):
    model = world.model("FPMC", loss_type="BPR")
    with pytest.raises(CompressionError, match=r"NARM, STAMP, SRGNN, SINE, but got FPMC"):
        compress(model)
