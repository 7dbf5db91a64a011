"""What three of the models do, on heavier grids than the contract of all ten."""

import copy
import io

import numpy as np
import pytest
import torch

from cprec_recbole import CompressionError, CpNextItNet, compress
from cprec_recbole.costs import part_sizes
from cprec_recbole.models import MODELS
from tests.builders import SCHEMES, train_a_step

BLOCKS = {"ranks": [16, 4, 1]}


@pytest.fixture(scope="module")
def model(world):
    return world.model("CpSASRec", **BLOCKS).eval()


def layer_parameters(model):
    return [
        [getattr(module, name) for module, name in layer]
        for layer in model.spec.layers(model.inner)
    ]


@pytest.mark.parametrize("indexed", [False, True])
def test_recommendations_leave_out_and_keep_to_given_items(world, host_name, indexed):
    model = world.model(f"Cp{host_name}", **BLOCKS)
    if indexed:
        model.build_index()
    histories = [[1, 2, 3], [5]]
    every = model.recommend(histories, k=model.n_items - 1).items.tolist()
    for exclude, seen, gone in (
        ([7, 8], False, [{7, 8}, {7, 8}]),
        ([[7], [9, 4]], False, [{7}, {9, 4}]),
        (torch.tensor([[7, 0], [9, 4]]), True, [{7, 1, 2, 3}, {9, 4, 5}]),
        ([[], []], True, [{1, 2, 3}, {5}]),
        (None, True, [{1, 2, 3}, {5}]),
        (np.array([6]), False, [{6}, {6}]),
    ):
        best = model.recommend(histories, k=10, exclude_seen=seen, exclude=exclude)
        expected = [[i for i in row if i not in out][:10] for row, out in zip(every, gone)]
        assert best.items.tolist() == expected
    allowed = [9, 3, 20, 7, 3]
    best = model.recommend(histories, k=3, exclude=[20], allowed=allowed)
    assert best.items.tolist() == [[i for i in row if i in (9, 3, 7)] for row in every]


def test_what_was_seen_is_left_out_also_beyond_the_limit_of_the_model(model):
    assert model.max_seq_length == 8
    best = model.recommend(range(1, 13), k=28, exclude_seen=True)
    assert sorted(best.items[0].tolist()) == list(range(13, 41))
    with pytest.raises(CompressionError, match="`k` to be from 1 to the 28 items"):
        model.recommend(range(1, 13), k=29, exclude_seen=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"item_seq": [1, 999]}, "`item_seq` to hold item ids from 1 to 40 .*999"),
        ({"item_seq": [-1]}, "`item_seq` .*-1"),
        ({"item_seq": []}, "every history of `item_seq` to hold an item, but history 0 has none"),
        ({"item_seq": [[1], []]}, "but history 1 has none"),
        ({"item_seq": torch.zeros(0, 3).long()}, "`item_seq` to hold at least one history"),
        ({"item_seq": torch.zeros(2, 3).long()}, "but history 0 has none"),
        ({"item_seq": [1.5]}, "`item_seq` to hold item ids, which are whole numbers.*1.5"),
        ({"item_seq": torch.ones(1, 2, 3).long()}, "`item_seq` to be item ids or lists of them"),
        ({"item_seq": "50,181"}, "`item_seq` to hold item ids.*'50,181'"),
        ({"item_seq": ["50"]}, "`item_seq` to hold item ids"),
        ({"k": 0}, "`k` to be from 1 to"),
        ({"k": 10_000}, "`k` to be from 1 to.*10000"),
        ({"k": 2.0}, "`k`.*2.0"),
        ({"exclude": [[1], [2], [3]]}, "`exclude` to be one list of item ids or 2.*got 3"),
        ({"exclude": [[1], [2.7]]}, "`exclude` to hold item ids"),
        ({"exclude": [[1, 2], 3]}, "`exclude` to be item ids or lists of them"),
        ({"exclude": [9999]}, "`exclude` to hold item ids .*9999"),
        ({"exclude": 5}, "`exclude` to be item ids or lists of them, but got 5"),
        ({"allowed": []}, "`allowed` to hold at least one item"),
        ({"allowed": [9999]}, "`allowed` to hold item ids .*9999"),
        ({"allowed": [[1], [2]]}, r"`allowed` to be item ids of shape \[m\]"),
        ({"allowed": [1, 2]}, "`k` to be from 1 to the 2 items"),
    ],
)
def test_what_cannot_be_recommended_is_named(model, options, words):
    with pytest.raises(CompressionError, match=words):
        model.recommend(**{"item_seq": [[1, 2], [3]], "k": 5, **options})


def test_histories_may_be_any_whole_numbers(model):
    expected = model.recommend([3, 2, 1], 5).items
    backwards = np.array([1, 2, 3])[::-1]
    given = [backwards, backwards.astype(">i8"), backwards.astype(object), (3, 2, 1)]
    for item_seq in (*given, torch.tensor([0, 3, 2, 1]), torch.tensor([[3, 2, 1, 0]])):
        assert torch.equal(model.recommend(item_seq, 5).items, expected)


def test_recommend_leaves_the_mode_as_it_was(world):
    model = world.model("CpSASRec", **BLOCKS).train()
    assert torch.equal(model.recommend([1, 2], 5).scores, model.recommend([1, 2], 5).scores)
    assert model.training


def test_hidden_states_see_no_later_item(world, host_name):
    model = world.model(f"Cp{host_name}", **BLOCKS).eval()
    history = torch.randint(1, model.n_items, (1, 8))
    before = model.hidden_states(history)
    for t in range(7):
        changed = history.clone()
        changed[:, t + 1 :] = torch.randint(1, model.n_items, (1, 7 - t))
        shortened = history.clone()
        shortened[:, t + 1 :] = 0
        for other in (changed, shortened):
            after = model.hidden_states(other)
            torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1])


@pytest.mark.parametrize("lengths", [[8] * 40, [1] * 50 + [7], [*range(9)] * 9, [0, 0, 5]])
def test_states_at_targets_are_those_of_every_position(world, host_name, lengths):
    model = world.model(f"Cp{host_name}", **BLOCKS).eval()
    items = torch.randint(1, model.n_items, (len(lengths), 8))
    items[torch.arange(8) >= torch.tensor(lengths).unsqueeze(1)] = 0
    targets = torch.arange(1, items.numel() + 1).view(items.shape) * (items != 0)
    states, found = model.encoder.at_targets(items, targets)
    found, order = found[found != 0].sort(), found.nonzero().squeeze(1)
    assert torch.equal(found.values, targets[targets != 0])  # each once
    every = model.hidden_states(items)
    torch.testing.assert_close(states[order][found.indices], every[targets != 0])
    items[:, 0] = 1  # a history has an item
    ends = torch.tensor(lengths).clamp(min=1)
    every = model.hidden_states(items)
    torch.testing.assert_close(model(items, ends), every[torch.arange(len(ends)), ends - 1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_moves_every_layer_that_shares_and_norms_stay_apart(world, host_name, scheme):
    name = f"Cp{host_name}"
    model = world.model(name, sharing=scheme, **BLOCKS)
    norms = [m for m in model.inner.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len({id(p) for norm in norms for p in norm.parameters()}) == 2 * len(norms)
    before = copy.deepcopy(layer_parameters(model))
    for batch in world.loaders(world.config(name, **BLOCKS))[0]:
        train_a_step(model, batch)
    after = layer_parameters(model)
    for old, new in zip(before, after):
        assert all(not torch.equal(a, b) for a, b in zip(old, new))
    shared = {tuple(id(p) for p in layer) for layer in after}
    equal = {tuple(p.detach().flatten().tolist()[0] for p in layer) for layer in after}
    assert len(shared) == len(equal)  # what is not shared differs


@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [
        ("none", 8),
        ("cross_layer", 1),
        ("cross_block", 2),
        ("adjacent_layer", 4),
        ("adjacent_block", 4),
    ],
)
def test_kernels_left_of_four_nextitnet_blocks(world, scheme, kernels):
    model = world.model("CpNextItNet", sharing=scheme, block_num=2, dilations=[1, 2], **BLOCKS)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len({id(c.weight) for c in convolutions}) == kernels
    assert len({id(c.bias) for c in convolutions}) == kernels
    assert [c.dilation[1] for c in convolutions] == [1, 2, 2, 4, 1, 2, 2, 4]


@pytest.mark.parametrize(
    ("scheme", "kept"), [("cross_layer", 2), ("adjacent_layer", 3), ("none", 4)]
)
def test_a_first_gru_layer_of_another_shape_keeps_its_own(world, scheme, kept):
    gru = world.model("CpGRU4Rec", sharing=scheme, **BLOCKS).inner.gru_layers
    inputs = [getattr(gru, f"weight_ih_l{i}") for i in range(4)]
    assert inputs[0].shape != inputs[1].shape
    assert len({id(p) for p in inputs}) == kept


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("scheme", "softmax"), zip(SCHEMES, ["full", "tree"] * 3))
def test_a_state_that_is_loaded_still_shares_and_scores_the_same(
    world, host_name, scheme, softmax, tied
):
    name, options = f"Cp{host_name}", {"sharing": scheme, "softmax": softmax, "tied": tied}
    model = world.model(name, **options, **BLOCKS)
    train_a_step(model, world.batch(name, **BLOCKS))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = world.model(name, **options, **BLOCKS, seed=1)
    again.load_state_dict(torch.load(file, weights_only=True))
    before = again.recommend([1, 2, 3], 7).scores
    assert torch.equal(before, model.recommend([1, 2, 3], 7).scores)
    train_a_step(again, world.batch(name, **BLOCKS))
    assert not torch.equal(again.recommend([1, 2, 3], 7).scores, before)
    assert part_sizes(again) == part_sizes(model)


def test_tied_shares_the_factors_and_untied_has_its_own(world, model):
    untied = world.model("CpSASRec", tied=False, **BLOCKS)
    assert model.softmax.table is model.table
    assert part_sizes(model).softmax == 0
    assert untied.softmax.table is not untied.table
    assert part_sizes(untied).softmax == part_sizes(untied).table
    assert untied.softmax.table.partition is untied.table.partition


def test_every_compressed_model_starts_from_its_parents_defaults(world):
    for model_class in MODELS:
        parent = world.config(model_class.__name__.removeprefix("Cp"))
        ours = world.config(model_class.__name__)
        for key, value in parent.internal_config_dict.items():
            assert ours[key] == parent[key], (model_class, key, value)


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
@pytest.mark.parametrize("training", ["all_positions", "last_position"])
def test_the_loss_falls_on_every_position_and_on_the_last(world, host_name, training, loss_type):
    options = {"loss_type": loss_type, "training": training, **BLOCKS}
    model, batch = (make(f"Cp{host_name}", **options) for make in (world.model, world.batch))
    losses = [train_a_step(model, batch, lr=0.5 if loss_type == "BPR" else 0.1) for _ in range(15)]
    assert losses[-1] < losses[0]


def test_negatives_are_items_other_than_the_target(model):
    targets = torch.arange(1, model.n_items)
    drawn = torch.stack([model._negatives(targets) for _ in range(200)])
    assert (drawn != targets).all()
    assert drawn.unique().tolist() == targets.tolist()


@pytest.mark.parametrize(
    "wanted", [{"distribution": "popularity"}, {"sample_num": 3}, {"dynamic": True}]
)
def test_negatives_that_are_not_drawn_at_every_position_are_refused(world, wanted):
    options = {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", **wanted}}
    with pytest.raises(CompressionError, match="`train_neg_sample_args` to be one uniform"):
        world.model("CpSASRec", **options)
    assert world.model("CpSASRec", training="last_position", **options).loss_type == "BPR"


def test_a_state_that_shares_less_is_refused(world):
    shared = world.model("CpSASRec", sharing="cross_layer", **BLOCKS)
    for options in ({"sharing": "none"}, {"sharing": "cross_layer", "tied": False}):
        other = world.model("CpSASRec", **options, **BLOCKS)
        with pytest.raises(CompressionError, match="same `sharing` and `tied`"):
            shared.load_state_dict(other.state_dict())
    with pytest.raises(CompressionError, match="`assign`"):
        shared.load_state_dict(shared.state_dict(), assign=True)


def test_a_state_with_a_damaged_order_changes_nothing(world):
    model, other = (world.model("CpSASRec", ranks=[8, 4], cutoffs=[9], seed=s) for s in (1, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    damaged = other.state_dict()
    for name in damaged:
        if name.endswith("item_at"):
            damaged[name] = damaged[name].clone()
            damaged[name][3] = damaged[name][4]
    with pytest.raises(CompressionError, match="damaged"):
        model.load_state_dict(damaged)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_ids_outside_the_catalogue_are_an_index_error(model):
    for outside in (-1, model.n_items):
        with pytest.raises(IndexError):
            model.table(torch.tensor([[1, outside]]))


def test_bpr_with_the_tree_is_refused(world):
    with pytest.raises(CompressionError, match=r"`loss_type` to be CE with `softmax: tree`.*BPR"):
        world.config("CpSASRec", loss_type="BPR", softmax="tree")
    with pytest.raises(CompressionError, match="softmax: tree"):
        compress(world.model("SASRec", loss_type="BPR"), softmax="tree")


def test_the_penalty_of_nextitnet_is_its_parents(world):
    parent = world.model("NextItNet")
    same = compress(parent, ranks=[16], sharing="none")
    assert isinstance(same, CpNextItNet)
    expected = parent.reg_weight * parent.reg_loss(
        [parent.item_embedding.weight, parent.final_layer.weight]
    )
    torch.testing.assert_close(same.spec.penalty(same.inner), expected + parent.reg_loss_rb())
