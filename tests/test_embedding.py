import copy

import numpy as np
import pytest
import torch

from cprec_recbole import BlockEmbedding, CompressionError, Partition
from tests.builders import block_embedding
from tests.oracles import item_vector

GRID = [
    ((5, 4, 6), (8, 3, 1), 8),
    ((2, 1, 1), (8, 8, 2), 8),  # one-item blocks; a second block of full rank
    ((7,), (4,), 4),  # one block: a plain table
    ((7,), (2,), 4),  # one block, one low rank for all
    ((3, 9), (3, 3), 5),  # a head with a projection; a rank above the rows of the head
]


@pytest.mark.parametrize(("sizes", "ranks", "dim"), GRID)
def test_vectors_are_row_times_projection(sizes, ranks, dim):
    table = block_embedding(sizes, ranks, dim)
    ids = torch.arange(sum(sizes))
    expected = torch.stack([item_vector(table, i) for i in ids.tolist()])
    torch.testing.assert_close(table(ids), expected)
    torch.testing.assert_close(table.dense(), expected)
    torch.testing.assert_close(table(ids.view(1, -1, 1)), expected.view(1, len(ids), 1, dim))
    torch.testing.assert_close(table.norm(), expected.norm())


def test_no_projection_at_full_rank():
    table = block_embedding((4, 5), (6, 2), 6)
    assert table.blocks[0].projection is None
    assert sum(p.numel() for p in table.parameters()) == 4 * 6 + 5 * 2 + 2 * 6


@pytest.mark.parametrize("ranks", [(8,), (8, 4, 2), (9, 4), (8, 0)])
def test_ranks_that_do_not_fit_the_blocks_are_refused(ranks):
    with pytest.raises(CompressionError, match="`ranks` to be 2 numbers from 1 to 8"):
        block_embedding((4, 5), ranks, 8)


@pytest.mark.parametrize(("sizes", "ranks", "dim"), GRID)
def test_gradients_are_those_of_the_definition(sizes, ranks, dim):
    table = block_embedding(sizes, ranks, dim)
    ids = torch.randint(1, sum(sizes), (20,))
    weights = torch.randn(20, dim)
    found = torch.autograd.grad((table(ids) * weights).sum(), list(table.parameters()))
    vectors = torch.stack([item_vector(table, i) for i in ids.tolist()])
    expected = torch.autograd.grad(
        (vectors * weights).sum(), list(table.parameters()), allow_unused=True
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_looking_up_padding_teaches_nothing_and_every_real_item_learns():
    table = block_embedding((3, 4, 5), (4, 2, 1), 4)
    table(torch.zeros(6, dtype=torch.int64)).sum().backward()
    assert all(block.weight.grad.abs().sum() == 0 for block in table.blocks)
    table(torch.arange(12)).sum().backward()
    head, *tails = (block.weight.grad.abs().sum(1) for block in table.blocks)
    assert head[0] == 0  # row 0 of the head is padding; row 0 of a tail is a real item
    assert (head[1:] > 0).all()
    assert all((tail > 0).all() for tail in tails)


def test_a_fresh_table_has_the_spread_it_was_asked_for_and_a_zero_padding_row():
    partition = Partition.from_counts(np.arange(3000)[::-1].copy(), [1000, 2000, 3000])
    table = BlockEmbedding(partition, (64, 16, 4), 64)
    table.reset_parameters(std=0.02)
    vectors = table.dense().detach()
    assert vectors[0].abs().sum() == 0
    for start in (0, 1000, 2000):
        spread = vectors[partition.item_at[start + 1 : start + 1000].long()].std()
        assert spread == pytest.approx(0.02, rel=0.05)


def test_full_rank_takes_a_table_without_loss():
    table = block_embedding((5, 4, 6), (8, 8, 8), 8)
    given = torch.randn(15, 8)
    table.approximate(given, torch.ones(15))
    assert torch.equal(table.dense(), given)


def test_low_rank_takes_the_weighted_least_squares_optimum():
    table = block_embedding((6, 20), (8, 3), 8)
    given, counts = torch.randn(26, 8), torch.randint(1, 50, (26,)).float()
    table.approximate(given, counts)
    tail = table.partition.item_at[6:].long()
    weighted = counts[tail].sqrt().unsqueeze(1) * given[tail]
    error = (counts[tail].sqrt().unsqueeze(1) * (table.dense()[tail] - given[tail])).square().sum()
    smallest = torch.linalg.svdvals(weighted.double())[3:].square().sum()  # Eckart-Young
    assert error.item() == pytest.approx(smallest.item(), rel=1e-4)


def random_importance(dim):
    root = torch.randn(dim, dim, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)


def test_where_directions_differ_the_optimum_is_of_what_an_error_costs():
    table = block_embedding((6, 20), (8, 3), 8)
    given, counts = torch.randn(26, 8), torch.randint(1, 50, (26,)).float()
    importance = random_importance(8)
    table.approximate(given, counts, importance)
    tail = table.partition.item_at[6:].long()
    weights = counts[tail].double()
    lost = (table.dense()[tail] - given[tail]).double()
    error = (weights * (lost @ importance * lost).sum(1)).sum()
    # in coordinates in which an error costs its squared length: Eckart-Young
    values, vectors = torch.linalg.eigh(importance)
    turned = given[tail].double() @ vectors * values.sqrt()
    smallest = torch.linalg.svdvals(weights.sqrt().unsqueeze(1) * turned)[3:].square().sum()
    assert error.item() == pytest.approx(smallest.item(), rel=1e-4)
    projection = table.blocks[1].projection.detach()
    torch.testing.assert_close(projection @ projection.T, 8 / 3 * torch.eye(3))


def test_equal_directions_are_the_plain_case():
    plain = block_embedding((6, 20), (8, 3), 8)
    equal = copy.deepcopy(plain)
    given, counts = torch.randn(26, 8), torch.randint(1, 50, (26,)).float()
    plain.approximate(given, counts)
    equal.approximate(given, counts, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(equal.dense(), plain.dense())


@pytest.mark.parametrize("importance", [None, random_importance(8)])
def test_a_block_with_fewer_rows_than_its_rank_is_exact(importance):
    table = block_embedding((4, 2), (8, 5), 8)
    given = torch.randn(6, 8)
    # items that never occurred count as seen once
    table.approximate(given, torch.zeros(6), importance)
    torch.testing.assert_close(table.dense(), given, atol=1e-4, rtol=1e-4)
