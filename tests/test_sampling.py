"""The sampled softmax: against the softmax over all items, and what its draws are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cprec_recbole import CompressionConfig, CompressionError, FullSoftmax
from cprec_recbole.sampling import NegativeSampler
from cprec_recbole.training.run import run
from tests.builders import block_embedding, train_a_step

COUNTS = torch.tensor([0, *(300 // i for i in range(1, 61))])


@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=60),
    st.floats(0, 1),
    st.data(),
)
def test_draws_are_as_many_as_asked_and_expected_by_popularity(counts, power, data):
    n_items = len(counts)
    m = data.draw(st.integers(1, n_items))
    sampler = NegativeSampler(torch.tensor([0, *counts]), m, power)
    expected = sampler.log_expected(torch.arange(1, n_items + 1)).double().exp()
    assert float(expected.sum()) == pytest.approx(m, rel=1e-5)
    assert (expected <= 1 + 1e-6).all()
    weights = torch.tensor(counts).double().clamp(min=1) ** power
    below = expected < 1 - 1e-6
    if below.any():  # in proportion, but for those that are drawn in any case
        share = (expected / weights)[below]
        assert torch.allclose(share, share[0].expand_as(share), rtol=1e-4)
    items, log_expected = sampler()
    assert len(items) == m
    assert ((items >= 1) & (items <= n_items)).all()
    assert torch.equal(log_expected, sampler.log_expected(items))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_items_are_drawn_as_often_as_is_said(power):
    sampler = NegativeSampler(COUNTS, 20, power)
    drawn = torch.zeros(61, dtype=torch.float64)
    for _ in range(3000):
        drawn.index_add_(0, sampler()[0], torch.ones(20, dtype=torch.float64))
    expected = sampler.log_expected(torch.arange(1, 61)).double().exp()
    # a draw of an item is all but a coin toss: five standard deviations
    assert ((drawn[1:] / 3000 - expected).abs() < 5 * (0.25 / 3000) ** 0.5).all()


@pytest.mark.parametrize("memory", [2**20, 2**14])
def test_with_every_item_drawn_it_is_the_softmax_over_all(memory):
    softmax = FullSoftmax(block_embedding((11, 20, 30), (8, 4, 2), 8), memory).train()
    hidden = torch.randn(90, 8, requires_grad=True)
    target = torch.randint(0, 61, (90,))  # some are padding
    whole = softmax.loss(hidden, target)
    expected = torch.autograd.grad(whole, [hidden, *softmax.parameters()])
    softmax.sampler = NegativeSampler(COUNTS, 60, 0.75)
    loss = softmax.loss(hidden, target)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, *softmax.parameters()]), expected)
    softmax.eval()
    assert torch.equal(softmax.loss(hidden, target), whole)  # evaluation samples nothing


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_sums_of_exponentials_are_those_of_all_items_in_expectation(power):
    softmax = FullSoftmax(block_embedding((11, 20, 30), (8, 4, 2), 8)).train()
    hidden, target = 0.3 * torch.randn(6, 8), torch.randint(1, 61, (6,))
    own = (hidden * softmax.table(target)).sum(1)
    whole = softmax.scores(hidden)[:, 1:].exp().sum(1)
    softmax.sampler = NegativeSampler(COUNTS, 15, power)
    sums = []
    for _ in range(2000):
        items, log_expected = softmax.sampler()
        losses = [
            softmax.sampled_loss(h[None], t[None], items, log_expected)
            for h, t in zip(hidden, target)
        ]
        sums.append((torch.stack(losses) + own).exp())
    sums = torch.stack(sums).detach()
    error = sums.std(0) / len(sums) ** 0.5
    assert ((sums.mean(0) - whole.detach()).abs() < 4 * error + 1e-4).all()


@pytest.mark.parametrize("learner", ["adam", "sparse_adam", "adagrad"])
def test_a_model_learns_from_sampled_negatives(world, host_name, learner):
    options = {"negatives": 10, "ranks": [16, 4], "learner": learner}
    model = world.model(f"Cp{host_name}", **options)
    batch = world.batch(f"Cp{host_name}", **options)
    model.train()
    first = train_a_step(model, batch)
    losses = [train_a_step(model, batch) for _ in range(30)]
    assert min(losses[-5:]) < first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negatives": -1}, "`negatives` to be a whole number, 0 or more"),
        ({"negatives": 1.5}, "`negatives` to be a whole number"),
        ({"negatives": 5, "negatives_power": 2}, "`negatives_power` to be a number from 0 to 1"),
        ({"negatives": 5, "softmax": "tree"}, "`negatives` to be 0 with `softmax: tree`"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(CompressionError, match=words):
        CompressionConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negatives": 41}, "at most the 40 items of the catalogue, but got 41"),
        ({"negatives": 5, "loss_type": "BPR"}, "`negatives` to be 0 with `loss_type: BPR`"),
    ],
)
def test_what_the_data_cannot_have_is_refused_before_training(world, options, words):
    with pytest.raises(CompressionError, match=words):
        world.model("CpSASRec", **options)


def test_a_run_is_repeatable(world):
    options = world.options("SASRec", negatives=8, learning_rate=0.01)
    results = [run("CpSASRec", world.name, config_dict=options, saved=False) for _ in range(2)]
    assert results[0] == results[1]
