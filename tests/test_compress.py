import copy
import re

import numpy as np
import pytest
import torch
from recbole.data import create_dataset

from cprec_recbole import CompressionConfig, CompressionError, compress
from cprec_recbole.costs import part_sizes
from cprec_recbole.data.sequences import item_counts
from tests.builders import SCHEMES, train_a_step


@pytest.fixture(scope="module")
def fresh(world):
    """A SASRec that is not to be changed."""
    return world.model("SASRec").eval()


@pytest.mark.parametrize(
    "options",
    [
        {"sharing": "none", "softmax": "full", "ranks": [16, 16, 16], "cutoffs": [6, 20]},
        {"config": CompressionConfig.uncompressed()},
    ],
)
def test_with_nothing_to_lose_the_scores_are_the_originals(world, trained, host_name, options):
    model, batch = trained[host_name], world.evaluation_batch(host_name)
    small = compress(model, **options)
    torch.testing.assert_close(small.full_sort_predict(batch), model.full_sort_predict(batch))
    torch.testing.assert_close(small.predict(batch), model.predict(batch))
    padding = small.table(torch.tensor(0))
    torch.testing.assert_close(padding, model.item_embedding.weight[0])


def test_the_original_is_left_bit_for_bit(world, fresh):
    model = fresh
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    small = compress(model, ranks=[16, 4, 1], sharing="cross_block")
    train_a_step(small, world.batch("SASRec"), lr=1.0)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [name for name, _ in model.named_modules()] == names
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in small.parameters()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("softmax", "tied"), [("full", True), ("tree", False)])
def test_every_choice_compresses_trains_and_recommends(world, fresh, softmax, tied, scheme):
    small = compress(fresh, ranks=[16, 4, 1], sharing=scheme, softmax=softmax, tied=tied)
    for training in ("all_positions", "last_position"):
        assert np.isfinite(train_a_step(small, world.batch("CpSASRec", training=training)))
    assert small.recommend([1, 2, 3], 5).items.shape == (1, 5)
    if scheme != "none":
        assert part_sizes(small).layers < part_sizes(fresh).layers
    assert part_sizes(small).table < part_sizes(fresh).table


def test_mode_and_dtype_are_kept(fresh):
    model = copy.deepcopy(fresh).double()
    small = compress(model.train(), ranks=[16, 4])
    assert small.training
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert not compress(model.eval(), ranks=[16, 4]).training


def test_counts_come_from_a_dataset_an_array_or_memory(world, fresh):
    train = world.loaders(world.config("SASRec"))[0]._dataset
    counts = item_counts(train)
    for given in (None, train, counts, torch.tensor(counts), counts.tolist()):
        small = compress(fresh, ranks=[16, 4], item_counts=given)
        order = small.table.partition.item_at.tolist()[1:]
        assert order == sorted(order, key=lambda i: (-counts[i], i))


def refused(model, match, **options):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressionError, match=match):
        compress(model, **options)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ranks": [4, 16]}, "`ranks` not to rise"),
        ({"ranks": [32]}, "at most the embedding size 16"),
        ({"ranks": [16, 0]}, "`ranks` to be positive"),
        ({"ranks": [16, 4], "cutoffs": [500]}, "`cutoffs` to end at most at the"),
        ({"cutoffs": [20, 10]}, "`cutoffs` to rise"),
        ({"sharing": "cross"}, "`sharing` to be one of"),
        ({"softmax": "sampled"}, "`softmax` to be one of"),
        ({"rankz": [16]}, "got `rankz`; did you mean `ranks`"),
        ({"config": {"ranks": [16]}}, "`config` to be a CompressionConfig, but got dict"),
        ({"config": CompressionConfig(), "tied": False}, "but got both: config and tied"),
        ({"training": "all_positions"}, "got `training`"),
        ({"item_counts": [1, 2, 3]}, r"`item_counts` to have one entry .*\[3\]"),
        ({"item_counts": "many"}, "`item_counts` to be a RecBole dataset or numbers"),
        ({"item_counts": np.ones(41) / 40}, "how often each item occurs, but got shares such as 0"),
    ],
)
def test_bad_options_are_named_before_anything_changes(fresh, options, match):
    refused(fresh, match, **options)


def test_counts_must_be_counts(fresh):
    for wrong in (-1.0, float("nan"), float("inf"), 1e308, 1e16):
        counts = np.ones(fresh.n_items)
        counts[3] = wrong
        got = re.escape(f"got {wrong:g} for item 3")
        refused(fresh, f"`item_counts` to be zero or above .* {got}", item_counts=counts)


def test_a_frozen_model_is_compressed_and_what_is_made_can_be_trained(trained):
    model = copy.deepcopy(trained["GRU4Rec"]).requires_grad_(False)
    small = compress(model, ranks=[16, 4], cutoffs=[9])
    assert all(p.requires_grad for p in small.parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_it_can_be_trained_also_if_it_was_made_where_nothing_is(trained, world):
    with torch.inference_mode():
        small = compress(trained["SASRec"], ranks=[16, 4], cutoffs=[9])
        other = compress(world.model("SASRec"), ratio=1.5, verbose=False)
        assert len(other.recommend([1, 2, 3], 5).items) == 1  # its original was made there too
    hidden = small.hidden_states(torch.tensor([[1, 2, 3]]))
    small.softmax.loss(hidden.flatten(0, 1), torch.tensor([2, 3, 4])).backward()
    assert small.table.blocks[1].weight.grad.abs().sum() > 0


def test_one_history_is_enough(trained):
    small = compress(trained["SASRec"], ranks=[16, 4], data=[[1, 2]])
    assert all(torch.isfinite(p).all() for p in small.parameters())


def test_what_is_counted_for_padding_does_not_matter(trained):
    counts = trained["SASRec"].train_item_counts.astype(float)
    found = []
    for padding in (0, 1e6):
        counts[0] = padding
        small = compress(trained["SASRec"], ratio=2, item_counts=counts, verbose=False)
        found.append(small.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_missing_counts_are_named(world):
    model = world.model("SASRec")
    del model.train_item_counts  # as if built before the plugin
    refused(
        model, "Expected `item_counts` for a model that was loaded from a folder, or built before"
    )


def test_compressing_twice_is_refused(fresh):
    small = compress(fresh, ranks=[16, 4])
    refused(small, "`model` to be uncompressed, but got CpSASRec", ranks=[16])
    refused(small.inner, "part of a compressed model", ranks=[16], item_counts=[1])


def test_clusters_of_a_half_precision_model_are_finite(fresh):
    model = copy.deepcopy(fresh).half()
    small = compress(model, ranks=[16, 4], softmax="tree", item_counts=[10**6] * model.n_items)
    assert torch.isfinite(small.softmax.clusters).all()
    assert small.softmax.clusters.abs().sum() > 0


@pytest.mark.parametrize("budget", [{"ratio": 1.7}, {"size": 11_000}])
def test_a_model_in_half_precision_is_compressed_as_one_in_float(trained, budget):
    half = copy.deepcopy(trained["SASRec"]).bfloat16()
    found = compress(half, verbose=False, **budget)
    if "size" in budget:  # a number is half as long
        budget = {"size": 2 * budget["size"]}
    wanted = compress(copy.deepcopy(half).float(), verbose=False, **budget)
    assert found.choice == wanted.choice
    assert found.warm_start == wanted.warm_start
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    state = wanted.bfloat16().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_where_there_is_nothing_to_share_a_scheme_compresses_nothing(world):
    same = compress(world.model("GRU4Rec", num_layers=1), ranks=[16], sharing="cross_layer")
    assert compress(same, ranks=[16, 4]).table.ranks == (16, 4)


def test_a_data_set_that_was_not_split_is_named_as_it_was_given(world, fresh):
    dataset, words = create_dataset(world.config("SASRec")), "`item_counts` to be training .* split"
    refused(fresh, words, item_counts=dataset)


def test_other_models_and_subclasses_are_refused(fresh):
    with pytest.raises(CompressionError, match=r"NextItNet, .*SINE, but got Linear"):
        compress(torch.nn.Linear(2, 2))
    model = copy.deepcopy(fresh)
    model.__class__ = type("Changed", (type(model),), {})
    refused(model, "but got Changed")


def test_a_model_that_diverged_is_refused(fresh):
    model = copy.deepcopy(fresh)
    with torch.no_grad():
        model.item_embedding.weight[3, 1] = float("nan")
    with pytest.raises(CompressionError, match="finite weights"):
        compress(model, ranks=[16, 4])
