"""Intervals against known laws: coverage on simulated users, and scipy's own bootstrap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cprec_recbole import CompressionError
from cprec_recbole.compare.results import (
    Difference,
    pack_users,
    paired_difference,
    resampled_means,
    unpack_users,
)
from cprec_recbole.training.ranking import PARTS, by_popularity, by_user, popularity_parts


def gains(generator, users, chance):
    """NDCG@20-like values: most users miss."""
    place = generator.integers(0, 20, users)
    return np.where(generator.random(users) < chance, 1 / np.log2(2.0 + place), 0.0)


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr("cprec_recbole.compare.results.RESAMPLES", 500)
    generator = np.random.default_rng(0)
    hit = 0
    for trial in range(300):
        common = gains(generator, 400, 0.2)  # pairs go together
        ours = common + generator.normal(0.01, 0.1, 400)
        found = paired_difference([ours], [common], seed=trial)
        hit += found.low <= 0.01 <= found.high
    # 95% of 300 is 285; a binomial is within 270 and 296 in all but one of a thousand cases
    assert 270 <= hit <= 296


def test_intervals_agree_with_scipys():
    generator = np.random.default_rng(1)
    ours, theirs = gains(generator, 900, 0.25), gains(generator, 900, 0.2)
    found = paired_difference([ours], [theirs])
    expected = stats.bootstrap(
        ((ours - theirs),), np.mean, n_resamples=10_000, method="percentile", rng=generator
    )
    near = pytest.approx(tuple(expected.confidence_interval), abs=0.1 * expected.standard_error)
    assert (found.low, found.high) == near
    assert found.mean == pytest.approx((ours - theirs).mean())
    assert (found.users, found.seeds) == (900, 1)


def test_pairing_is_what_makes_small_differences_visible():
    generator = np.random.default_rng(2)
    theirs = gains(generator, 1000, 0.3)
    ours = theirs + 0.005
    paired = paired_difference([ours], [theirs])
    shuffled = paired_difference([ours], [generator.permutation(theirs)])
    assert paired.verdict == "better"
    assert shuffled.verdict == "not told apart"
    assert shuffled.high - shuffled.low > 20 * (paired.high - paired.low)


def test_seeds_are_averaged_for_each_user_before_users_are_drawn():
    generator = np.random.default_rng(3)
    ours = [gains(generator, 300, 0.2) for _ in range(3)]
    theirs = [gains(generator, 300, 0.2) for _ in range(3)]
    found = paired_difference(ours, theirs, seed=5)
    by_hand = paired_difference([np.mean(ours, 0) - np.mean(theirs, 0)], [np.zeros(300)], seed=5)
    assert (found.low, found.high) == pytest.approx((by_hand.low, by_hand.high))
    assert found.seeds == 3
    alone = paired_difference(ours[:1], theirs[:1])
    assert found.high - found.low < alone.high - alone.low


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 0.5, -0.25, 1.0]), min_size=1, max_size=40))
def test_resampled_means_are_means_of_samples(values):
    values = np.array(values)
    means = resampled_means(values, 200, np.random.default_rng(0))
    assert means.shape == (200,)
    assert (means >= values.min() - 1e-12).all()
    assert (means <= values.max() + 1e-12).all()
    # every value is a multiple of a quarter, so sums of samples are
    assert np.allclose(means * len(values) * 4, np.round(means * len(values) * 4))


def test_resampled_means_have_the_spread_of_the_mean(monkeypatch):
    values = np.random.default_rng(6).normal(size=500)
    values[:200] = 0.0
    means = resampled_means(values, 20_000, np.random.default_rng(0))
    assert means.std() == pytest.approx(values.std() / np.sqrt(500), rel=0.03)
    monkeypatch.setattr("cprec_recbole.compare.results._AT_A_TIME", 1000)  # two rows at a time
    pieces = resampled_means(values, 2001, np.random.default_rng(0))
    assert pieces.shape == (2001,)
    assert pieces.std() == pytest.approx(values.std() / np.sqrt(500), rel=0.1)


def test_verdicts():
    for low, high, verdict in (
        *((0.1, 0.2, "better"), (-0.2, -0.1, "worse")),
        *((low, high, "not told apart") for low, high in ((-0.1, 0.2), (-0.2, 0.0), (0.0, 0.0))),
    ):
        assert Difference(0.0, low, high, 10, 1).verdict == verdict


def test_values_of_other_users_or_seeds_are_refused():
    three, none, column = np.zeros(3), np.zeros(0), np.zeros((3, 1))
    pairs = (
        ([], []),
        ([three], []),
        ([three], [np.zeros(4)]),
        ([column], [column]),
        ([none], [none]),
    )
    for ours, theirs in pairs:
        with pytest.raises(CompressionError, match="Expected values of the same users"):
            paired_difference(ours, theirs)


def test_parts_of_the_catalogue_hold_a_third_of_the_interactions_each():
    counts = np.array([99, 1, 30, 10, 20, 0, 15, 14])  # id 0 is padding; 90 interactions
    #                      by count: 2 (30), 4 (20), 6 (15), 7 (14), 3 (10), 1 (1), 5 (0)
    assert popularity_parts(counts)[1:].tolist() == [2, 0, 2, 1, 2, 1, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=60))
def test_parts_fall_with_popularity(counts):
    counts = np.array(counts)
    part = popularity_parts(counts)
    order = np.argsort(-counts[1:], kind="stable") + 1
    assert (np.diff(part[order]) >= 0).all()
    total = counts[1:].sum()
    if total:
        # what comes before the first item of a part is at least its share
        for number in (1, 2):
            first = next((i for i, item in enumerate(order) if part[item] == number), None)
            if first is not None and counts[order[first]]:
                assert counts[order[:first]].sum() * 3 >= number * total
        assert part[order[0]] == 0


def test_quality_by_user_and_by_popularity():
    users, targets = np.array([3, 3, 5, 9]), np.array([2, 1, 4, 4])
    places = np.array([0, 20, 2, 19])
    assert by_user(users, places) == pytest.approx([0.5, 0.5, 1 / np.log2(21)])
    found = by_popularity(targets, places, np.array([0, 1, 30, 10, 20, 0, 15, 14]))
    assert set(found) == set(PARTS)
    assert found["head"] == {"ndcg@20": 1.0, "hit@20": 1.0, "cases": 1}
    assert found["middle"]["cases"] == 2
    assert found["middle"]["ndcg@20"] == pytest.approx((0.5 + 1 / np.log2(21)) / 2)
    assert found["tail"] == {"ndcg@20": 0.0, "hit@20": 0.0, "cases": 1}
    found = by_popularity(np.array([1]), np.array([0]), np.array([0, 1, 30]))
    assert found["head"] == {"ndcg@20": None, "hit@20": None, "cases": 0}


@given(st.lists(st.floats(0, 1, width=32), min_size=1))
def test_users_come_back_as_they_were_packed(values):
    assert unpack_users(pack_users(np.array(values, np.float32))).tolist() == values
