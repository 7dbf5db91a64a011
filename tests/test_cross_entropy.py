"""The loss in pieces against PyTorch's on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cprec_recbole.losses as module
from cprec_recbole import CompressionConfig, CompressionError, FullSoftmax, TreeSoftmax
from cprec_recbole.losses import LogitBlock, Workspace, cross_entropy, plan
from tests.builders import block_embedding


def leaves(shapes, n_rows, dtype=torch.float64):
    """Codes and rows of blocks of some (columns, rank)."""
    found = []
    for k, r in shapes:
        found += [torch.randn(n_rows, r, dtype=dtype), torch.randn(k, r, dtype=dtype)]
    return [tensor.requires_grad_() for tensor in found]


def blocks_of(tensors):
    return [LogitBlock(*pair) for pair in zip(tensors[::2], tensors[1::2])]


def loss_of(tensors, target, memory=2**20, padded=False):
    return cross_entropy(blocks_of(tensors), target, Workspace(memory), padded=padded)


def plain(tensors, target, padded=False):
    logits = torch.cat([codes @ rows.T for codes, rows in blocks_of(tensors)], 1)
    if target.ndim == 2:
        return F.cross_entropy(logits[:, int(padded) :], target[:, int(padded) :], reduction="sum")
    if padded:
        logits = torch.cat([torch.full_like(logits[:, :1], -torch.inf), logits[:, 1:]], 1)
    return F.cross_entropy(logits, target, reduction="sum")


plans = st.tuples(st.integers(1, 40), st.integers(1, 200), st.booleans())
all_shapes = st.lists(st.tuples(st.integers(2, 40), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    shapes=all_shapes,
    n_rows=st.integers(1, 30),
    cut=plans,
    padded=st.booleans(),
    scale=st.sampled_from([1.0, -0.3, 0.0]),
)
def test_value_and_gradients_are_the_plain_ones_however_logits_are_cut(
    shapes, n_rows, cut, padded, scale
):
    torch.manual_seed(0)
    tensors = leaves(shapes, n_rows)
    target = torch.randint(int(padded), sum(k for k, _ in shapes), (n_rows,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan", lambda *args, **kwargs: cut)
        found = loss_of(tensors, target, padded=padded)
    expected = plain(tensors, target, padded)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(scale * found, tensors)
    for one, other in zip(gradients, torch.autograd.grad(scale * expected, tensors)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("memory", [2**14, 2**16, 2**28])
def test_many_rows_and_columns_in_single_precision(memory):
    tensors = leaves([(3000, 16), (20_000, 4)], 300, torch.float32)
    target = torch.randint(1, 23_000, (300,))
    found = loss_of(tensors, target, memory, padded=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = plain(exact, target, True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(found, tensors)
    for one, other in zip(gradients, torch.autograd.grad(expected, exact)):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("logits", [1, 25, 2**8, 2**18, 2**26])
@pytest.mark.parametrize("n_rows", [1, 7, 500, 2048])
@pytest.mark.parametrize("n_columns", [2, 3050, 400_000])
@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_no_more_logits_than_the_budget_are_held(logits, n_rows, n_columns, caches, soft):
    rows, columns, keeps = plan(n_rows, n_columns, logits, soft=soft, caches=caches)
    assert 0 < rows <= n_rows
    assert 0 < columns <= n_columns
    held = rows * (columns + (n_columns if keeps else columns) + (n_columns if soft else 0))
    assert held <= max(logits, 3 * n_columns if soft else 32)  # one row, or a cache line of it
    assert keeps or not soft


@pytest.mark.parametrize("n_columns", [500, 12_000, 100_000, 400_000, 10**6])
def test_off_the_cpu_there_are_no_more_pieces_than_the_budget_asks_for(n_columns):
    n_rows, logits = 2048, 2**26
    rows, columns, _ = plan(n_rows, n_columns, logits, soft=False, caches=False)
    passes = -(-n_rows // rows) * -(-n_columns // columns)
    assert passes <= n_rows * n_columns / (logits / 2) + 2  # logits, and as much for their softmax


def test_large_logits_do_not_overflow():
    codes = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    rows = torch.tensor([[1.0], [-1.0], [0.5]])
    found = loss_of([codes, rows], torch.tensor([0, 0]))
    assert found.item() == pytest.approx(2e4)
    found.backward()
    assert codes.grad.tolist() == [[0.0], [-2.0]]


def test_a_second_backward_gives_the_same_gradients():
    tensors = leaves([(9, 3)], 4)
    loss = loss_of(tensors, torch.arange(4))
    first = torch.autograd.grad(2 * loss, tensors, retain_graph=True)
    second = torch.autograd.grad(2 * loss, tensors)
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_without_gradients_none_are_kept():
    tensors = leaves([(9, 3), (5, 2)], 4)
    with torch.no_grad():
        value = loss_of(tensors, torch.arange(4))
    assert not value.requires_grad
    torch.testing.assert_close(value, plain(tensors, torch.arange(4)).detach())


def test_no_rows_cost_nothing():
    head = TreeSoftmax(block_embedding((5, 4, 6), (8, 3, 1), 8))
    loss = head.loss(torch.randn(0, 8, requires_grad=True), torch.randint(1, 5, (0,)))
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [FullSoftmax, TreeSoftmax])
def test_under_autocast_only_products_are_of_low_precision(kind, dtype):
    head = kind(block_embedding((50, 40, 60), (8, 3, 1), 8))
    hidden, target = torch.randn(200, 8), torch.randint(1, 150, (200,))
    exact = head.loss(hidden, target)
    exact_gradients = torch.autograd.grad(exact, list(head.parameters()))
    with torch.autocast("cpu", dtype):
        loss = head.loss(hidden, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for one, other in zip(torch.autograd.grad(loss, list(head.parameters())), exact_gradients):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.05


@pytest.mark.parametrize("size", ["1GB", "2 MiB", 2**20, "1.5mb"])
def test_loss_memory_is_a_size(size):
    assert CompressionConfig(loss_memory=size).loss_memory >= 2**20


@pytest.mark.parametrize("size", [0, -1, "1KB", "256", "many", None, True, 2.5, "1MiB/s"])
def test_another_loss_memory_is_refused(size):
    with pytest.raises(CompressionError, match="loss_memory"):
        CompressionConfig(loss_memory=size)
