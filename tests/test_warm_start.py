"""The start of a compressed model against its original."""

import copy

import pytest
import torch
from recbole.trainer import Trainer
from recbole.utils import get_model
from torch import nn

from cprec_recbole import CompressionConfig, CompressionError, compress, evaluate
from cprec_recbole.compression.histories import drawn_histories, sample
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.spectra import looks_trained
from cprec_recbole.compression.warm_start import (
    _solve,
    block_probabilities,
    fit_clusters,
    warm_start,
)
from cprec_recbole.softmax import TreeSoftmax
from tests.builders import HOSTS, block_embedding, train


def made(trained, host_name, **options):
    """An original, a compressed model as it is before any fitting, and histories."""
    original = Original.of(trained[host_name])
    counts = original.counts()
    histories = drawn_histories(counts, 200, 8, torch.Generator().manual_seed(3))
    return original, original.compressed(CompressionConfig(**options), counts), histories


def test_fitting_brings_shared_layers_near_to_the_original(trained, host_name):
    original, small, histories = made(trained, host_name, ranks=[16], sharing="cross_layer")
    found = warm_start(small, original, histories)
    assert found.fitted < 0.5 * max(found.copied, 1e-9)
    assert torch.isfinite(small.hidden_states(histories)).all()


def test_a_set_takes_the_member_that_serves_it_best(trained):
    original, small, histories = made(trained, "SASRec", ranks=[16], sharing="cross_layer")
    found = warm_start(small, original, histories, quickly=True)
    errors = []
    for donor in [None, 0, 1, 2, 3]:
        _, other, _ = made(trained, "SASRec", ranks=[16], sharing="cross_layer")
        layers, originals = (
            m.spec.layers(host) for m, host in ((other, other.inner), (other, original.inner))
        )
        with torch.no_grad():
            for slot, (module, name) in enumerate(layers[0]):
                values = [getattr(*layer[slot]) for layer in originals]
                value = torch.stack(values).mean(0) if donor is None else values[donor]
                getattr(module, name).copy_(value)
        items = sample(histories, 64, torch.Generator().manual_seed(0))
        real = items != 0
        want = original.encoder.every_position(items)[real]
        got = other.eval().hidden_states(items)[real]
        spread = (want - want.mean(0)).square().sum()
        errors.append(float((got - want).square().sum() / spread))
    assert found.copied == pytest.approx(errors[0 if found.kept is None else found.kept + 1], 1e-3)


def test_nothing_is_fitted_where_nothing_is_lost(trained):
    original, small, histories = made(trained, "GRU4Rec", ranks=[16], sharing="none")
    before = copy.deepcopy(small.state_dict())
    found = warm_start(small, original, histories)
    assert found.fitted < 1e-9
    after = small.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=1e-4)


def test_the_modes_and_the_random_state_are_left_alone(trained):
    model = copy.deepcopy(trained["SASRec"]).train()
    state = torch.random.get_rng_state()
    small = compress(model, ranks=[16, 4], sharing="cross_layer")
    assert model.training
    assert small.training
    assert torch.equal(torch.random.get_rng_state(), state)
    again = compress(model.eval(), ranks=[16, 4], sharing="cross_layer")
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters()))


def test_recurrent_layers_have_gradients_in_train_mode_without_dropout(world, monkeypatch):
    """cuDNN refuses them in eval mode."""
    original = train(world.model("NARM"), world, "NARM", epochs=2)
    seen = []
    forward = nn.GRU.forward

    def watched(self, *arguments):
        seen.append((torch.is_grad_enabled(), self.training, self.dropout))
        return forward(self, *arguments)

    monkeypatch.setattr(nn.GRU, "forward", watched)
    data = torch.randint(1, 40, (50, 6)).tolist()
    small = compress(original, sharing="cross_layer", ranks=[16, 4, 1], data=data)
    with_gradients = [state[1:] for state in seen if state[0]]
    assert with_gradients
    assert set(with_gradients) == {(True, 0.0)}
    assert {state[1] for state in seen if not state[0]} == {False}
    assert not any(module.training for module in small.modules())


def test_a_linear_map_and_a_norm_are_solved_for():
    inputs = torch.randn(500, 6) * 3 + 1
    for module, true in (
        (nn.Linear(6, 4), nn.Linear(6, 4)),
        (nn.LayerNorm(6), nn.LayerNorm(6)),
    ):
        with torch.no_grad():
            for p in true.parameters():
                p.normal_()
            _solve(module, inputs, module(inputs), true(inputs))
            torch.testing.assert_close(module(inputs), true(inputs), atol=0.02, rtol=0.02)
            unchanged = copy.deepcopy(module.state_dict())
            _solve(module, inputs, module(inputs), module(inputs))
            assert all(torch.equal(unchanged[k], v) for k, v in module.state_dict().items())


def test_clusters_give_each_block_what_the_original_gave_it():
    table = block_embedding((6, 10, 20), (8, 8, 8), dim=8)
    head = TreeSoftmax(table)
    clusters = torch.randn(2, 8)
    hidden = torch.randn(400, 8)
    with torch.no_grad():
        head.clusters.copy_(clusters)
        partition = table.partition
        probabilities = head.log_prob(hidden).exp()[:, partition.item_at.long()]
        edges = zip(partition.starts, partition.cutoffs)
        of_blocks = torch.stack([probabilities[:, a:b].sum(1) for a, b in edges], dim=1)
        head.clusters.zero_()
        fit_clusters(head, hidden, of_blocks)
    torch.testing.assert_close(head.clusters, clusters, atol=0.02, rtol=0.02)


def test_a_block_has_the_probability_of_its_items_in_the_originals_softmax(trained):
    original, small, histories = made(trained, "SASRec", ranks=[16, 4], sharing="none")
    hidden = original.encoder.every_position(histories[:9]).reshape(-1, 16)
    dense = hidden @ original.table.T
    dense[:, 0] = -torch.inf
    head_items = small.table.partition.item_at[: small.table.partition.cutoffs[0]].long()
    in_head = dense.softmax(1)[:, head_items].sum(1)
    found = block_probabilities(small.table.partition, original, hidden)
    torch.testing.assert_close(found[:, 0], in_head, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(len(found)))


def test_only_a_trained_table_looks_trained(trained, world):
    for name in HOSTS:
        assert looks_trained(trained[name].item_embedding.weight.detach())
        assert not looks_trained(world.model(name).item_embedding.weight.detach())


@pytest.mark.parametrize("name", ["NextItNet", "CpNextItNet"])
def test_evaluate_gives_what_recboles_trainer_gives(world, name, tmp_path):
    config = world.config(name, metrics=["NDCG", "Hit", "MRR"], topk=[3, 10])
    config["checkpoint_dir"] = str(tmp_path)
    train, valid, test = world.loaders(config)
    model = get_model(name)(config, train._dataset)
    for data in (valid, test):
        expected = Trainer(config, model).evaluate(data, load_best_model=False)
        assert evaluate(model, data) == pytest.approx(dict(expected))


def test_what_is_no_evaluation_data_is_named_as_evaluate_names_it(trained):
    with pytest.raises(CompressionError, match=r"`data` to be .* but got list"):
        evaluate(trained["SASRec"], [[1, 2]])
