"""The last hidden state against the last of all hidden states, which RecBole's layers compute."""

import pytest
import torch

from cprec_recbole.models.spec import pick
from tests.builders import HOSTS

BLOCKS = {"ranks": [8, 4], "cutoffs": [6]}
LENGTHS = [3, 8, 1, 5, 8, 2]


def histories(width, lengths):
    torch.manual_seed(0)
    items = torch.randint(1, 40, (len(lengths), width))
    return items * (torch.arange(width) < torch.tensor(lengths).unsqueeze(1))


def last_of_all(model, item_seq, lengths):
    if model.spec.name == "BERT4Rec":
        masked = model.inner.reconstruct_test_data(item_seq, lengths)
        state = model.inner.gather_indexes(model.inner.forward(masked), lengths - 1)
        return torch.cat([state, torch.ones(len(state), 1)], 1)
    if model.reads_last_column:
        return model.hidden_states(item_seq)[:, -1]
    return pick(model.hidden_states(item_seq), lengths)


CASES = [(n, t) for n in HOSTS for t in ("all_positions", "last_position")]


@pytest.mark.parametrize(("name", "training"), [*CASES, ("BERT4Rec", "last_position")])
def test_it_is_the_last_of_all_states_with_their_gradients(world, name, training):
    model = world.model(f"Cp{name}", training=training, **BLOCKS).eval().double()
    model.inner.mask_token = model.n_items
    width = model.max_seq_length
    for lengths in (LENGTHS, [width] * 2, [1], [4]):
        item_seq, ends = histories(width, lengths), torch.tensor(lengths)
        gradients = []
        for state in (model(item_seq, ends), last_of_all(model, item_seq, ends)):
            model.zero_grad()
            state.square().sum().backward()
            parameters = [p for p in model.parameters() if p.grad is not None]
            gradients.append([state.detach(), *(p.grad.clone() for p in parameters)])
        torch.testing.assert_close(*gradients)
        with torch.no_grad():
            torch.testing.assert_close(model(item_seq, ends), gradients[0][0])
            # what a batch is padded with, and to which width, means nothing
            if name != "BERT4Rec" and not model.reads_last_column:
                narrow = item_seq[:, : max(lengths)]
                torch.testing.assert_close(model(narrow, ends), gradients[0][0])


@pytest.mark.parametrize("n_layers", [1, 3])
def test_a_transformer_of_one_layer_or_several(world, n_layers):
    model = world.model("CpSASRec", n_layers=n_layers, hidden_act="swish", **BLOCKS).eval()
    item_seq, lengths = histories(8, LENGTHS), torch.tensor(LENGTHS)
    wanted = last_of_all(model, item_seq, lengths)
    torch.testing.assert_close(model(item_seq, lengths), wanted, rtol=1e-4, atol=1e-6)


def test_look_ups_without_a_gradient_follow_the_weights(world):
    table = world.model("CpSASRec", **BLOCKS).table
    items = torch.arange(table.partition.n_items)[1:].view(2, -1)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(table(items), table.dense()[items])
        torch.testing.assert_close(table(items), table.dense()[items])

    check()
    with torch.no_grad():
        table.blocks[1].projection.mul_(2)
    check()
    torch.optim.SGD(table.parameters(), lr=0.1).step()
    table.double()
    check()
    with torch.no_grad(), pytest.raises(IndexError):
        table(torch.tensor([table.partition.n_items]))
