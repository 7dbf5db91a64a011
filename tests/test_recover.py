"""recover() against slow references, and what it leaves as it was."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cprec_recbole import CompressionError, compress, evaluate, recover
from cprec_recbole.compression import distillation
from cprec_recbole.compression.distillation import Teacher
from cprec_recbole.compression.original import Original
from cprec_recbole.models.eval_mode import without_dropout

HISTORIES = [[1, 2, 3, 4], [5, 6]] * 8
METRICS = {"metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10"}


@pytest.fixture(scope="module")
def data(world):
    """RecBole's own training and validation data."""
    return {
        name: world.loaders(world.config(name, **METRICS))[:2] for name in ("SASRec", "GRU4Rec")
    }


@pytest.fixture(scope="module")
def spare(trained):
    """A compressed SASRec that nothing is to change."""
    return squeezed(trained, "SASRec")


def squeezed(trained, host_name, **options):
    options = {"ranks": [4, 2, 1], "cutoffs": [6, 20], "sharing": "cross_layer", **options}
    return compress(trained[host_name], **options)


@pytest.mark.parametrize("softmax", ["full", "tree"])
def test_a_recovery_lowers_the_loss_and_reports_every_epoch(trained, data, softmax, capsys):
    train, valid = data["GRU4Rec"]
    teacher = trained["GRU4Rec"]
    small = squeezed(trained, "GRU4Rec", softmax=softmax)
    at_start = evaluate(small, valid)
    found = recover(small, teacher, train, 3, valid_data=valid, batch_size=64)
    assert found.losses[-1] < found.losses[0]
    assert found.original == evaluate(teacher, valid)
    assert found.start == at_start
    scores = [found.start["ndcg@10"], *(epoch["ndcg@10"] for epoch in found.epochs)]
    assert len(scores) == 4
    assert scores[found.kept] == max(scores)
    assert evaluate(small, valid)["ndcg@10"] == pytest.approx(max(scores))
    # a line an epoch where there is no terminal
    first, *lines = capsys.readouterr().out.splitlines()
    whole = found.original["ndcg@10"]
    assert first == f"recover: ndcg@10 original {whole:.4f}, compressed {scores[0]:.4f}"
    assert lines == [
        f"recover: epoch {i}, loss {loss:.4f}, ndcg@10 {score:.4f}"
        for i, (loss, score) in enumerate(zip(found.losses, scores[1:]), start=1)
    ]
    title, *table = str(found).splitlines()
    assert title == "ndcg@10 on the validation data"
    assert [line[:12].strip() for line in table[:3]] == ["original", "compressed", "epoch 1"]
    assert [line.endswith("(kept)") for line in table[1:]] == [i == found.kept for i in range(4)]
    assert table[0].endswith("100.0%")


def test_the_divergence_is_that_of_two_softmaxes_within_blocks(trained):
    small = squeezed(trained, "SASRec", softmax="tree").eval()
    original = Original.of(trained["SASRec"])
    teacher = Teacher(small, original, 0.5)
    hidden, wanted = torch.randn(30, 16), torch.randn(30, 16)
    target = torch.randint(1, small.n_items, (30,))
    table, dense = original.table, small.softmax.table.dense().detach()
    partition = small.table.partition
    expected = 0.0
    for h, w, item in zip(hidden, wanted, target):
        own = int(partition.blocks(partition.positions(item.view(1))))
        for j in {0, own}:
            members = partition.item_at[partition.starts[j] : partition.cutoffs[j]].long()
            members = members[members != 0]
            told, given = (w @ table[members].T).softmax(0), (h @ dense[members].T).softmax(0)
            expected += float((told * (told / given).log()).sum())
    found = float(teacher.divergence(hidden, wanted, target))
    assert found == pytest.approx(expected / 30, rel=1e-4)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_flat_softmax_learns_from_all_items(trained, spare, share):
    small, original = spare, Original.of(trained["SASRec"])
    teacher = Teacher(small, original, share)
    hidden, wanted = torch.randn(30, 16, requires_grad=True), torch.randn(30, 16)
    target = torch.randint(1, small.n_items, (30,))
    told = (wanted @ original.table.T)[:, 1:].softmax(1)
    given = (hidden @ small.softmax.table.dense().T)[:, 1:].log_softmax(1)
    own = -given[torch.arange(30), target - 1].mean()
    divergence = (told * (told.log() - given)).sum(1).mean()
    expected = (1 - share) * own + share * divergence
    found = teacher.loss(hidden, wanted, target)
    entropy = -(told * told.log()).sum(1).mean()  # a constant that is left out
    torch.testing.assert_close(found, expected + share * entropy)
    slopes = [torch.autograd.grad(each, hidden)[0] for each in (expected, found)]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pairs", "tree"])
def test_pairs_and_trees_keep_their_own_loss_beside_the_divergence(trained, kind):
    small = squeezed(trained, "SASRec", softmax="full" if kind == "pairs" else "tree").eval()
    if kind == "pairs":
        small.loss_type = "BPR"
    original = Original.of(trained["SASRec"])
    teacher = Teacher(small, original, 0.25)
    hidden, wanted = torch.randn(30, 16), torch.randn(30, 16)
    target = torch.randint(1, small.n_items, (30,))
    torch.manual_seed(0)  # of the negatives that pairs draw
    own = small.position_loss(hidden, target)
    torch.manual_seed(0)
    found = teacher.loss(hidden, wanted, target)
    torch.testing.assert_close(
        found, 0.75 * own + 0.25 * teacher.divergence(hidden, wanted, target)
    )


@pytest.mark.parametrize(("pairs", "taught"), [(True, True), (False, False)])
def test_a_model_of_sparse_gradients_recovers_as_another_does(trained, data, pairs, taught):
    """A learner such as sgd gives them where nothing but look-ups reads the table, or with BPR."""
    small = squeezed(trained, "SASRec", tied=pairs)
    if pairs:
        small.loss_type = "BPR"
    dense = copy.deepcopy(small)
    small.table.look_up_sparsely(fewest_rows=1)
    teacher = trained["SASRec"] if taught else None
    found, expected = (recover(m, teacher, data["SASRec"][0], epochs=2) for m in (small, dense))
    assert found.losses == pytest.approx(expected.losses)
    assert small.table.blocks[1].sparse


def test_metrics_of_the_training_data_are_refused_at_once(world, trained, spare):
    metric, small = "ItemCoverage", spare
    loaders = world.loaders(world.config("SASRec", metrics=["NDCG", metric]))
    for call in (
        lambda: evaluate(trained["SASRec"], loaders[1]),
        lambda: recover(small, trained["SASRec"], loaders[0], 1, valid_data=loaders[1]),
        lambda: compress(trained["SASRec"], max_loss=0.1, valid_data=loaders[1]),
    ):
        with pytest.raises(CompressionError, match=f"users alone, .* got {metric}, which RecBole"):
            call()


def test_layers_that_do_not_run_in_half_precision_are_named(spare):
    small = copy.deepcopy(spare).bfloat16()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(CompressionError, match=r"bfloat16, in which the layers of SASRec do not"):
        recover(small, None, HISTORIES, epochs=1)
    assert all(torch.equal(small.state_dict()[name], value) for name, value in before.items())


def test_nothing_is_dropped_out_by_any_layer():
    model = nn.ModuleDict(
        {
            "gru": nn.GRU(8, 8, num_layers=3, dropout=0.9),
            "attention": nn.MultiheadAttention(8, 2, dropout=0.9),
            "alone": nn.AlphaDropout(0.9),
        }
    ).train()
    x = torch.randn(5, 8)

    def outputs():
        return model["gru"](x)[0], model["attention"](x, x, x)[0], model["alone"](x)

    with without_dropout(model):
        assert all(torch.equal(one, other) for one, other in zip(outputs(), outputs()))
    assert not any(torch.equal(one, other) for one, other in zip(outputs(), outputs()))


@pytest.mark.parametrize(("softmax", "dtype"), [("full", torch.bfloat16), ("tree", torch.float16)])
def test_a_teacher_is_heard_under_autocast(trained, data, softmax, dtype):
    small = squeezed(trained, "SASRec", softmax=softmax)
    exact, teacher, train = copy.deepcopy(small), trained["SASRec"], data["SASRec"][0]
    rate = 3e-3  # at which an epoch of roundings does not lead elsewhere
    with torch.autocast("cpu", dtype):
        found = recover(small, teacher, train, epochs=1, learning_rate=rate)
    expected = recover(exact, teacher, train, epochs=1, learning_rate=rate)
    assert found.losses == pytest.approx(expected.losses, rel=0.03)


@pytest.mark.parametrize("softmax", ["full", "tree"])
def test_rows_that_do_not_fit_the_memory_are_taught_in_parts(trained, monkeypatch, softmax):
    small = squeezed(trained, "SASRec", softmax=softmax).eval()
    hidden, wanted = torch.randn(30, 16, requires_grad=True), torch.randn(30, 16)
    target = torch.randint(1, small.n_items, (30,))
    heights = []  # of what is multiplied with all rows at a time
    multiply = distillation.multiply
    monkeypatch.setattr(
        distillation, "multiply", lambda c, r, out: heights.append(len(c)) or multiply(c, r, out)
    )
    values, slopes = [], []
    small.compression = replace(small.compression, loss_memory=2**20)
    sizes = small.table.partition.sizes
    for memory in (2**28, 7 * 3 * 4 * (small.n_items if softmax == "full" else sizes[0])):
        object.__setattr__(small.compression, "loss_memory", memory)
        teacher = Teacher(small, Original.of(trained["SASRec"]), 0.5)
        heights.clear()
        values.append(teacher.loss(hidden, wanted, target))
        slopes.append(torch.autograd.grad(values[-1], [hidden, *small.softmax.parameters()]))
    assert heights[:5] == [7, 7, 7, 7, 2]  # of all items, or of the head
    assert softmax == "tree" or len(heights) == 5
    torch.testing.assert_close(*values)
    for one, other in zip(*slopes):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("taught", "share", "dropped"), [(True, 0.5, False), (True, 0.0, True), (False, 0.5, True)]
)
def test_nothing_is_dropped_where_the_original_teaches(trained, spare, taught, share, dropped):
    small = copy.deepcopy(spare).train()
    dropouts = [m for m in small.modules() if isinstance(m, nn.Dropout)]
    seen = set()
    for dropout in dropouts:
        dropout.register_forward_pre_hook(lambda module, _: seen.add((module.training, module.p)))
    teacher = trained["SASRec"] if taught else None
    recover(small, teacher, HISTORIES, 1, distillation=share, progress=False)
    assert seen == {(True, 0.5 if dropped else 0.0)}
    assert {m.p for m in dropouts} == {0.5}  # as before


def test_the_teacher_the_modes_and_the_random_state_are_left_alone(trained, spare):
    teacher = copy.deepcopy(trained["SASRec"]).train()
    before, state = copy.deepcopy(teacher.state_dict()), torch.random.get_rng_state()
    found = [copy.deepcopy(spare).eval(), copy.deepcopy(spare).eval()]
    for each in found:
        recover(each, teacher, HISTORIES, 1, progress=False)
        assert not each.training
    assert all(torch.equal(a, b) for a, b in zip(found[0].parameters(), found[1].parameters()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values()))
    assert teacher.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_the_average_of_the_latest_weights(trained, dtype):
    """In half precision too, where the later steps' shares are less than can be added."""
    small = compress(trained["GRU4Rec"], ranks=[4, 2]).to(dtype)
    visited = []
    handle = register_optimizer_step_post_hook(
        lambda *_: visited.append([p.detach().double() for p in small.parameters()])
    )
    found = recover(small, None, HISTORIES, 12, batch_size=4, learning_rate=1e-3, progress=False)
    handle.remove()
    assert found.kept == 12
    assert len(visited) > 80
    rates = 9 / (8 + torch.arange(1, len(visited) + 1, dtype=torch.float64))
    later = torch.cat([(1 - rates).flip(0).cumprod(0).flip(0)[1:], torch.ones(1)])
    for i, parameter in enumerate(small.parameters()):
        expected = sum(share * step[i] for share, step in zip(rates * later, visited))
        torch.testing.assert_close(parameter, expected.to(dtype))


def test_histories_as_lists_serve_too(spare, trained):
    found = recover(copy.deepcopy(spare), trained["SASRec"], HISTORIES, 3, progress=False)
    assert found.losses[-1] < found.losses[0]
    assert "3 epochs, loss" in str(found)


def test_without_a_teacher_it_is_plain_fine_tuning(trained):
    small = squeezed(trained, "SASRec")
    small.add_items(["brand new"])
    new = small.n_items - 1

    def chance():
        states = small.eval().hidden_states(torch.tensor([[1, 2], [3, 0]]))[[0, 1], [1, 0]]
        return small.softmax.log_prob(states)[:, new].detach()

    before = chance()
    recover(small, None, [[1, 2, new], [3, new]] * 8, 5, learning_rate=0.01, progress=False)
    assert (chance() > before + 0.5).all()


def test_a_loss_that_is_no_number_ends_it_and_the_start_is_kept(trained):
    small = squeezed(trained, "SASRec")
    before = copy.deepcopy(small.state_dict())
    options = {"learning_rate": 1e30, "batch_size": 8, "progress": False}
    with pytest.raises(CompressionError, match="`learning_rate` to let the loss fall"):
        recover(small, trained["SASRec"], HISTORIES, 2, **options)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 0}, "`epochs` to be a whole number, 1 or more, but got 0"),
        ({"batch_size": 1.5}, "`batch_size`"),
        ({"learning_rate": 0}, "`learning_rate` to be above 0"),
        ({"learning_rate": float("nan")}, "`learning_rate`"),
        ({"learning_rate": 1e38}, r"`learning_rate` .* at most 1e\+30, but got 1e\+38"),
        ({"learning_rate": 10**400}, "`learning_rate`"),
        ({"distillation": 2}, "`distillation` to be a share from 0 to 1"),
        ({"seed": "a"}, "`seed` to be a whole number"),
        ({"valid_data": [1]}, "`valid_data` to be RecBole's evaluation data"),
        ({"data": [[1, 400]]}, "item ids from 1 to 40"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(trained, spare, options, match):
    before = copy.deepcopy(spare.state_dict())
    with pytest.raises(CompressionError, match=match):
        recover(spare, trained["SASRec"], **{"data": HISTORIES, **options})
    assert all(torch.equal(before[name], value) for name, value in spare.state_dict().items())


def test_other_models_and_data_are_refused(trained, data, spare):
    small, (train, valid) = spare, data["SASRec"]
    with pytest.raises(CompressionError, match="`data` to be training data, but got evaluation"):
        recover(small, trained["SASRec"], valid)
    with pytest.raises(CompressionError, match="`small` to be a compressed model, but got SASRec"):
        recover(trained["SASRec"], trained["SASRec"], train)
    with pytest.raises(CompressionError, match=r"`teacher` .* of `small` \(SASRec, 41 .* GRU4Rec"):
        recover(small, trained["GRU4Rec"], train)
    with pytest.raises(CompressionError, match=r"float32, float64 or bfloat16, but got .*float16"):
        recover(copy.deepcopy(small).half(), None, train)
    with pytest.raises(CompressionError, match="uncompressed"):
        recover(small, small, train)
