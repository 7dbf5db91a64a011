"""What each contender claims of its size, its vectors and its training, on a grid of models."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recbole.data import create_dataset

from cprec_recbole import CompressionConfig, CompressionError
from cprec_recbole.compare import contenders, tables
from cprec_recbole.compare.contenders import Setting, derive, find_controls, recipe_of, sizes
from cprec_recbole.compare.tables import CENTROIDS, served_bytes
from cprec_recbole.costs import PARAMETERS, part_sizes
from cprec_recbole.data.sequences import item_counts
from tests.builders import HOSTS, train
from tests.oracles import best_items

COMPRESSION = CompressionConfig(ranks=(16, 4, 1))
PLAIN = CompressionConfig.uncompressed()
TABLES = ("hashing", "recjpq-random", "recjpq-svd", "recjpq-hc")
LARGER = ("blocks-only", "sharing-only", "untied", "tree")
NAMES = set(contenders.CONTENDERS) - {"full", "tied", contenders.STOCK}  # the same, or not ours


def setting_of(world, host, compression=COMPRESSION, data=None, **options):
    config = world.config(f"Cp{host}", **options, **compression.as_dict())
    return Setting(config, data or create_dataset(config), compression)


@pytest.fixture(scope="module")
def originals(world):
    given = PLAIN.as_dict()
    return {n: train(world.model(f"Cp{n}", **given), world, f"Cp{n}", 3) for n in HOSTS}


@pytest.fixture(scope="module")
def made(world, originals):
    def make(host, name, setting=None):
        recipe = recipe_of(name, setting or setting_of(world, host))
        own = {} if recipe.is_derived else {k: v for k, v in recipe.options.items() if k != "dtype"}
        config = world.config(f"Cp{host}", **own)
        rows, valid, test = world.loaders(config)
        if recipe.is_derived:
            model, _ = derive(recipe, originals[host], rows, valid, 4, 0, None, "256MiB")
        else:
            model = contenders.finished(recipe, contenders.build(recipe, config, rows._dataset))
        return model.eval(), recipe, next(iter(test))[0]

    return make


@pytest.fixture(params=TABLES)
def on_a_table(request, made):
    return made("SASRec", request.param)[0]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_scores_are_those_of_a_dense_table_and_sizes_as_planned(world, made, host_name, name):
    model, recipe, batch = made(host_name, name)
    with torch.no_grad():
        hidden, scores = model.last_hidden(batch), model.full_sort_predict(batch)
        chances = model.softmax.log_prob(hidden).exp()
        if name != "tree":
            torch.testing.assert_close(scores, hidden @ model.tables[-1].dense().T)
        items = batch["item_id"].unsqueeze(1)
        torch.testing.assert_close(model.predict(batch), scores.gather(1, items).squeeze(1))
    torch.testing.assert_close(chances.sum(1), torch.ones(len(batch)))
    assert (chances[:, 0] == 0).all()  # padding has no probability
    barred = scores.topk(2, dim=1).indices
    best = model.recommend(batch["item_id_list"], 5, exclude=barred)
    for row, out, found in zip(scores.tolist(), barred.tolist(), best.items.tolist()):
        assert found == best_items(row, 5, set(out))
    torch.testing.assert_close(best.scores, scores.gather(1, best.items))
    setting, parts = setting_of(world, host_name), part_sizes(model)
    if name in {"uncompressed", "uncompressed-recovered", "int8", "int4"}:
        assert parts == sizes(setting, PLAIN)
    elif name.endswith(("int8", "int4")):  # and two bits an item for its block
        assert served_bytes(model) <= 4 * setting.compressed.total + 2 * -(-model.n_items // 8)
    elif not name.startswith("recjpq"):  # which 256 centroids make larger here
        assert (parts.total > setting.compressed.total) == (name in LARGER)
    if name in {"one-rank", "uniform-svd"}:
        more = replace(COMPRESSION, cutoffs=(), ranks=(recipe.options["ranks"][0] + 1,))
        assert sizes(setting, more).total > setting.compressed.total
    if name in {*TABLES, "one-rank", "uniform-svd", "tree", "untied", "recovered"}:
        assert parts.layers == setting.compressed.layers


@pytest.mark.parametrize("name", ["narrower", "narrower-int8", "narrower-int4"])
def test_a_narrower_model_is_as_wide_as_fits(world, host_name, name):
    units = {"int8": contenders.INT8_BYTES, "int4": contenders.INT4_BYTES}
    unit = units.get(name[-4:], PARAMETERS)
    setting = setting_of(world, host_name)
    option, step = setting.spec.size_option, 2 if host_name == "SASRec" else 1  # heads

    def cost(width):
        names = [n for n in ("embedding_size", "hidden_size", "inner_size") if n in found]
        scaled = {n: round(setting.config[n] * width / setting.dim) for n in names}
        return sizes(setting_of(world, host_name, **scaled), PLAIN, unit).total

    size = sizes(setting, PLAIN).total // 6
    found = recipe_of(name, replace(setting, refused_size=size)).options
    assert cost(found[option]) <= unit.other * size < cost(found[option] + step)
    with pytest.raises(CompressionError, match=f"Expected a budget of .* {unit.name} or more"):
        recipe_of(name, replace(setting, refused_size=9))
    with pytest.raises(CompressionError, match=f"`{option}` to be above {step}"):
        recipe_of(name, setting_of(world, host_name, CompressionConfig((1,)), **{option: step}))


def test_a_recovery_takes_a_quarter_of_the_epochs_and_leaves_the_original(world, originals):
    original, setting = originals["GRU4Rec"], setting_of(world, "GRU4Rec")
    before = copy.deepcopy(original.state_dict())
    rows, valid, _ = world.loaders(setting.config)
    for name, epochs in (("recovered-int4", 2), ("uniform-svd-recovered", 11), ("int8", 4)):
        recipe = recipe_of(name, setting)
        _, recovery = derive(recipe, original, rows, valid, epochs, 0, 1e-3, "1MiB")
        assert (recovery is not None) == recipe.has_rate
        assert recovery is None or len(recovery.epochs) == max(1, epochs // 4)
    assert all(torch.equal(before[n], t) for n, t in original.state_dict().items())


@pytest.mark.parametrize(("host", "ratio"), [("NextItNet", 8), ("GRU4Rec", 7), ("SASRec", 2)])
def test_one_rank_in_int8_fills_the_bytes_of_the_blocks(world, made, host, ratio):
    setting = replace(setting_of(world, host), ratio=ratio)
    assert recipe_of("recovered", setting).options == {"ratio": ratio}
    names = ("recovered-int8", "uniform-svd-recovered-int8")
    blocks, one = (made(host, name, setting)[0] for name in names)
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


def test_vectors_losses_and_gradients_are_those_of_the_definition(on_a_table):
    table, items = on_a_table.table, torch.arange(1, on_a_table.n_items)
    if isinstance(table, tables.HashedTable):
        rows = table.quotients[items // table.divisor] * table.remainders[items % table.divisor]
    else:
        codes = table.codes[items].long().T
        rows = torch.cat([own[code] for own, code in zip(table.centroids, codes)], dim=1)
    torch.testing.assert_close(table.dense(), F.pad(rows, (0, 0, 1, 0)))
    torch.testing.assert_close(table.norm(), rows.norm())
    hidden, target = torch.randn(9, table.dim), torch.randint(1, table.n_items, (9,))
    loss = on_a_table.softmax.loss(hidden, target)
    expected = F.cross_entropy(hidden @ rows.T, target - 1)
    torch.testing.assert_close(loss, expected)
    parameters = list(table.parameters())
    for found, wanted in zip(*(torch.autograd.grad(each, parameters) for each in (loss, expected))):
        torch.testing.assert_close(found, wanted)
    for outside in (-1, table.n_items):
        with pytest.raises(IndexError):
            table(torch.tensor([1, outside]))


def test_equal_scores_come_by_lower_id_and_what_is_barred_stays_out(on_a_table):
    hidden, n_items = torch.zeros(2, on_a_table.table.dim), on_a_table.n_items  # all scores are 0
    for k, limits, wanted in (
        (3, (torch.tensor([[1, 2, 0], [3, 3, 3]]),), [[3, 4, 5], [1, 2, 4]]),
        (2, ([5], [9, 5, 7, 5]), [[7, 9]] * 2),
        (n_items - 1, (), [list(range(1, n_items))] * 2),
    ):
        assert on_a_table.softmax.topk(hidden, k, *limits).items.tolist() == wanted


def test_a_state_has_all_of_a_table(on_a_table):
    state, before = copy.deepcopy(on_a_table.state_dict()), on_a_table.recommend([1, 2], 7)
    with torch.no_grad():
        for tensor in on_a_table.state_dict().values():
            tensor.zero_()
    assert not on_a_table.recommend([1, 2], 7).scores.any()
    on_a_table.load_state_dict(state)
    assert torch.equal(on_a_table.recommend([1, 2], 7).scores, before.scores)


def test_bytes_are_counted_to_the_last(made):
    names = ("uncompressed", "compressed", "recjpq-svd", "int8")
    plain, blocks, coded, int8 = (made("SASRec", name)[0] for name in names)
    assert served_bytes(plain) == 4 * part_sizes(plain).total  # one block: nothing to tell apart
    a_bit_an_item = -(-plain.n_items // 8)  # of three blocks it takes two
    assert served_bytes(blocks) == 4 * part_sizes(blocks).total + 2 * a_bit_an_item
    assert served_bytes(coded) == 4 * part_sizes(coded).total + coded.table.codes.numel()
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    saved = sum(3 * p.numel() - 2 * len(p) for p in matrices)  # but for a scale a row
    assert served_bytes(int8) == served_bytes(plain) - saved


def test_recjpq_shares_no_layers_where_it_has_room(world):
    data = SimpleNamespace(iid_field="item_id", item_num=2000, num=lambda field: 2000)
    # 16 codes of 2,000 items and 4,096 floats of centroids: 48,384 bytes, as rank 6 takes
    for rank, sharing in ((6, "cross_layer"), (12, "none")):
        setting = setting_of(world, "SASRec", CompressionConfig((rank,), (), "cross_layer"), data)
        options = recipe_of("recjpq-random", setting).options
        assert (options["recjpq_codes"], options["sharing"]) == (16, sharing)
    most = ((64, 4 * 64 * 256 + 32_000), (64, 4 * 64 * 256 + 31_999), (64, 0), (50, 10**9), (7, 0))
    assert [tables.most_codes(1000, dim, limit) for dim, limit in most] == [32, 16, 8, 25, 7]


def test_the_divisor_is_the_largest_that_fits():
    for n_items, rows in itertools.product((2, 3, 7, 40, 101), range(1, 110)):
        taken = {q: q + -(-n_items // q) for q in range(1, n_items + 1)}
        fits, found = [q for q in taken if taken[q] <= rows], tables.largest_divisor(n_items, rows)
        assert found == max(fits) if fits else taken[found] <= min(taken.values()) + 1


@pytest.mark.parametrize("n_items", [2, 100, 256, 257, 258, 700])
def test_bins_hold_equally_many_items_in_order(n_items):
    values = np.random.default_rng(n_items).normal(size=(n_items, 3))
    for column, code in zip(values[1:].T, tables.binned(values)[1:].T):
        counts = np.bincount(code, minlength=CENTROIDS)
        assert counts.max() - counts.min() <= 1
        assert (np.diff(code[np.argsort(column)].astype(int)) >= 0).all()


def test_svd_codes_follow_the_strongest_directions(world):
    dataset = world.loaders(world.config("CpSASRec"))[0]._dataset
    matrix = tables.user_item_matrix(dataset)
    assert ((matrix.toarray().sum(0) > 0) == (item_counts(dataset) > 0)).all()
    codes = tables.svd_codes(matrix, 3, np.random.default_rng(1)).astype(int)
    for direction, code in zip(np.linalg.svd(matrix.toarray())[2], codes.T):
        steps = np.diff(direction[1:][np.argsort(code[1:], kind="stable")])
        assert (steps > -1e-3).all() or (steps < 1e-3).all()  # but for the noise against ties
    assert tables.svd_codes(matrix, 60, np.random.default_rng(0)).shape[1] == 60  # directions


def test_quantised_codes_and_centroids_stand_for_the_strongest_directions(world):
    dataset = world.loaders(world.config("CpSASRec"))[0]._dataset
    matrix = tables.user_item_matrix(dataset)
    codes, centroids = tables.quantised_codes(matrix, 8, 4, np.random.default_rng(1))
    directions = np.linalg.svd(matrix.toarray())[2][:8].T[1:]
    wanted = (directions - directions.mean(0)) / directions.std(0)
    # fewer items than centroids: each item has its own
    found = np.hstack([centroids[j, codes[1:, j]] for j in range(4)])
    signs = np.sign((found * wanted).sum(0))
    np.testing.assert_allclose(found * signs, wanted, atol=2e-3)
    codes, centroids = tables.quantised_codes(matrix, 60, 4, np.random.default_rng(1))
    assert np.isfinite(centroids).all()
    assert (codes.shape, centroids.shape) == ((matrix.shape[1], 4), (4, 256, 15))


def test_names_of_controls():
    assert find_controls(["tree", "narrower", "tree"]) == ["tree", "narrower"]
    assert find_controls(["tree", "all"]) == list(dict.fromkeys(["tree", *contenders.CONTROLS]))
    with pytest.raises(CompressionError, match=r"one of all, recovered, .*mean 'narrower'"):
        find_controls(["narower"])
