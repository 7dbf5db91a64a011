import pytest
import torch
from torch import nn

from cprec_recbole import CompressionError
from cprec_recbole.sharing import share, sharing_plan, sharing_sets
from tests.builders import SCHEMES


@pytest.mark.parametrize(
    ("scheme", "plan", "kept"),
    [
        ("none", (0, 1, 2, 3, 4, 5, 6, 7), 8),
        ("cross_layer", (0, 0, 0, 0, 0, 0, 0, 0), 1),
        ("cross_block", (0, 1, 0, 1, 0, 1, 0, 1), 2),
        ("adjacent_layer", (0, 0, 1, 1, 2, 2, 3, 3), 4),
        ("adjacent_block", (0, 1, 0, 1, 2, 3, 2, 3), 4),
    ],
)
def test_plans_of_four_residual_blocks(scheme, plan, kept):
    assert sharing_plan(scheme, 8, layers_per_block=2) == plan
    assert len(set(plan)) == kept


def test_with_single_layer_blocks_two_pairs_of_schemes_coincide():
    assert sharing_plan("cross_block", 4, 1) == sharing_plan("cross_layer", 4, 1) == (0, 0, 0, 0)
    assert sharing_plan("adjacent_block", 5, 1) == sharing_plan("adjacent_layer", 5, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_single_layer_has_nothing_to_share(scheme):
    layers = [[(nn.Linear(3, 3), "weight")]]
    assert len(sharing_sets(layers, sharing_plan(scheme, 1, 1))) == 1


def test_an_unknown_scheme_is_named():
    with pytest.raises(CompressionError, match=r"`sharing` to be one of .*'ring'"):
        sharing_plan("ring", 4, 1)


def stack(widths):
    modules = [nn.Linear(a, b) for a, b in widths]
    return modules, [[(m, "weight"), (m, "bias")] for m in modules]


def test_layers_share_one_object():
    modules, layers = stack([(3, 3)] * 4)
    assert share(layers, (0, 1, 0, 1)) == 2
    assert modules[0].weight is modules[2].weight
    assert modules[1].bias is modules[3].bias
    assert modules[0].weight is not modules[1].weight


def test_a_set_keeps_the_first_layers_parameters():
    modules, layers = stack([(3, 3)] * 3)
    first = modules[0].weight.detach().clone()
    share(layers, (0, 0, 0))
    assert torch.equal(modules[2].weight, first)


def test_a_layer_of_another_shape_keeps_its_own():
    modules, layers = stack([(2, 3), (3, 3), (3, 3)])
    assert sharing_sets(layers, (0, 0, 0)) == [[0], [1, 2]]
    share(layers, (0, 0, 0))
    assert modules[0].weight.shape == (3, 2)
    assert modules[1].weight is modules[2].weight
