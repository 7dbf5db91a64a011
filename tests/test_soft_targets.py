"""Cross-entropy with probabilities of all items against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cprec_recbole.losses.soft_targets as module
from cprec_recbole.losses.soft_targets import Room, soft_cross_entropy
from tests.test_cross_entropy import leaves, strips_of


def told(probabilities):
    def opinion(part, logits, out):
        logits.fill_(torch.nan)  # it may do as it likes with that
        out.copy_(probabilities[part])

    return opinion


def probabilities(n_rows, shapes, padded=False, dtype=torch.float64):
    columns = sum(k for k, _ in shapes) - padded
    return F.pad(torch.rand(n_rows, columns, dtype=dtype).softmax(1), (int(padded), 0))


def plain(tensors, wanted, padded=False):
    logits = torch.cat([codes @ rows.T for codes, rows in strips_of(tensors)], 1)
    first = int(padded)
    return F.cross_entropy(logits[:, first:], wanted[:, first:], reduction="sum")


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 20)), min_size=1, max_size=4),
    n_rows=st.integers(0, 30),
    memory=st.sampled_from([1, 999, 5_000, 2**20]),
    scale=st.sampled_from([1.0, -0.3, 0.0]),
    few=st.sampled_from([0, 8, 100]),
    padded=st.booleans(),
)
def test_value_and_gradients_are_the_plain_ones(shapes, n_rows, memory, scale, few, padded):
    tensors, wanted = leaves(shapes, n_rows), probabilities(n_rows, shapes, padded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW_COLUMNS", few)
        found = soft_cross_entropy(strips_of(tensors), told(wanted), Room(memory), padded=padded)
    expected = plain(tensors, wanted, padded)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(scale * found, tensors)
    for one, other in zip(gradients, torch.autograd.grad(scale * expected, tensors)):
        torch.testing.assert_close(one, other)


def test_one_room_serves_steps_of_any_size_and_precision():
    room = Room(2**20)
    for n_rows, shapes, dtype in (
        (9, [(30, 3)], torch.float32),
        (4, [(30, 3), (5, 2)], torch.float32),
        (12, [(50, 3)], torch.float64),
        (2, [(3, 1)], torch.float32),
    ):
        tensors = leaves(shapes, n_rows, dtype)
        wanted = probabilities(n_rows, shapes, dtype=dtype)
        found = soft_cross_entropy(strips_of(tensors), told(wanted), room)
        torch.testing.assert_close(found, plain(tensors, wanted))


def test_memory_is_asked_for_once_and_within_bounds():
    room = Room(8 * 3 * 100 * 7)
    first = room.take(30, 100, torch.empty(0, dtype=torch.float64))
    assert first.shape == (3, 7, 100)
    assert room.take(5, 100, first).data_ptr() == first.data_ptr()
    assert Room(1).take(30, 100, first).shape == (3, 1, 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_rounds_products_alone(dtype, autocast):
    shapes = [(40, 20), (300, 4)]
    tensors, wanted = (
        leaves(shapes, 16, torch.float32),
        probabilities(16, shapes, dtype=torch.float32),
    )
    halves = [t.detach().to(torch.float32 if autocast else dtype) for t in tensors]
    halves = [t.requires_grad_() for t in halves]
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = soft_cross_entropy(strips_of(halves), told(wanted), Room(2**20))
    assert found.dtype == torch.float32
    expected = plain(tensors, wanted)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    gradients = torch.autograd.grad(found, halves)
    for one, other in zip(gradients, torch.autograd.grad(expected, tensors)):
        apart = (one.float() - other).abs().max()
        assert apart <= 0.03 * other.abs().max()


def test_rare_items_learn_in_float16(monkeypatch):
    """Their probabilities are below what float16 has room for."""
    tensors = leaves([(20_000, 20)], 4, torch.float32)
    with torch.no_grad():
        tensors[1].mul_(0.05)
        tensors[1][:5] += 3 * tensors[0].sum(0)  # a few items have nearly all
    wanted = F.one_hot(torch.tensor([1, 2, 3, 4]), 20_000).float()
    with torch.autocast("cpu", torch.float16):
        found = soft_cross_entropy(strips_of(tensors), told(wanted), Room(2**24))
    slope = torch.autograd.grad(found, tensors[1])[0]
    expected = torch.autograd.grad(plain(tensors, wanted), tensors[1])[0]
    assert slope[5:].abs().amax(1).min() > 0
    apart = (slope - expected)[5:].abs().amax(1) / expected[5:].abs().amax(1)
    assert apart.max() < 0.05
