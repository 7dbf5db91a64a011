import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec_recbole import CompressionError, FullSoftmax, TreeSoftmax
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.partition import Partition
from tests.builders import block_embedding
from tests.oracles import best_items, log_prob_row

HEADS = [FullSoftmax, TreeSoftmax]
GRID = [
    ((5, 4, 6), (8, 3, 1)),
    ((2, 1, 1), (8, 8, 2)),  # one-item blocks
    ((7,), (8,)),  # no tail: the tree is a flat softmax
    ((3, 9), (4, 2)),  # a head with a projection
]


def build(head_class, sizes, ranks, dim=8):
    softmax = head_class(block_embedding(sizes, ranks, dim))
    if head_class is TreeSoftmax:
        torch.nn.init.normal_(softmax.clusters)
    return softmax


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize(("sizes", "ranks"), GRID)
def test_log_prob_is_the_definition_and_sums_to_one(head_class, sizes, ranks):
    softmax = build(head_class, sizes, ranks)
    hidden = torch.randn(3, 8)
    found = softmax.log_prob(hidden)
    expected = torch.tensor([log_prob_row(softmax, row) for row in hidden])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 1:].exp().sum(1), torch.ones(3))
    assert (found[:, 0] == -torch.inf).all()


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize(("sizes", "ranks"), GRID)
@pytest.mark.parametrize("where", ["everywhere", "head", "tail"])
def test_loss_is_the_mean_negative_log_likelihood(head_class, sizes, ranks, where):
    softmax = build(head_class, sizes, ranks)
    order = softmax.table.partition.item_at.long()
    candidates = {"everywhere": order[1:], "head": order[1 : sizes[0]], "tail": order[-1:]}[where]
    target = candidates[torch.randint(len(candidates), (11,))]
    hidden = torch.randn(11, 8)
    expected = -softmax.log_prob(hidden).gather(1, target.unsqueeze(1)).mean()
    torch.testing.assert_close(softmax.loss(hidden, target), expected)


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize(("sizes", "ranks"), GRID)
def test_score_is_the_column_of_scores(head_class, sizes, ranks):
    softmax = build(head_class, sizes, ranks)
    hidden = torch.randn(4, 8)
    items = torch.randint(0, sum(sizes), (4, 6))
    expected = softmax.scores(hidden).gather(1, items)
    torch.testing.assert_close(softmax.score(hidden, items), expected)


@pytest.mark.parametrize("head_class", HEADS)
def test_scores_rank_as_probabilities_do(head_class):
    softmax = build(head_class, (5, 4, 6), (8, 3, 1))
    hidden = torch.randn(4, 8)
    gap = softmax.scores(hidden)[:, 1:] - softmax.log_prob(hidden)[:, 1:]
    torch.testing.assert_close(gap, gap[:, :1].expand_as(gap))


def test_the_tree_is_torchs_adaptive_softmax_with_the_same_weights():
    dim, cutoffs, n_items = 16, [20, 50], 120
    ranks = (16, 4, 1)  # torch's div_value 4: d, d/4, d/16
    oracle = torch.nn.AdaptiveLogSoftmaxWithLoss(dim, n_items, cutoffs, div_value=4.0)
    # one row more in the softmax, for padding, which torch's does not have
    order = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(n_items) + 1])
    table = BlockEmbedding(Partition(order, [21, 51, n_items + 1]), ranks, dim)
    softmax = TreeSoftmax(table)
    with torch.no_grad():
        table.blocks[0].weight[1:] = oracle.head.weight[:20]
        softmax.clusters.copy_(oracle.head.weight[20:])
        for block, tail in zip(softmax.tails, oracle.tail):
            block.projection.copy_(tail[0].weight)
            block.weight.copy_(tail[1].weight)
    hidden, target = torch.randn(64, dim), torch.randint(0, n_items, (64,))
    by_popularity = softmax.log_prob(hidden)[:, order[1:]]
    torch.testing.assert_close(by_popularity, oracle.log_prob(hidden))
    torch.testing.assert_close(softmax.loss(hidden, order[1:][target]), oracle(hidden, target).loss)


@pytest.mark.parametrize("head_class", HEADS)
def test_gradients_reach_every_factor_and_never_the_padding_row(head_class):
    softmax = build(head_class, (5, 4, 6), (8, 3, 1))
    softmax.loss(torch.randn(40, 8), torch.arange(40) % 14 + 1).backward()
    assert all(p.grad.abs().sum() > 0 for p in softmax.parameters())
    assert softmax.head_block.weight.grad[0].abs().sum() == 0


def test_bpr_is_recboles():
    from recbole.model.loss import BPRLoss

    softmax = build(FullSoftmax, (5, 4, 6), (8, 3, 1))
    hidden, target, negative = torch.randn(9, 8), torch.arange(1, 10), torch.arange(3, 12)
    table = softmax.table.dense()
    expected = BPRLoss()((hidden * table[target]).sum(1), (hidden * table[negative]).sum(1))
    torch.testing.assert_close(softmax.pairwise_loss(hidden, target, negative), expected)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(HEADS),
    blocks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_topk_is_a_full_sort(kind, blocks, seed, data):
    torch.manual_seed(seed)
    sizes = (blocks[0] + 1, *blocks[1:])
    softmax = build(kind, sizes, tuple(min(8, 4 - i) for i in range(len(sizes))))
    n_items = sum(sizes)
    excluded = data.draw(st.lists(st.integers(0, n_items - 1), max_size=n_items - 2))
    left = n_items - 1 - len(set(excluded) - {0})
    k = data.draw(st.integers(1, left)) if left else 1
    if not left:
        return
    hidden = torch.randn(2, 8)
    exclude = torch.tensor([excluded, excluded]) if excluded else None
    found = softmax.topk(hidden, k, exclude)
    scores = softmax.scores(hidden)
    for row in range(2):
        expected = best_items(scores[row].tolist(), k, set(excluded))
        assert found.items[row].tolist() == expected
    torch.testing.assert_close(found.scores, scores.gather(1, found.items))


def test_topk_of_designs_counter_example():
    """The authors open a block only when its cluster is among the k best of the head; that is not
    exact: A and B come before i1, and B holds an item better than all of them."""
    log = torch.tensor([0.30, 0.10, 0.25, 0.24, 0.11]).log()  # i0, i1, then clusters A, B, C
    sizes = (3, 5, 2, 2)  # padding, i0, i1 | A: five of .05 | B: .20 and .04 | C: .06 and .05
    table = block_embedding(sizes, (1, 1, 1, 1), 1, shuffled=False)
    softmax = TreeSoftmax(table)
    inside = [torch.full((5,), 1 / 5), torch.tensor([20, 4]) / 24, torch.tensor([6, 5]) / 11]
    with torch.no_grad():
        table.blocks[0].weight[1:, 0] = log[:2]
        softmax.clusters[:, 0] = log[2:]
        for block, probabilities in zip(softmax.tails, inside):
            block.weight[:, 0] = probabilities.log()
    best = softmax.topk(torch.ones(1, 1), k=2)
    assert best.items.tolist() == [[1, 8]]
    torch.testing.assert_close(best.scores.exp(), torch.tensor([[0.30, 0.20]]))


@pytest.mark.parametrize("head_class", HEADS)
def test_equal_scores_come_by_lower_id(head_class):
    softmax = build(head_class, (5, 4), (8, 3))
    assert softmax.topk(torch.zeros(1, 8), k=3, exclude=torch.tensor([[1]])).items.shape == (1, 3)
    flat = build(FullSoftmax, (5, 4), (8, 3))
    assert flat.topk(torch.zeros(1, 8), k=8).items.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize(("k", "exclude"), [(9, None), (0, None), (7, [[1, 2]])])
def test_k_above_what_is_left_is_an_error(head_class, k, exclude):
    softmax = build(head_class, (5, 4), (8, 3))
    with pytest.raises(CompressionError, match=f"`k` to be from 1 to .* got {k}"):
        softmax.topk(torch.randn(1, 8), k, None if exclude is None else torch.tensor(exclude))
