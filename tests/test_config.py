import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec_recbole import CompressionConfig, CompressionError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": [16, 64, 4]}, r"`ranks` not to rise.*\[16, 64, 4\]"),
        ({"ranks": [64, 0]}, r"`ranks` to be positive.*\[64, 0\]"),
        ({"ranks": [64, -4]}, r"`ranks` to be positive"),
        ({"ranks": [64, 16.5]}, r"`ranks` to be positive whole numbers"),
        ({"ranks": [True]}, r"`ranks` to be positive whole numbers"),
        ({"ranks": []}, r"`ranks` to have an entry"),
        ({"ranks": 64}, r"`ranks` to be a list.*64"),
        ({"ranks": "64,16"}, r"`ranks` to be a list"),
        ({"cutoffs": [900, 400]}, r"`cutoffs` to rise.*\[900, 400\]"),
        ({"cutoffs": [400, 400]}, r"`cutoffs` to rise"),
        ({"cutoffs": [1, 400]}, r"`cutoffs` to start at 2"),
        ({"cutoffs": [0.1, 1.5]}, r"`cutoffs` given as shares"),
        ({"cutoffs": [float("nan")]}, r"`cutoffs` given as shares"),
        ({"cutoffs": [0.1, 400]}, r"`cutoffs` to be whole numbers of rows or shares"),
        ({"cutoffs": [400], "ranks": [64, 16, 4]}, r"`cutoffs` to have 2 entries for 3 ranks"),
        ({"sharing": "crossblock"}, r"`sharing` to be one of.*Did you mean 'cross_block'"),
        ({"sharing": None}, r"`sharing` to be one of.*None"),
        ({"softmax": "flat"}, r"`softmax` to be one of full, tree.*'flat'"),
        ({"tied": "yes"}, r"`tied` to be True or False.*'yes'"),
        ({"training": "all"}, r"`training` to be one of.*'all'"),
        ({"rank": [64]}, r"got `rank`; did you mean `ranks`"),
        ({"dropout": 0.1}, r"Expected an option out of ranks.*got `dropout`"),
    ],
)
def test_a_broken_rule_is_named(options, words):
    with pytest.raises(CompressionError, match=words):
        CompressionConfig.from_options(options)


@pytest.mark.parametrize(
    ("options", "dim", "n_items", "words"),
    [
        ({"ranks": [128, 16]}, 64, 100, r"at most the embedding size 64.*\[128, 16\]"),
        ({"cutoffs": [40, 120]}, 64, 100, r"`cutoffs` to end at most at the 100 items.*120"),
        ({"cutoffs": [40, 90, 101], "ranks": [8, 4, 2]}, 64, 100, r"101"),
        ({"ranks": [8, 4, 2], "cutoffs": [40, 60, 80]}, 64, 100, r"`cutoffs` to have 2 entries"),
        ({"ranks": [8, 4, 2, 1]}, 64, 4, r"one block for each of the 3 items.*4 blocks"),
    ],
)
def test_blocks_that_do_not_fit_are_named(options, dim, n_items, words):
    with pytest.raises(CompressionError, match=words):
        CompressionConfig(**options).plan(dim, n_items)


def test_the_error_is_a_value_error():
    with pytest.raises(ValueError, match="ranks"):
        CompressionConfig(ranks=[1, 2])


def test_the_end_of_the_catalogue_may_be_left_out():
    short = CompressionConfig(ranks=[8, 4], cutoffs=[40]).plan(8, 100)
    whole = CompressionConfig(ranks=[8, 4], cutoffs=[40, 100]).plan(8, 100)
    shares = CompressionConfig(ranks=[8, 4], cutoffs=[0.4, 1.0])
    assert shares == CompressionConfig(ranks=[8, 4], cutoffs=[0.4])
    assert short == whole
    assert short.sizes == (40, 60)


def test_defaults_are_falling_ranks_and_a_small_head():
    plan = CompressionConfig().plan(64, 10_001)
    assert plan.ranks == (32, 16, 8)
    assert plan.cutoffs == (1001, 3163, 10_001)
    assert CompressionConfig(cutoffs=[10, 20, 30]).plan(20, 100).ranks == (10, 5, 2, 2)
    assert CompressionConfig().plan(1, 100).ranks == (1, 1, 1)


@pytest.mark.parametrize(
    ("rounding", "ranks"),
    [(None, (32, 16, 8)), ("int8", (32, 16, 8)), ("mixed", (64, 32, 24)), ("int4", (64, 32, 24))],
)
def test_default_ranks_are_higher_where_rows_are_trained_for_int4(rounding, ranks):
    assert CompressionConfig(rounding=rounding).plan(64, 10_000).ranks == ranks
    assert CompressionConfig(rounding=rounding).plan(64, 300_000).ranks[-1] == 4
    with pytest.raises(CompressionError, match="`rounding` to be one of int8, mixed, int4"):
        CompressionConfig(rounding="int2")


def test_above_200_000_items_the_default_ranks_are_the_papers():
    for n_items, ranks in ((200_001, (32, 16, 8)), (200_002, (64, 16, 4))):
        assert CompressionConfig().plan(64, n_items).ranks == ranks


@pytest.mark.parametrize(("items", "head"), [(800, 200), (1682, 400), (3400, 400), (50_000, 5000)])
def test_the_default_head_is_a_tenth_within_bounds(items, head):
    plan = CompressionConfig().plan(64, items + 1)
    assert plan.cutoffs[0] == head + 1  # and the padding row
    assert plan.cutoffs[1] == pytest.approx((head * items) ** 0.5, abs=2)  # equal ratio


@pytest.mark.parametrize(
    ("items", "blocks"), [(200_001, 3), (300_000, 4), (400_000, 5), (10**6, 7), (10**7, 14)]
)
def test_a_large_catalogue_has_a_small_head_and_more_blocks(items, blocks):
    plan = CompressionConfig().plan(64, items + 1)
    assert plan.ranks == (64, 16, *[4] * (blocks - 2))
    assert plan.cutoffs[0] == 20_001  # and the padding row
    steps = np.diff(np.sqrt(np.array(plan.cutoffs) - 1))
    assert steps == pytest.approx(np.full(blocks - 1, steps[0]), rel=1e-3)


def test_the_default_blocks_of_a_large_catalogue_are_about_the_cheapest_by_zipfs_law():
    n_items = 10**7
    below = np.concatenate([[0.0], (1 / np.arange(1.0, n_items + 1)).cumsum()])

    def logits(cutoffs):  # of a target, expected
        ends = np.array([0, *cutoffs])
        shares = np.diff(below[ends - np.arange(len(ends)).clip(max=1)]) / below[-1]
        return ends[1] + (np.diff(ends) * shares)[1:].sum()

    plan = CompressionConfig(ranks=[8, 4, 2, 1]).plan(8, n_items + 1)
    grid = np.geomspace(30_000, 9e6, 40).astype(int)
    least = min(logits((20_001, a, b, n_items + 1)) for a in grid for b in grid if a < b)
    assert logits(plan.cutoffs) <= 1.05 * least
    assert logits(CompressionConfig().plan(64, n_items + 1).cutoffs) < 0.5 * least


def test_a_tiny_catalogue_has_fewer_blocks_unless_asked_for():
    assert CompressionConfig().plan(64, 2).ranks == (64,)
    assert CompressionConfig().plan(64, 3).sizes == (2, 1)


def test_shares_count_items_and_not_the_padding_row():
    assert CompressionConfig(cutoffs=[0.25, 0.5]).plan(64, 101).cutoffs == (26, 51, 101)


def test_uncompressed_is_one_block_of_full_rank():
    plan = CompressionConfig.uncompressed().plan(48, 77)
    assert (plan.ranks, plan.cutoffs, plan.n_parameters) == ((48,), (77,), 48 * 77)


def test_parameters_are_the_papers_formula():
    plan = CompressionConfig(ranks=[8, 4, 2], cutoffs=[10, 30]).plan(8, 100)
    assert plan.n_parameters == 10 * 8 + (20 * 4 + 4 * 8) + (70 * 2 + 2 * 8)


@given(
    n_blocks=st.integers(1, 6),
    dim=st.integers(1, 96),
    extra=st.integers(0, 5000),
    shares=st.lists(st.floats(0.001, 0.999), unique=True, max_size=5),
)
def test_every_block_has_an_item(n_blocks, dim, extra, shares):
    for options in ({"ranks": [dim] * n_blocks}, {"cutoffs": sorted(shares)}):
        blocks = n_blocks if "ranks" in options else len(shares) + 1
        plan = CompressionConfig(**options).plan(dim, blocks + 1 + extra)
        assert plan.n_items == blocks + 1 + extra
        assert len(plan.sizes) == len(plan.ranks) == blocks
        assert plan.sizes[0] >= 2  # the padding row and an item
        assert min(plan.sizes) >= 1
