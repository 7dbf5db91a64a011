"""A training step: its PyTorch operations, what it waits for, and windows with padding."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cprec_recbole import CompressionConfig, CpSASRec, FullSoftmax, TreeSoftmax
from cprec_recbole.data import NEXT_ITEMS
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.host.library import recbole_config
from cprec_recbole.losses import Workspace
from cprec_recbole.models.spec import Parts
from cprec_recbole.partition import Partition
from tests.builders import block_embedding

KINDS = [FullSoftmax, TreeSoftmax]
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "bincount", "unique")


class Operations(TorchDispatchMode):
    """Counts operations, and those that a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        boolean = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += 1
        self.waits += boolean or any(name.startswith(wait) for wait in WAITS)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is computed off the CPU."""
    monkeypatch.setattr(Workspace, "is_cached", staticmethod(lambda like: False))


def test_the_counter_of_waits_sees_them():
    with Operations() as found:
        torch.arange(3)[torch.tensor([True, False, True])].sum().item()
    assert found.waits == 2


def waits(kind, n_blocks, loss_memory):
    """In a look-up, a loss and its gradient."""
    head = kind(block_embedding((8,) * n_blocks, (4,) * n_blocks, 4), loss_memory)
    items = torch.arange(1, 8 * n_blocks)
    with Operations() as found:
        head.loss(head.table(items), items).backward()
    return found.waits


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_over_a_small_catalogue_does_not_wait_for_the_device(kind):
    assert waits(kind, 3, 2**20) == 0


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", KINDS)
def test_over_a_large_one_it_is_not_waited_for_block_by_block(kind):
    assert waits(kind, 2, 2**10) == waits(kind, 6, 2**10) > 0


def slopes(loss, tensors):
    return [loss, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("loss_memory", [2**12, 2**28])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_target_do_not_count(kind, loss_memory, monkeypatch):
    softmax = kind(block_embedding((9, 8, 20), (8, 3, 1), 8).double(), loss_memory).double()
    hidden = torch.randn(70, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 37, (70,)) * (torch.rand(70) < 0.6)
    real = target != 0
    tensors = [hidden, *softmax.parameters()]
    expected = -softmax.log_prob(hidden[real]).gather(1, target[real].unsqueeze(1)).mean()
    expected = slopes(expected, tensors)
    for is_cached in (True, False):
        monkeypatch.setattr(Workspace, "is_cached", staticmethod(lambda like, c=is_cached: c))
        found = slopes(softmax.loss(hidden, target), tensors)
        torch.testing.assert_close(found, expected)
        assert softmax.loss(hidden, torch.zeros_like(target)) == 0
    if kind is FullSoftmax:
        negative = torch.randint(1, 37, (70,))
        found = softmax.pairwise_loss(hidden, target, negative)
        chosen = softmax.pairwise_loss(hidden[real], target[real], negative[real])
        torch.testing.assert_close(slopes(found, tensors), slopes(chosen, tensors))


def layers():
    """SASRec's, without a table."""
    config = recbole_config("CpSASRec", "ml-100k", {"MAX_ITEM_LIST_LENGTH": 50})

    class NoItems:
        iid_field = config["ITEM_ID_FIELD"]

        def num(self, field):
            return 1

    return CpSASRec.spec.build_inner(config, NoItems())


def operations(loss):
    loss().backward()  # gradients are there already, as they are not at a first step
    with Operations() as found:
        loss().backward()
    return found.count


def plain_operations(n_items, items, targets):
    """Of the uncompressed model and PyTorch's cross-entropy."""
    model = layers()
    model.item_embedding = nn.Embedding(n_items, 64, padding_idx=0)

    def loss():
        hidden = CpSASRec.spec.hidden_states(model, items).flatten(0, 1)
        logits = hidden @ model.item_embedding.weight.T
        return F.cross_entropy(logits, targets.flatten(), ignore_index=0)

    return operations(loss)


def our_operations(n_items, items, targets, ranks, softmax):
    options = CompressionConfig(ranks=ranks, sharing="none", softmax=softmax)
    plan = options.plan(64, n_items)
    partition = Partition.from_counts(np.arange(n_items)[::-1], plan.cutoffs)
    table = BlockEmbedding(partition, plan.ranks, 64)
    model = CpSASRec(parts=Parts(layers(), table, table, options, reads_last_column=False))
    lengths = torch.full((len(items),), items.shape[1])
    names = (model.ITEM_SEQ, model.ITEM_SEQ_LEN, NEXT_ITEMS)
    batch = Interaction(dict(zip(names, (items, lengths, targets))))
    return operations(lambda: model.calculate_loss(batch))


@pytest.mark.parametrize(("n_items", "on_gpu"), [(1683, False), (1683, True), (12_102, True)])
def test_a_step_takes_few_operations_more_than_the_plain_one(n_items, on_gpu, monkeypatch):
    monkeypatch.setattr(Workspace, "is_cached", staticmethod(lambda like: not on_gpu))
    items, targets = torch.randint(1, n_items, (2, 40, 50))
    plain = plain_operations(n_items, items, targets)
    blocks = [64, 16, 4]
    for ranks, softmax, most in (([64], "full", 1.3), (blocks, "full", 1.3), (blocks, "tree", 1.6)):
        count = our_operations(n_items, items, targets, ranks, softmax)
        assert count <= most * plain, (ranks, softmax, count, plain)
