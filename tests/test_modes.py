"""Train and eval mode, also where several threads ask for it at a time."""

from contextlib import ExitStack

import torch
from torch import nn

from cprec_recbole import compress, quantize
from cprec_recbole.models.eval_mode import in_eval_mode


def model_in_parts() -> nn.Module:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_each_part_is_put_back_into_its_mode():
    model = model_in_parts()
    before = modes(model)
    with in_eval_mode(model, None):
        assert not any(modes(model))
    assert modes(model) == before == [True, True, False, False, False]


def test_the_last_to_leave_puts_the_modes_back():
    model = model_in_parts()
    before = modes(model)
    first, second = ExitStack(), ExitStack()  # as of two threads
    first.enter_context(in_eval_mode(model))
    second.enter_context(in_eval_mode(model))
    first.close()
    assert not any(modes(model))
    second.close()
    assert modes(model) == before
    with in_eval_mode(model):
        model.train()  # by somebody else meanwhile: what was before counts
    assert modes(model) == before


def test_a_model_in_eval_mode_is_left_alone():
    model = model_in_parts().eval()
    with in_eval_mode(model):
        model[0].train()
    assert modes(model) == [False, True, False, False, False]


def test_what_is_made_in_inference_mode_can_be_trained(trained):
    small = compress(trained["SASRec"], ranks=[16, 4])
    with torch.inference_mode():
        rounded = quantize(small=small)
        small.add_items(["new"])
    assert not any(p.is_inference() for each in (rounded, small) for p in each.parameters())
