"""The average of weights along a training, against its definition."""

import pytest
import torch

from cprec_recbole.compression.recover import WeightAverage


@pytest.mark.parametrize("n_steps", [1, 2, 7, 100])
def test_a_step_counts_by_the_share_that_later_ones_left_of_it(n_steps):
    parameter = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    average = WeightAverage([parameter])
    visited = torch.randn(n_steps, 3, 2, dtype=torch.float64)
    for value in visited:
        with torch.no_grad():
            parameter.copy_(value)
        average.update()
    rates = 9 / (8 + torch.arange(1, n_steps + 1, dtype=torch.float64))
    later = torch.cat([(1 - rates).flip(0).cumprod(0).flip(0)[1:], torch.ones(1)])
    assert float((rates * later).sum()) == pytest.approx(1)
    expected = (rates * later).view(-1, 1, 1) * visited
    torch.testing.assert_close(average.averages[0], expected.sum(0))


def test_it_is_in_place_within_and_the_training_goes_on_afterwards():
    layer = torch.nn.Linear(2, 2)
    average = WeightAverage(layer.parameters())
    for value in (1.0, 3.0):
        with torch.no_grad():
            layer.weight.fill_(value)
        average.update()
    now, parameter = layer.weight.detach().clone(), layer.weight

    def look():
        with average.in_place():
            torch.testing.assert_close(layer.weight, torch.full((2, 2), 1 + 2 * 9 / 10))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look()
    assert layer.weight is parameter
    assert torch.equal(layer.weight, now)


def test_half_precision_does_not_stop_it():
    """A share of 9/508 of a step of 1% is less than bfloat16 can add to 1."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = WeightAverage([parameter])
    for _ in range(500):
        average.update()
    with torch.no_grad():
        parameter.fill_(1.0078125)
    for _ in range(500):
        average.update()
    with average.in_place():
        assert parameter.dtype == torch.bfloat16
        assert float(parameter) == 1.0078125
    assert average.averages[0].dtype == torch.float32
