"""What each contender claims of its size, its vectors and its training, on a grid of models."""

import copy
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data import create_dataset

from cprec_recbole import CompressionConfig, CompressionError
from cprec_recbole.compare.contenders import (
    CONTENDERS,
    CONTROLS,
    INT8_BYTES,
    STOCK,
    Setting,
    build,
    derive,
    find_controls,
    finished,
    own_options,
    recipe_of,
    sizes,
)
from cprec_recbole.compare.tables import (
    CENTROIDS,
    HashedTable,
    binned,
    largest_divisor,
    most_codes,
    served_bytes,
    svd_codes,
    user_item_matrix,
)
from cprec_recbole.costs import part_sizes
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.training.evaluation import evaluate
from cprec_recbole.training.trainer import CompressedTrainer
from tests.builders import HOSTS, train, train_a_step
from tests.oracles import best_items

COMPRESSION = CompressionConfig(ranks=(16, 4, 1))
PLAIN = CompressionConfig.uncompressed()
NO_DROPOUT = {"GRU4Rec": {"dropout_prob": 0.0}, "NextItNet": {}}
NO_DROPOUT["SASRec"] = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
TABLES = ("hashing", "recjpq-random", "recjpq-svd")
NAMES = [name for name in CONTENDERS if name not in (STOCK, "full", "tied")]  # what differs


def setting_of(world, host, compression=COMPRESSION, data=None, **options):
    config = world.config(f"Cp{host}", **NO_DROPOUT[host], **options, **compression.as_dict())
    return Setting(config, data or create_dataset(config), compression)


@pytest.fixture(scope="module")
def originals(world):
    """A briefly trained uncompressed model of each host."""
    options = {name: {**NO_DROPOUT[name], **PLAIN.as_dict()} for name in HOSTS}
    return {n: train(world.model(f"Cp{n}", **options[n]), world, f"Cp{n}", 3) for n in HOSTS}


@pytest.fixture(scope="module")
def made(world, originals):
    """What makes a contender's model, with its recipe and its training and test rows."""

    def make(host, name, setting=None):
        recipe = recipe_of(name, setting or setting_of(world, host))
        own = {} if recipe.is_derived else {k: v for k, v in recipe.options.items() if k != "dtype"}
        config = world.config(f"Cp{host}", **NO_DROPOUT[host], **own)
        rows, valid, test = world.loaders(config)
        torch.manual_seed(5)
        if recipe.is_derived:
            model, _ = derive(recipe, originals[host], rows, valid, 4, 0, None, "256MiB")
        else:
            model = finished(recipe, build(recipe, config, rows._dataset))
        return SimpleNamespace(model=model, recipe=recipe, config=config, rows=rows, test=test)

    return make


@pytest.fixture(params=TABLES)
def on_a_table(request, made):
    return made("SASRec", request.param).model


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_a_dense_table_and_lists_their_best(made, host_name, name):
    one = made(host_name, name)
    model, batch = one.model.eval(), next(iter(one.test))[0]
    with torch.no_grad():
        hidden, scores = model.last_hidden(batch), model.full_sort_predict(batch)
        chances = model.softmax.log_prob(hidden).exp()
        if name != "tree":
            torch.testing.assert_close(scores, hidden @ model.tables[-1].dense().T)
        wanted = scores.gather(1, batch["item_id"].unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(model.predict(batch), wanted)
    torch.testing.assert_close(chances.sum(1), torch.ones(len(batch)))
    assert (chances[:, 0] == 0).all()  # padding has no probability
    barred = scores.topk(2, dim=1).indices
    best = model.recommend(batch["item_id_list"], 5, exclude=barred)
    for row, out in zip(range(len(batch)), barred.tolist()):
        assert best.items[row].tolist() == best_items(scores[row].tolist(), 5, set(out))
    torch.testing.assert_close(best.scores, scores.gather(1, best.items))


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_what_was_planned(world, made, host_name, name):
    setting, one = setting_of(world, host_name), made(host_name, name)
    parts, limit = part_sizes(one.model), setting.compressed.total
    larger = {"blocks-only", "sharing-only", "untied", "tree"}
    if name in {"uncompressed", "uncompressed-recovered", "int8"}:
        assert parts == sizes(setting, PLAIN)
    elif name.endswith("int8"):
        assert served_bytes(one.model) <= 4 * limit + 2 * -(-one.model.n_items // 8)  # and blocks
    elif not name.startswith("recjpq"):  # which 256 centroids make larger here
        assert (parts.total > limit) == (name in larger)
    if name in {"one-rank", "uniform-svd"}:
        more = replace(COMPRESSION, cutoffs=(), ranks=(one.recipe.options["ranks"][0] + 1,))
        assert sizes(setting, more).total > limit
    if name in {"compressed", "recovered"}:
        assert parts == setting.compressed
    if name in {*TABLES, "one-rank", "uniform-svd", "tree", "untied"}:
        assert parts.layers == setting.compressed.layers


def test_a_narrower_model_is_as_wide_as_fits(world, host_name):
    setting, step = setting_of(world, host_name), 2 if host_name == "SASRec" else 1
    option, whole = setting.spec.size_option, sizes(setting, PLAIN).total
    for name, unit in (("narrower", None), ("narrower-int8", INT8_BYTES)):
        widths = []
        for ratio in (2, 5, 7):
            small = replace(setting, refused_size=whole // ratio)
            found = dict(recipe_of(name, small).options)
            assert found.pop("dtype", None) == (unit and "int8")
            limit, totals = whole // ratio * (4 if unit else 1), []
            for change in (0, step):
                width = found[option] + change
                scale = {n: round(v / found[option] * width) for n, v in found.items() if "_si" in n}
                wide = setting_of(world, host_name, **{**scale, option: width})
                totals.append(sizes(wide, PLAIN, *([unit] if unit else [])).total)
            assert totals[0] <= limit
            assert totals[1] > limit or found[option] == setting.dim
            widths.append(found[option])
        assert widths[0] > widths[1] >= widths[2]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("int8")])
def test_it_learns_with_all_that_it_has(made, name):
    one = made("GRU4Rec", name)
    batch = next(iter(one.rows))
    losses = [train_a_step(one.model, batch, lr=0.02) for _ in range(15)]
    assert losses[-1] < losses[0]
    one.model.zero_grad()
    for batch in one.rows:
        one.model.calculate_loss(batch).backward()
    named = one.model.named_parameters()
    assert [n for n, p in named if p.grad is None or not p.grad.abs().sum()] == []


def test_recboles_trainer_trains_and_evaluates_it(world, made, host_name, tmp_path):
    one = made(host_name, "recjpq-random")
    one.config["checkpoint_dir"] = str(tmp_path)
    rows, valid, test = world.loaders(one.config)
    trainer = CompressedTrainer(one.config, one.model)
    trainer.fit(rows, valid, verbose=False)
    assert evaluate(one.model, test) == pytest.approx(dict(trainer.evaluate(test)))


def test_a_recovery_takes_a_quarter_of_the_epochs_and_leaves_the_original(world, originals):
    original, setting = originals["SASRec"], setting_of(world, "SASRec")
    before = copy.deepcopy(original.state_dict())
    rows, valid, _ = world.loaders(world.config("CpSASRec"))
    for name in CONTROLS:
        recipe = recipe_of(name, setting)
        if recipe is not None and recipe.is_derived:
            for epochs, budget in ((2, 1), (11, 2)):
                _, recovery = derive(recipe, original, rows, valid, epochs, 0, 1e-3, "1MiB")
                assert recovery is None if not recipe.has_rate else len(recovery.epochs) == budget
    assert all(torch.equal(before[n], t) for n, t in original.state_dict().items())


@pytest.mark.parametrize(("host", "ratio"), [("NextItNet", 8), ("GRU4Rec", 7), ("SASRec", 2)])
def test_one_rank_in_int8_fills_the_bytes_of_the_blocks(world, made, host, ratio):
    setting = replace(setting_of(world, host), ratio=ratio)
    assert recipe_of("recovered", setting).options == {"ratio": ratio}
    names = ("recovered-int8", "uniform-svd-recovered-int8")
    blocks, one = (made(host, name, setting).model for name in names)
    assert len(one.table.blocks) == 1
    assert part_sizes(one).layers == part_sizes(blocks).layers
    column = one.n_items + one.table.dim + 2  # of the rows, and a row of the projection
    assert served_bytes(one) <= served_bytes(blocks) < served_bytes(one) + column
    if len(blocks.table.blocks) == 1:
        assert all(map(torch.equal, blocks.state_dict().values(), one.state_dict().values()))


def test_what_comes_to_the_same_model_is_none(world):
    names = ("blocks-only", "tree", "full", "untied", "tied", "one-rank")
    for layers, options, same in (
        (1, {"ranks": (8, 4)}, {"blocks-only", "full", "tied"}),
        (4, {"ranks": (8,)}, {"tree", "full", "tied", "one-rank"}),
        (4, {"ranks": (3,), "cutoffs": (41,)}, {"tree", "full", "tied", "one-rank"}),
        (4, {"ranks": (3,), "softmax": "tree"}, {"tree", "full", "tied"}),
        (4, {"ranks": (3, 3), "softmax": "tree", "tied": False}, {"tree", "untied"}),
    ):
        setting = setting_of(world, "GRU4Rec", CompressionConfig(**options), num_layers=layers)
        assert {name for name in names if recipe_of(name, setting) is None} == same


def vector(table, item):
    """The vector of an item by the definition of its table."""
    if isinstance(table, HashedTable):
        return table.quotients[item // table.divisor] * table.remainders[item % table.divisor]
    codes = table.codes[item].tolist()
    return torch.cat([table.centroids[k, code] for k, code in enumerate(codes)])


def test_vectors_losses_and_gradients_are_those_of_the_definition(on_a_table):
    table, softmax = on_a_table.table, on_a_table.softmax
    rows = torch.stack([vector(table, item) for item in range(1, table.n_items)])
    torch.testing.assert_close(table.dense()[1:], rows)
    assert not table.dense()[0].any()
    torch.testing.assert_close(table.norm(), rows.norm())
    hidden, target = torch.randn(9, table.dim), torch.randint(1, table.n_items, (9,))
    loss, expected = softmax.loss(hidden, target), F.cross_entropy(hidden @ rows.T, target - 1)
    torch.testing.assert_close(loss, expected)
    parameters = list(table.parameters())
    for found, wanted in zip(*(torch.autograd.grad(each, parameters) for each in (loss, expected))):
        torch.testing.assert_close(found, wanted)
    for outside in (-1, table.n_items):
        with pytest.raises(IndexError):
            table(torch.tensor([1, outside]))


def test_equal_scores_come_by_lower_id_and_what_is_barred_stays_out(on_a_table):
    softmax, n_items = on_a_table.softmax, on_a_table.n_items
    hidden = torch.zeros(3, on_a_table.table.dim)  # every score is zero
    exclude = torch.tensor([[1, 2, 0], [3, 3, 3], [0, 0, 0]])
    assert softmax.topk(hidden, 3, exclude).items.tolist() == [[3, 4, 5], [1, 2, 4], [1, 2, 3]]
    assert softmax.topk(hidden, 2, [5], [9, 5, 7, 5]).items.tolist() == [[7, 9]] * 3
    assert softmax.topk(hidden, n_items - 1).items.tolist() == [list(range(1, n_items))] * 3
    with pytest.raises(CompressionError, match="`k` to be from 1 to the 2 items"):
        softmax.topk(hidden, 3, [5], [9, 5, 7])


def test_tables_are_not_saved_but_their_weights_are(on_a_table, tmp_path):
    for attempt in (lambda: on_a_table.save_pretrained(tmp_path), lambda: on_a_table.add_items("n")):
        with pytest.raises(CompressionError, match="Expected a table of blocks to"):
            attempt()
    file, again, before = io.BytesIO(), copy.deepcopy(on_a_table), on_a_table.recommend([1, 2], 7)
    torch.save(on_a_table.state_dict(), file)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert not torch.equal(again.recommend([1, 2], 7).scores, before.scores)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(again.recommend([1, 2], 7).scores, before.scores)  # they are noticed
