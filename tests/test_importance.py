"""The directions that matter: those along which hidden states score."""

import copy

import numpy as np
import pytest
import torch

from cprec_recbole import CompressionConfig, compress
from cprec_recbole.compression.original import Original, hidden_moment, importance_of

ITEMS = torch.tensor([[1, 2, 3], [4, 9, 8], [5, 6, 1]])


def hidden_states(model, histories):
    """One history at a time."""
    with torch.no_grad():
        rows = [model.hidden_states(h.view(1, -1))[0] for h in histories]
    return torch.cat(rows).double()


def test_the_moment_is_that_of_the_hidden_states(trained, host_name):
    model = compress(trained[host_name], ranks=[16], cutoffs=[], sharing="none").eval()
    hidden = hidden_states(model, ITEMS)
    expected = hidden.T @ hidden
    state = torch.random.get_rng_state()
    original = copy.deepcopy(trained[host_name]).train()
    found = hidden_moment(Original.of(original), ITEMS)
    torch.testing.assert_close(found, 16 * expected / expected.trace(), atol=1e-5, rtol=1e-4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert original.training


def test_hidden_states_that_say_nothing_have_none(world):
    model = world.model("GRU4Rec")
    torch.nn.init.zeros_(model.dense.weight)
    torch.nn.init.zeros_(model.dense.bias)
    assert hidden_moment(Original.of(model), ITEMS) is None


@pytest.mark.parametrize("tied", [True, False])
def test_no_direction_is_free(tied):
    """Few histories show few directions; an error along the others costs something too."""
    state = torch.randn(8, dtype=torch.float64)
    moment = 8 * torch.outer(state, state) / (state @ state)
    found = torch.linalg.eigvalsh(importance_of(moment, tied=tied))
    assert found.min() > 0.05
    assert float(found.mean()) == pytest.approx(1)


@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_nearer_for_it(trained, tied):
    original = Original.of(trained["NextItNet"])
    rng = np.random.default_rng(1)
    items = torch.from_numpy(rng.integers(1, 40, (200, 8)))
    moment = hidden_moment(original, items)
    options = CompressionConfig(ranks=(6, 3), cutoffs=(0.2,), sharing="none", tied=tied)
    errors = []
    for known in (None, moment):
        small = original.compressed(options, np.ones(original.n_items), known)
        lost = (small.softmax.table.dense().detach() - original.table).double()
        errors.append(float((lost @ moment * lost).sum()))  # mean squared error of the scores
    assert errors[1] < errors[0]
