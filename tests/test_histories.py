"""Windows out of RecBole's data and out of lists, each training target once."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cprec_recbole import CompressionError
from cprec_recbole.compression.histories import drawn_histories, histories_of, sample

LENGTH = 8


def pairs(histories):
    """Every target with the items before it in its window, as a sorted list."""
    items, targets = histories.prefixes()
    return sorted((row[row != 0].tolist(), int(t)) for row, t in zip(items, targets))


def loader(world, name, **options):
    return world.loaders(world.config(name, **options))[0]


def test_recboles_prefix_rows_become_the_windows_of_our_own_data_set(world):
    ours = histories_of(loader(world, "CpGRU4Rec"), 41, LENGTH)
    of_prefixes = histories_of(loader(world, "GRU4Rec"), 41, LENGTH)
    by_option = histories_of(loader(world, "CpGRU4Rec", training="last_position"), 41, LENGTH)
    assert pairs(ours) == pairs(of_prefixes) == pairs(by_option)
    assert int((ours.targets != 0).sum()) == len(loader(world, "GRU4Rec")._dataset)


@pytest.mark.parametrize("limit", [3, 20])
@pytest.mark.parametrize("name", ["SASRec", "CpSASRec"])
@pytest.mark.parametrize("grouped", ["user", "none"])
def test_every_training_target_is_there_once_whatever_the_lengths_and_the_split(
    world, name, limit, grouped
):
    evaluation = {"split": {"RS": [8, 1, 1]}, "order": "TO", "mode": "full", "group_by": grouped}
    rows = loader(world, "SASRec", eval_args=evaluation, MAX_ITEM_LIST_LENGTH=100)._dataset[:]
    whole = {}  # each target's history
    for items, target, user in zip(rows["item_id_list"], rows["item_id"], rows["user_id"]):
        whole.setdefault((int(user), int(target)), []).append(items[items != 0].tolist())
    data = loader(world, name, eval_args=evaluation, MAX_ITEM_LIST_LENGTH=limit)
    found = histories_of(data, 41, LENGTH)
    assert found.items.shape[1] == min(limit, LENGTH)
    assert ((found.items != 0) | (found.targets == 0)).all()
    expected = sorted(int(target) for target in rows["item_id"])
    assert sorted(found.targets[found.targets != 0].tolist()) == expected
    histories = [(target, each) for (_, target), several in whole.items() for each in several]
    for seen, target in pairs(found):
        assert any(t == target and each[-len(seen) :] == seen for t, each in histories)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_prefix_rows_are_sequences_again_in_whatever_order_they_lie(world, order):
    """As in benchmark files, which may have the longest first."""
    dataset = loader(world, "SASRec", MAX_ITEM_LIST_LENGTH=LENGTH)._dataset
    expected = histories_of(dataset, 41, LENGTH)
    rows = torch.arange(len(dataset)).flip(0)
    if order == "shuffled":
        rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1))
    other = copy.copy(dataset)
    other.inter_feat = dataset.inter_feat[rows]
    found = histories_of(other, 41, LENGTH)
    assert torch.equal(*(each.targets[each.targets != 0].sort()[0] for each in (found, expected)))
    if order == "reversed":
        assert pairs(found) == pairs(expected)
        assert len(found.items) == len(expected.items)


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=20), min_size=1, max_size=6).filter(
        lambda rows: all(rows) and any(len(row) > 1 for row in rows)
    ),
    st.integers(1, 6),
)
def test_lists_become_windows_with_every_item_but_the_first_a_target_once(rows, length):
    found = histories_of(rows, 10, length)
    items, targets = found.items, found.targets
    assert items.shape[1] == length
    assert ((items == 0) == (targets == 0)).all()
    expected = sorted(item for row in rows for item in row[1:])
    assert sorted(targets[targets != 0].tolist()) == expected
    bigrams = sorted(pair for row in rows for pair in pairwise(row))
    real = targets != 0
    assert sorted(zip(items[real].tolist(), targets[real].tolist())) == bigrams
    inside = items[:, 1:] == targets[:, :-1]
    assert (inside | (items[:, 1:] == 0)).all()


def test_drawn_histories_follow_the_counts_and_hold_no_padding_between():
    counts = np.array([1000.0, 60, 30, 10, 0])
    drawn = drawn_histories(counts, 4000, 5, torch.Generator().manual_seed(1))
    real = drawn[drawn != 0]
    shares = torch.bincount(real, minlength=5).double() / len(real)
    torch.testing.assert_close(
        shares, torch.tensor([0, 0.6, 0.3, 0.1, 0], dtype=torch.float64), atol=0.02, rtol=0
    )
    assert ((drawn[:, :-1] != 0) | (drawn[:, 1:] == 0)).all()
    assert (drawn[:, 0] != 0).all()
    alike = drawn_histories(np.zeros(5), 50, 3, torch.Generator())
    assert set(alike.unique().tolist()) == {0, 1, 2, 3, 4}


def test_a_sample_has_no_window_twice():
    whole = torch.arange(1, 31).view(10, 3)
    some = sample(whole, 4, torch.Generator())
    assert len(some.unique()) == 12
    assert torch.equal(sample(whole, 99, torch.Generator()), whole)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("many", "`data` to hold item ids, .*, but got 'many'"),
        ([[1], [2]], "history of two items or more"),
        ([[1, 99]], "item ids from 1 to 40"),
        ([], "every history of `data` to hold an item, but history 0 has none"),
        ([[]], "every history of `data` to hold an item, but history 0 has none"),
        (7, "`data` to be RecBole's training data or lists of item ids, but got int"),
    ],
)
def test_other_data_is_refused(data, match):
    with pytest.raises(CompressionError, match=match):
        histories_of(data, 41, LENGTH)


def test_data_of_another_catalogue_is_refused(world):
    with pytest.raises(CompressionError, match="of the model's 99 items"):
        histories_of(loader(world, "SASRec"), 99, LENGTH)
