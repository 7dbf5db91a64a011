"""Budgets: always met or refused with the smallest size, and the choice as good as can be."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec_recbole import (
    BlockEmbedding,
    CompressionConfig,
    CompressionError,
    Partition,
    compress,
    evaluate,
)
from cprec_recbole.compression.budget import OptionSearch, checked_bytes
from cprec_recbole.compression.histories import drawn_histories
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.spectra import Spectra, block_ends
from cprec_recbole.config import BlockPlan
from cprec_recbole.costs import TableCost, part_sizes
from tests.builders import HOSTS, SCHEMES


def spectra(seed=0, importance=None):
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.normal(size=(30, 5)) * 0.5 ** np.arange(5)).float()
    counts = rng.integers(0, 50, 30).astype(float)
    return table, counts, Spectra.of_table(table, counts, [4, 9, 30], importance)


def every_plan(ends, dim):
    """Every plan of blocks that end at some of the ends, ranks never rising."""
    inner = ends[1:-1]
    for n_blocks in range(1, len(ends)):
        for cut in itertools.combinations(inner, n_blocks - 1):
            for ranks in itertools.combinations_with_replacement(range(dim, 0, -1), n_blocks):
                yield BlockPlan(ranks, (*cut, ends[-1]), dim)


@pytest.mark.parametrize(
    "directions", [None, torch.diag(torch.tensor([0.1, 2, 1, 3, 0.5])).double()]
)
@pytest.mark.parametrize("plan", [((5, 3, 1), (4, 9, 30)), ((2, 2), (9, 30)), ((4,), (30,))])
def test_what_a_plan_loses_is_the_error_of_its_factors(plan, directions):
    table, counts, found = spectra(importance=directions)
    ranks, cutoffs = plan
    blocks = BlockEmbedding(Partition.from_counts(counts, cutoffs), ranks, 5)
    blocks.approximate(table, torch.from_numpy(counts), directions)
    weights = torch.from_numpy(counts).clamp(min=1)
    cost = torch.ones(5) if directions is None else directions.diagonal()
    error = ((blocks.dense() - table).double().square() @ cost.double() * weights).sum()
    whole = (table.double().square() @ cost.double() * weights).sum()
    assert found.loss(BlockPlan(ranks, cutoffs, 5)) == pytest.approx(float(error / whole), abs=1e-6)


@given(
    st.floats(-7, -1),
    st.integers(0, 5),
    st.sampled_from([TableCost(5), TableCost(5, copies=2), TableCost(5, each_cluster=5)]),
)
@settings(max_examples=40, deadline=None)
def test_the_plan_for_a_price_is_the_best_of_all(exponent, seed, cost):
    price = 10.0**exponent
    _, _, found = spectra(seed=seed)

    def value(plan):  # a block costs one parameter more than it has: of equals, the fewest blocks
        return found.loss(plan) + price * (cost.of(plan) + len(plan.ranks))

    best = min(value(plan) for plan in every_plan(found.ends, 5))
    assert value(found._priced(price, cost)) == pytest.approx(best, rel=1e-9)


@given(st.integers(30, 260), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_plan_for_a_budget_fits_and_nothing_more_would(parameters, seed):
    _, _, found = spectra(seed=seed)
    plan = found.best_plan(parameters, TableCost(5))
    if plan is None:
        assert parameters < 30 + 5  # one block of rank 1
        return
    assert plan.n_parameters <= parameters
    for other in every_plan(found.ends, 5):  # no rank of it can be raised
        same = other.cutoffs == plan.cutoffs
        more = all(a >= b for a, b in zip(other.ranks, plan.ranks)) and other.ranks != plan.ranks
        if same and more and other.n_parameters <= parameters:
            assert found.loss(other) >= found.loss(plan) - 1e-12
        added = set(other.cutoffs) - set(plan.cutoffs)
        if len(added) == 1 and len(other.ranks) == len(plan.ranks) + 1:  # nor a block be cut in two
            j = other.cutoffs.index(added.pop())
            kept = other.ranks[:j] + other.ranks[j + 2 :] == plan.ranks[:j] + plan.ranks[j + 1 :]
            if kept and other.n_parameters <= parameters:
                assert found.loss(other) >= found.loss(plan) - 0.01
    assert plan.ranks.count(5) <= 1  # blocks that lose nothing are one


def search_for(original, base, sharing=None):
    counts = original.counts()
    histories = drawn_histories(counts, 9, 8, torch.Generator())
    return OptionSearch(original, counts, histories, base, sharing)


@given(
    ratio=st.floats(2, 50),
    host=st.sampled_from(HOSTS),
    sharing=st.sampled_from([None, *SCHEMES]),
    softmax=st.sampled_from(["full", "tree"]),
    tied=st.booleans(),
    use_trained=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_every_ratio_is_met_or_refused_with_the_smallest_size(
    world, trained, fresh, ratio, host, sharing, softmax, tied, use_trained
):
    original = Original.of((trained if use_trained else fresh)[host])
    counts = original.counts()
    whole = sum(p.numel() for p in original.model.parameters())
    limit = int(whole / ratio)
    base = CompressionConfig(softmax=softmax, tied=tied)
    search = search_for(original, base, sharing)
    search._hidden_error = lambda options: 0.1  # which takes time
    try:
        choice = search.best(limit)
    except CompressionError as error:
        smallest = int(re.search(r"of ([\d,]+) parameters", str(error))[1].replace(",", ""))
        assert smallest > limit
        choice = search.best(smallest)
        assert choice.parameters == smallest
        limit = smallest
    small = original.compressed(choice.compression, counts)
    assert part_sizes(small).total == choice.parameters <= limit
    assert choice.compression.softmax == softmax
    assert choice.compression.tied == tied


@pytest.fixture(scope="module")
def fresh(world):
    return {name: world.model(name) for name in HOSTS}


@pytest.fixture(scope="module")
def valid(world):
    options = {"metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10"}
    return world.loaders(world.config("SASRec", **options))[1]


def test_a_ratio_is_met_and_the_choice_is_printed_with_reasons(trained, capsys):
    model = trained["SASRec"]
    small = compress(model, ratio=1.3)
    assert part_sizes(small).total <= part_sizes(model).total / 1.3
    printed = capsys.readouterr().out
    assert f"{part_sizes(small).total:,} parameters" in printed
    assert "by the spectra of the trained table" in printed
    assert "sharing" in printed


def test_a_size_is_met_in_bytes_of_the_weights(trained, capsys):
    model = trained["GRU4Rec"]
    n_bytes = int(4 * part_sizes(model).total * 0.8)
    assert 4 * part_sizes(compress(model, size=n_bytes, verbose=False)).total <= n_bytes
    assert capsys.readouterr().out == ""


def test_a_fresh_model_is_compressed_by_counts(fresh, capsys):
    compress(fresh["SASRec"], ratio=1.3)
    assert "untrained: by the fourth root of the counts" in capsys.readouterr().out


def test_more_popular_blocks_get_more_of_the_budget():
    counts = np.array([0] + [1000] * 10 + [1] * 89, dtype=float)
    found = Spectra.of_counts(counts, 16, block_ends(100))
    plan = found.best_plan(400, TableCost(16))
    assert plan.ranks[0] > plan.ranks[-1]
    assert plan.cutoffs[0] <= 16


def test_max_loss_is_measured_on_the_validation_data(trained, valid, capsys):
    model = trained["GRU4Rec"]
    small = compress(model, max_loss=0.3, valid_data=valid)
    assert evaluate(small, valid)["ndcg@10"] >= 0.7 * evaluate(model, valid)["ndcg@10"]
    printed = capsys.readouterr().out
    tried = re.findall(r"ratio (\d+\.\d+): ndcg@10", printed)
    assert 2 <= len(tried) <= 5
    assert part_sizes(small).total < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("score", "match"),
    [
        (0.5, "reachable without training, but got 0.1: ratio .*: ndcg@10 0.5000, 50.0%"),
        (0, "`model` whose ndcg@10 on `valid_data` is above 0, .* but got 0.0000"),
    ],
)
def test_a_loss_that_cannot_be_kept_or_measured_is_refused(fresh, valid, score, match, monkeypatch):
    model = fresh["SASRec"]
    monkeypatch.setattr(
        "cprec_recbole.compression.budget.evaluate",
        lambda each, data: {"ndcg@10": 1.0 if each is model and score else score},
    )
    with pytest.raises(CompressionError, match=match):
        compress(model, max_loss=0.1, valid_data=valid, verbose=False)


def test_max_loss_may_end_at_the_smallest_model(world, valid):
    """Whose size, divided by the ratio that it is, may round to a parameter less."""
    for width in range(8, 60):
        model = world.model("SASRec", inner_size=width, n_layers=1)
        whole = sum(p.numel() for p in model.parameters())
        smallest = search_for(Original.of(model), CompressionConfig()).smallest
        if int(whole / (whole / smallest)) < smallest:
            break
    small = compress(model, max_loss=0.999, valid_data=valid, verbose=False)
    assert part_sizes(small).total == smallest


def test_sizes_are_read():
    for size, n_bytes in ((2e6, 2_000_000), ("2MB", 2_000_000), ("1.5 kb", 1500), ("2KiB", 2048)):
        assert checked_bytes(size) == n_bytes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ratio": 0.5}, "`ratio` to be a number of times, 1 or more, but got 0.5"),
        ({"ratio": float("nan")}, "`ratio`"),
        ({"ratio": float("inf")}, "`ratio`"),
        ({"ratio": 10**400}, "`ratio`"),
        ({"ratio": "8"}, "`ratio` .* but got '8'"),
        ({"ratio": True}, "`ratio`"),
        ({"size": "2 apples"}, "`size` to be a number of bytes"),
        ({"size": "0MB"}, "`size`"),
        ({"ratio": 2, "size": "1MB"}, "one budget, but got `ratio` and `size`"),
        ({"ratio": 2, "ranks": [16, 4]}, "either a budget or `ranks`"),
        ({"ratio": 2, "cutoffs": [9]}, "either a budget or `cutoffs`"),
        ({"max_loss": 1.5}, "`max_loss` to be a share from 0 to below 1"),
        ({"max_loss": 0.01}, "`valid_data` to be RecBole's evaluation data"),
        ({"valid_data": 1}, "`valid_data` only with `max_loss`"),
        ({"ratio": 1000}, r"budget of [\d,]+ parameters or more \(ratio [\d.]+ at most, size "),
        ({"size": 9}, r"smallest possible model, but got room for 2: [\d,]+ are in the layers"),
    ],
)
def test_bad_budgets_are_refused(trained, options, match):
    with pytest.raises(CompressionError, match=match):
        compress(trained["SASRec"], **options)
