import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cprec_recbole import CompressionError, Partition


def test_popular_items_come_first_and_ties_by_lower_id():
    partition = Partition.from_counts(np.array([99, 1, 5, 5, 0, 7]), [3, 6])
    assert partition.item_at.tolist() == [0, 5, 2, 3, 1, 4]  # the count of id 0 is ignored
    assert partition.sizes == (3, 3)


@given(st.lists(st.integers(0, 3), min_size=3, max_size=30), st.data())
def test_positions_and_items_are_inverse(counts, data):
    head = data.draw(st.integers(2, len(counts) - 1))
    partition = Partition.from_counts(np.array(counts), [head, len(counts)])
    ids = torch.arange(len(counts))
    positions = partition.positions(ids)
    assert partition.item_at[positions].tolist() == ids.tolist()
    assert positions[0] == 0
    assert partition.blocks(positions).tolist() == [int(p >= head) for p in positions]
    ranked = [counts[i] for i in partition.item_at.tolist()[1:]]
    assert ranked == sorted(ranked, reverse=True)
    assert torch.equal(partition.by_item(partition.item_at.float()), ids.float())


@pytest.mark.parametrize("cutoffs", [[3, 7], [3], [4, 3, 6], [1, 6], []])
def test_cutoffs_that_do_not_fit_are_refused(cutoffs):
    with pytest.raises(CompressionError, match="cutoffs"):
        Partition(torch.arange(6), cutoffs)


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 1, 1], [0, 1, 3]])
def test_an_order_that_is_none_is_refused(order):
    with pytest.raises(CompressionError, match="item_at"):
        Partition(torch.tensor(order), [2, 3])


def test_a_loaded_order_replaces_its_inverse_too():
    first = Partition.from_counts(np.array([0, 3, 2, 1]), [2, 4])
    second = Partition.from_counts(np.array([0, 1, 2, 3]), [2, 4])
    second.load_state_dict(first.state_dict())
    assert second.positions(torch.arange(4)).tolist() == [0, 1, 2, 3]
    damaged = {"item_at": torch.tensor([0, 2, 2, 1], dtype=torch.int32)}
    with pytest.raises(CompressionError, match="damaged"):
        second.load_state_dict(damaged)
    assert second.item_at.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [np.uint32, np.int64, np.float32, list])
def test_the_order_is_that_of_the_counts_whatever_their_type(kind):
    assert Partition.from_counts(kind([9, 1, 0, 5]), [2, 4]).item_at.tolist() == [0, 3, 1, 2]
