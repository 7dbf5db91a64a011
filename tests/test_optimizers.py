"""RecBole's learners, stepped in their quickest forms."""

import copy

import pytest
import torch

from cprec_recbole import CompressionError, FullSoftmax
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.training.optimizers import Both, build_optimizer, clip_gradients
from tests.builders import block_embedding, train_a_step

PLAIN = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def steps(table, optimizer, n=6):
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        items = torch.randint(0, 105, (7,), generator=generator)
        optimizer.zero_grad()
        table(items).square().sum().backward()
        optimizer.step()
    return table


def tables():
    first = block_embedding((5, 40, 60), (8, 3, 1), 8)
    return first, copy.deepcopy(first)


def assert_equal_parameters(one, other):
    for p, q in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learner", PLAIN)
def test_a_learner_moves_as_torchs_own(learner):
    one, other = tables()
    steps(one, PLAIN[learner](one.parameters(), lr=0.1, weight_decay=0.01))
    steps(other, build_optimizer(other, learner.upper(), 0.1, 0.01))
    assert_equal_parameters(one, other)


@pytest.mark.parametrize("learner", PLAIN)
def test_a_search_sees_a_step_that_moves_a_single_item(learner):
    head = FullSoftmax(block_embedding((200, 800), (8, 8), 8))
    head.topk(torch.randn(2, 8), 3)  # keeps what it made of the weights
    weight = head.table.blocks[1].weight
    optimizer = build_optimizer(head, learner, 30.0, 0.0)
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight.grad[13] = 9.0
    before = weight.detach().clone()
    optimizer.step()
    moved = (weight.detach() != before).any(1).nonzero().flatten()
    assert moved.tolist() == [13]
    found = head.topk(-torch.ones(1, 8), 1)  # the moved item is far along the negative diagonal
    scores = head.scores(-torch.ones(1, 8))[0]
    assert found.items[0, 0] == scores[1:].argmax() + 1
    assert found.scores[0, 0] == pytest.approx(float(scores[1:].max()))


@pytest.mark.parametrize("learner", ["sgd", "adagrad"])
def test_sparse_steps_are_the_dense_ones(learner):
    one, other = tables()
    other.look_up_sparsely(30)
    optimizer = build_optimizer(other, learner, 0.1, 0.0)
    steps(one, build_optimizer(one, learner, 0.1, 0.0))
    steps(other, optimizer)
    assert isinstance(optimizer, Both)
    assert other.blocks[1].weight.grad.is_sparse
    assert not other.blocks[0].weight.grad.is_sparse
    assert_equal_parameters(one, other)


def test_sparse_adam_steps_projections_at_a_tenth_of_the_rate():
    one, other = tables()
    other.look_up_sparsely(1)
    slow = [block.projection for block in one.blocks[1:]]
    rows = [block.weight for block in one.blocks]
    whole = torch.optim.Adam([{"params": slow, "lr": 0.01}, {"params": rows, "lr": 0.1}])
    steps(one, whole, n=1)  # after which rows go other ways
    steps(other, build_optimizer(other, "sparse_adam", 0.1, 0.0), n=1)
    assert_equal_parameters(one, other)


def test_sparse_adam_leaves_rows_alone_that_are_not_looked_up():
    table, before = tables()
    table.look_up_sparsely(50)
    assert [block.sparse for block in table.blocks] == [False, False, True]  # small ones, the head
    table.look_up_sparsely(1)
    optimizer = build_optimizer(table, "sparse_adam", 0.1, 0.0)
    items = table.partition.item_at[[7, 50, 60, 100]].long()
    for _ in range(3):
        optimizer.zero_grad()
        table(items).square().sum().backward()
        optimizer.step()
    for block, old, start in zip(table.blocks[1:], before.blocks[1:], table.partition.starts[1:]):
        moved = (block.weight != old.weight).any(1).nonzero().squeeze(1) + start
        own = [p for p in (7, 50, 60, 100) if start <= p < start + len(block.weight)]
        assert moved.tolist() == own


@pytest.mark.parametrize("learner", ["adagrad", "sparse_adam"])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(learner):
    one, _ = tables()
    one.look_up_sparsely(1)
    optimizer = build_optimizer(one, learner, 0.1, 0.0)
    steps(one, optimizer)
    other = copy.deepcopy(one)
    again = build_optimizer(other, learner, 0.5, 0.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(one, optimizer)
    steps(other, again)
    assert_equal_parameters(one, other)


@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({"learner": "sgd", "tied": False}, True),
        ({"learner": "sparse_adam", "loss_type": "BPR", "softmax": "full"}, True),
        ({"learner": "sparse_adam"}, False),  # tied: the softmax reads every row
        ({"learner": "adam", "tied": False}, False),  # moves every row
        ({"learner": "sgd", "tied": False, "weight_decay": 0.1}, False),
    ],
)
@pytest.mark.parametrize("name", ["CpSASRec", "CpNextItNet"])
def test_recboles_options_decide(world, monkeypatch, name, options, sparse):
    monkeypatch.setattr(BlockEmbedding.look_up_sparsely, "__defaults__", (1,))
    options = {"train_neg_sample_args": None, **options}
    if options.get("loss_type") == "BPR":
        options.pop("train_neg_sample_args")
    model = world.model(name, ranks=[16, 4, 2], cutoffs=[6, 20], **options)
    penalty = name == "CpNextItNet"  # on all weights
    assert [b.sparse for b in model.table.blocks[1:]] == [sparse and not penalty] * 2
    assert (
        not any(b.sparse for b in model.softmax.table.blocks) or model.softmax.table is model.table
    )
    train_a_step(model, world.batch(name, ranks=[16, 4, 2], cutoffs=[6, 20], **options))


def test_an_unknown_learner_and_weight_decay_with_sparse_adam_are_refused():
    table = block_embedding((5, 40), (8, 3), 8)
    with pytest.raises(CompressionError, match=r"`learner` to be one of adam, .*'adm'"):
        build_optimizer(table, "adm", 0.1, 0.0)
    with pytest.raises(CompressionError, match=r"`weight_decay` to be 0 .* but got 0.1"):
        build_optimizer(table, "sparse_adam", 0.1, 0.1)


def test_a_state_of_another_learner_is_refused():
    table = block_embedding((5, 40), (8, 3), 8)
    state = build_optimizer(table, "adam", 0.1, 0.0).state_dict()
    table.look_up_sparsely(1)
    with pytest.raises(CompressionError, match="another `learner`"):
        build_optimizer(table, "sparse_adam", 0.1, 0.0).load_state_dict(state)


def sparse_gradient():
    parameter = torch.nn.Parameter(torch.zeros(5, 2))
    rows = torch.tensor([[3, 1, 3]])
    values = torch.tensor([[3.0, -4], [0, 2], [1, 1]])
    parameter.grad = torch.sparse_coo_tensor(rows, values, (5, 2))
    return parameter


@pytest.mark.parametrize("norm_type", [2.0, 1.0, "inf"])
def test_sparse_gradients_are_clipped_as_dense_ones(norm_type):
    dense = torch.nn.Parameter(torch.zeros(3))
    dense.grad = torch.tensor([1.0, -2, 0.5])
    sparse, whole = sparse_gradient(), torch.nn.Parameter(torch.zeros(5, 2))
    whole.grad, other = sparse.grad.to_dense(), copy.deepcopy(dense)
    other.grad = dense.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_([whole, other], 0.5, float(norm_type))
    found = clip_gradients([sparse, dense], 0.5, norm_type)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sparse.grad.to_dense(), whole.grad)
    torch.testing.assert_close(dense.grad, other.grad)


@pytest.mark.parametrize(("name", "value"), [("max_norm", 0), ("norm_type", -1), ("norm_type", 0)])
def test_clipping_by_no_norm_is_refused(name, value):
    options = {"max_norm": 1.0, name: value}
    with pytest.raises(CompressionError, match=f"the {name} of `clip_grad_norm` to be above 0"):
        clip_gradients([sparse_gradient()], **options)
