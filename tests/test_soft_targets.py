"""Cross-entropy with probabilities of all items against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cprec_recbole.losses as module
from cprec_recbole.losses import Workspace, cross_entropy
from tests.test_cross_entropy import all_shapes, blocks_of, leaves, plain


def written(probabilities):
    def soft_targets(group, scratch, out):
        scratch.fill_(torch.nan)  # it may do as it likes with that
        out.copy_(probabilities[group])

    return soft_targets


def probabilities(n_rows, shapes, padded=False, dtype=torch.float64):
    columns = sum(k for k, _ in shapes) - padded
    return F.pad(torch.rand(n_rows, columns, dtype=dtype).softmax(1), (int(padded), 0))


@settings(max_examples=50, deadline=None)
@given(
    shapes=all_shapes,
    n_rows=st.integers(0, 30),
    cut=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    scale=st.sampled_from([1.0, -0.3, 0.0]),
    padded=st.booleans(),
)
def test_value_and_gradients_are_the_plain_ones_however_logits_are_cut(
    shapes, n_rows, cut, scale, padded
):
    tensors, targets = leaves(shapes, n_rows), probabilities(n_rows, shapes, padded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan", lambda *args, **kwargs: (*cut, True))
        found = cross_entropy(blocks_of(tensors), written(targets), Workspace(2**20), padded=padded)
    expected = plain(tensors, targets, padded)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(scale * found, tensors)
    for one, other in zip(gradients, torch.autograd.grad(scale * expected, tensors)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("memory", [1, 5000, 2**20])
def test_one_workspace_serves_steps_of_any_size_and_precision(memory):
    workspace = Workspace(memory)
    for n_rows, shapes, dtype in (
        (9, [(30, 3)], torch.float32),
        (4, [(30, 3), (5, 2)], torch.float32),
        (12, [(50, 3)], torch.float64),
        (2, [(3, 1)], torch.float32),
    ):
        tensors = leaves(shapes, n_rows, dtype)
        targets = probabilities(n_rows, shapes, dtype=dtype)
        found = cross_entropy(blocks_of(tensors), written(targets), workspace)
        torch.testing.assert_close(found, plain(tensors, targets))


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, True), (torch.float16, False)])
def test_half_precision_rounds_products_alone(dtype, autocast):
    shapes = [(40, 20), (300, 4)]
    tensors = leaves(shapes, 16, torch.float32)
    targets = probabilities(16, shapes, dtype=torch.float32)
    halves = [t.detach().to(torch.float32 if autocast else dtype) for t in tensors]
    halves = [t.requires_grad_() for t in halves]
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = cross_entropy(blocks_of(halves), written(targets), Workspace(2**20))
    assert found.dtype == torch.float32
    expected = plain(tensors, targets)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    gradients = torch.autograd.grad(found, halves)
    for one, other in zip(gradients, torch.autograd.grad(expected, tensors)):
        assert (one.float() - other).abs().max() <= 0.03 * other.abs().max()


def test_rare_items_learn_in_float16():
    """Their probabilities are below what float16 has room for."""
    tensors = leaves([(20_000, 20)], 4, torch.float32)
    with torch.no_grad():
        tensors[1].mul_(0.05)
        tensors[1][:5] += 3 * tensors[0].sum(0)  # a few items have nearly all
    targets = F.one_hot(torch.tensor([1, 2, 3, 4]), 20_000).float()
    with torch.autocast("cpu", torch.float16):
        found = cross_entropy(blocks_of(tensors), written(targets), Workspace(2**24))
    slope = torch.autograd.grad(found, tensors[1])[0]
    expected = torch.autograd.grad(plain(tensors, targets), tensors[1])[0]
    assert slope[5:].abs().amax(1).min() > 0
    apart = (slope - expected)[5:].abs().amax(1) / expected[5:].abs().amax(1)
    assert apart.max() < 0.05
