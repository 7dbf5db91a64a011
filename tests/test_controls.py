"""One contract for all controls, and what each of them claims of its size and its vectors."""

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
from cprec_recbole.compare.controls import (
    CONTROLS,
    DerivedControl,
    Setting,
    Trained,
    find_controls,
)
from cprec_recbole.compare.controls.hashing import HashedTable, largest_divisor
from cprec_recbole.compare.controls.recjpq import (
    CENTROIDS,
    binned,
    most_codes,
    svd_codes,
    user_item_matrix,
)
from cprec_recbole.compare.controls.table import FlatSoftmax
from cprec_recbole.compare.sizes import served_bytes
from cprec_recbole.costs import part_sizes, saved_bytes
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.training.evaluation import evaluate
from cprec_recbole.training.trainer import CompressedTrainer
from tests.builders import HOSTS, train_a_step
from tests.oracles import best_items

COMPRESSION = CompressionConfig(ranks=(16, 4, 1))
NO_DROPOUT = {
    "GRU4Rec": {"dropout_prob": 0.0},
    "SASRec": {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0},
    "NextItNet": {},
}
TABLES = ("hashing", "recjpq-random", "recjpq-svd")
IN_INT8 = ("int8", "narrower-int8", "recovered-int8", "uniform-svd-recovered-int8")


@pytest.fixture(scope="module")
def stage(world):
    """Setting, data and a briefly trained uncompressed model of each host."""
    found = {}
    for name in HOSTS:
        options = {**NO_DROPOUT[name], **COMPRESSION.as_dict()}
        config = world.config(f"Cp{name}", **options)
        setting = Setting(config, create_dataset(config), COMPRESSION)
        torch.manual_seed(3)
        model = world.model(f"Cp{name}", **{**options, **setting.uncompressed.as_dict()})
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        train, valid, _ = world.loaders(config)
        for _ in range(3):
            for batch in train:
                optimizer.zero_grad()
                model.calculate_loss(batch).backward()
                optimizer.step()
        found[name] = setting, Trained(model.eval(), train, valid, 4, 0)
    return found


def made(world, stage, host, control):
    """A control's model and its config."""
    setting, trained = stage[host]
    options = control.options(setting)
    config = world.config(f"Cp{host}", **{**NO_DROPOUT[host], **options})
    if isinstance(control, DerivedControl):
        return control.derive(trained, options).model, config
    torch.manual_seed(5)
    model = control.build(config, world.loaders(config)[0]._dataset)
    return control.finished(model), config


@pytest.fixture(params=CONTROLS.values(), ids=CONTROLS)
def model_and_config(request, world, stage, host_name):
    return made(world, stage, host_name, request.param)


@pytest.fixture(params=[name for name in CONTROLS if name not in IN_INT8])
def trainable(request, world, stage, host_name):
    """All but rows that are in int8 for good."""
    return made(world, stage, host_name, CONTROLS[request.param])


@pytest.fixture(params=TABLES)
def on_a_table(request, world, stage):
    return made(world, stage, "SASRec", CONTROLS[request.param])[0]


def test_the_contract_of_recboles_models(world, model_and_config):
    model, config = model_and_config
    model.eval()
    batch = next(iter(world.loaders(config)[2]))[0]
    with torch.no_grad():
        dense = model.full_sort_predict(batch)
        assert dense.shape == (len(batch), model.n_items)
        wanted = dense.gather(1, batch["item_id"].unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(model.predict(batch), wanted)
        chances = model.softmax.log_prob(model.last_hidden(batch)).exp()
    torch.testing.assert_close(chances.sum(1), torch.ones(len(batch)))
    assert (chances[:, 0] == 0).all()  # padding has no probability
    best = model.recommend(batch["item_id_list"], k=5)
    for row in range(len(batch)):
        assert best.items[row].tolist() == best_items(dense[row].tolist(), 5)
    torch.testing.assert_close(best.scores, dense.gather(1, best.items))


def test_the_loss_is_that_of_every_position_and_falls(world, trainable):
    model, config = trainable
    train = world.loaders(config)[0]
    batch = next(iter(train))
    losses = [train_a_step(model, batch, lr=0.02) for _ in range(15)]
    assert losses[-1] < losses[0]
    model.zero_grad()
    for batch in world.loaders(config)[0]:
        model.calculate_loss(batch).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert without == []


def test_recboles_trainer_trains_and_evaluates_it(world, stage, host_name, tmp_path):
    model, config = made(world, stage, host_name, CONTROLS["recjpq-random"])
    config["checkpoint_dir"] = str(tmp_path)
    train, valid, test = world.loaders(config)
    trainer = CompressedTrainer(config, model)
    trainer.fit(train, valid, verbose=False)
    result = trainer.evaluate(test)
    assert evaluate(model, test) == pytest.approx(dict(result))


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
def test_saved_and_reloaded_it_scores_the_same(world, stage, control):
    model, _ = made(world, stage, "GRU4Rec", control)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*again.parameters(), *again.buffers()):
            if tensor.is_floating_point():
                tensor.zero_()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.recommend([1, 2, 3], 7).scores, model.recommend([1, 2, 3], 7).scores)


def vector(table, item):
    """The vector of an item by the definition of its table."""
    if item == 0:
        return torch.zeros(table.dim)
    if isinstance(table, HashedTable):
        q = table.divisor
        return table.quotients[item // q] * table.remainders[item % q]
    codes = table.codes[item].tolist()
    return torch.cat([table.centroids[k, code] for k, code in enumerate(codes)])


def test_vectors_scores_and_losses_are_those_of_the_definition(on_a_table):
    table, head = on_a_table.table, on_a_table.softmax
    assert isinstance(head, FlatSoftmax)
    rows = torch.stack([vector(table, item) for item in range(table.n_items)])
    torch.testing.assert_close(table.dense(), rows)
    some = torch.tensor([[3, 0], [7, 3]])
    torch.testing.assert_close(table(some), rows[some])
    torch.testing.assert_close(table.norm(), rows.norm())
    hidden = torch.randn(6, table.dim)
    dense = hidden @ rows.T
    torch.testing.assert_close(head.scores(hidden), dense)
    items = torch.randint(0, table.n_items, (6, 4))
    torch.testing.assert_close(head.score(hidden, items), dense.gather(1, items))
    target = torch.randint(1, table.n_items, (6,))
    torch.testing.assert_close(head.loss(hidden, target), F.cross_entropy(dense[:, 1:], target - 1))
    for outside in (-1, table.n_items):
        with pytest.raises(IndexError):
            table(torch.tensor([1, outside]))


def test_gradients_are_those_of_the_definition(world, stage):
    for name in TABLES:
        model, _ = made(world, stage, "NextItNet", CONTROLS[name])
        table = model.table
        hidden, target = torch.randn(9, table.dim), torch.randint(1, table.n_items, (9,))
        model.softmax.loss(hidden, target).backward()
        found = [p.grad.clone() for p in table.parameters()]
        model.zero_grad()
        rows = torch.stack([vector(table, item) for item in range(1, table.n_items)])
        F.cross_entropy(hidden @ rows.T, target - 1).backward()
        for one, parameter in zip(found, table.parameters()):
            torch.testing.assert_close(one, parameter.grad)


def test_equal_scores_come_by_lower_id_and_what_is_barred_stays_out(on_a_table):
    head, n_items = on_a_table.softmax, on_a_table.n_items
    hidden = torch.zeros(3, head.table.dim)  # every score is zero
    assert head.topk(hidden, 4).items.tolist() == [[1, 2, 3, 4]] * 3
    exclude = torch.tensor([[1, 2, 0], [3, 3, 3], [0, 0, 0]])
    assert head.topk(hidden, 3, exclude).items.tolist() == [[3, 4, 5], [1, 2, 4], [1, 2, 3]]
    assert head.topk(hidden, 2, [5], [9, 5, 7, 5]).items.tolist() == [[7, 9]] * 3
    with pytest.raises(CompressionError, match="`k` to be from 1 to the 2 items"):
        head.topk(hidden, 3, [5], [9, 5, 7])
    assert head.topk(hidden, n_items - 1).items.tolist() == [list(range(1, n_items))] * 3


def test_a_search_in_pieces_finds_the_same(on_a_table, monkeypatch):
    hidden = torch.randn(7, on_a_table.table.dim)
    exclude = torch.randint(0, on_a_table.n_items, (7, 3))
    whole = on_a_table.softmax.topk(hidden, 5, exclude)
    monkeypatch.setattr("cprec_recbole.compare.controls.table._SCORES", 2 * on_a_table.n_items)
    pieces = on_a_table.softmax.topk(hidden, 5, exclude)
    assert torch.equal(pieces.items, whole.items)
    assert on_a_table.softmax.topk(hidden[:0], 5).items.shape == (0, 5)


def test_what_a_control_is_not_made_for_is_refused(on_a_table, tmp_path):
    for attempt in (
        on_a_table.build_index,
        lambda: on_a_table.save_pretrained(tmp_path),
        lambda: on_a_table.add_items(["new"]),
    ):
        with pytest.raises(CompressionError, match="Expected a table of blocks"):
            attempt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
def test_sizes_are_what_was_planned(world, stage, host_name, control):
    setting, _ = stage[host_name]
    options = control.options(setting)
    model, _ = made(world, stage, host_name, control)
    limit = setting.compressed.total
    compressed = world.model(f"Cp{host_name}", **COMPRESSION.as_dict())
    assert part_sizes(compressed) == setting.compressed
    if control.name in ("one-rank", "uniform-svd", "uniform-svd-recovered"):
        assert part_sizes(model).total <= limit
        assert len(model.table.blocks) == 1
        larger = {**options, "ranks": [options["ranks"][0] + 1]}
        assert setting.sizes(larger).total > limit
    elif control.name == "narrower":
        assert part_sizes(model).total <= limit
        step = 2 if host_name == "SASRec" else 1  # attention heads
        size = options[setting.spec.size_option] + step
        wider = {
            name: round(setting.config[name] * size / setting.dim)
            for name in ("embedding_size", "hidden_size", "inner_size")
            if name in options
        }
        assert setting.sizes({**options, **wider}).total > limit
    elif control.name == "hashing":
        assert part_sizes(model).total <= limit
    elif control.name in ("blocks-only", "sharing-only", "untied"):
        assert part_sizes(model).total > limit
    elif control.name == "uncompressed-recovered":
        assert part_sizes(model) == setting.sizes(setting.uncompressed.as_dict())
        return
    elif control.name == "recovered":
        assert part_sizes(model) == setting.compressed
    elif control.name in ("full", "tied"):  # which is what the compressed model is
        assert not control.differs(setting)
        assert part_sizes(model) == setting.compressed
    elif control.name == "uniform-svd-recovered-int8":
        assert model.table.is_int8
        assert len(model.table.blocks) == 1
        return
    elif control.name == "recovered-int8":
        assert model.table.is_int8
        assert saved_bytes(model) <= 4 * limit
        assert model.table.ranks[-1] > min(COMPRESSION.ranks)  # what int8 is for
        return
    elif control.name == "narrower-int8":
        assert served_bytes(model) == setting.sizes(options, control.unit).total <= 4 * limit
        return
    if control.name != "narrower":
        assert setting.sizes({**options, "ranks": None}).layers == part_sizes(model).layers


@pytest.mark.parametrize(("host", "ratio"), [("NextItNet", 8), ("NextItNet", 12), ("GRU4Rec", 7)])
def test_one_rank_in_int8_fills_the_bytes_of_the_blocks(stage, host, ratio):
    trained = stage[host][1]
    names = ("recovered-int8", "uniform-svd-recovered-int8")
    blocks, one = (CONTROLS[name].compressed(trained, {"ratio": ratio}) for name in names)
    assert len(blocks.table.blocks) > 1
    assert len(one.table.blocks) == 1
    assert one.table.is_int8
    assert part_sizes(one).layers == part_sizes(blocks).layers
    assert one.compression.sharing == blocks.compression.sharing
    column = one.n_items + one.table.dim + 2  # of the rows, and a row of the projection
    assert served_bytes(one) <= served_bytes(blocks) < served_bytes(one) + column


def test_one_rank_in_int8_beside_one_block_is_the_same_model(stage):
    trained = stage["SASRec"][1]
    names = ("recovered-int8", "uniform-svd-recovered-int8")
    block, one = (CONTROLS[name].compressed(trained, {"ratio": 2}) for name in names)
    assert len(block.table.blocks) == 1
    assert all(map(torch.equal, block.state_dict().values(), one.state_dict().values()))


def test_a_narrower_model_in_int8_is_as_wide_as_fits(world, stage, host_name):
    setting, _ = stage[host_name]
    whole = setting.sizes(setting.uncompressed.as_dict()).total
    control, step = CONTROLS["narrower-int8"], 2 if host_name == "SASRec" else 1
    widths = []
    for ratio in (2, 5, 7):
        small = replace(setting, refused_size=whole // ratio)
        options = control.options(small)
        assert setting.sizes(options, control.unit).total <= 4 * (whole // ratio)
        widths.append(options[setting.spec.size_option])
        if ratio > 2:
            wider = control._of_width(setting, widths[-1] + step)
            assert setting.sizes(wider, control.unit).total > 4 * (whole // ratio)
    assert widths[0] == setting.width  # all of it in int8 takes less than half
    assert widths[0] > widths[1] > widths[2]


def test_options_that_come_to_the_same_model_do_not_differ(world):
    """Sharing where there is one layer, a tree of one block."""
    for layers, ranks, same in ((1, (8, 4), {"blocks-only"}), (4, (8,), {"tree"})):
        compression = CompressionConfig(ranks=ranks)
        config = world.config("CpGRU4Rec", num_layers=layers, **compression.as_dict())
        setting = Setting(config, create_dataset(config), compression)
        names = ("blocks-only", "tree", "untied")
        assert {name for name in names if not CONTROLS[name].differs(setting)} == same


def test_one_rank_beside_one_block_is_the_same_model(world):
    """The budget may make one block, and say so with a cutoff at the end of the catalogue."""
    for cutoffs, softmax, differs in (
        ((), "full", False),
        ((41,), "full", False),
        ((), "tree", True),
        ((20, 41), "full", True),
    ):
        ranks = (3,) * max(1, len(cutoffs))
        compression = CompressionConfig(ranks, cutoffs, softmax=softmax)
        config = world.config("CpGRU4Rec", **compression.as_dict())
        setting = Setting(config, create_dataset(config), compression)
        assert CONTROLS["one-rank"].differs(setting) == differs


def test_recjpq_shares_no_layers_where_it_has_room(world):
    data = SimpleNamespace(iid_field="item_id", item_num=2000, num=lambda field: 2000)
    # 16 codes of 2,000 items and 4,096 floats of centroids: 48,384 bytes, as rank 6 takes
    for rank, sharing in ((6, "cross_layer"), (12, "none")):
        compression = CompressionConfig((rank,), (), "cross_layer")
        config = world.config("CpSASRec", **compression.as_dict())
        setting = Setting(config, data, compression)
        options = CONTROLS["recjpq-random"].options(setting)
        assert (options["recjpq_codes"], options["sharing"]) == (16, sharing)


def test_bytes_are_counted_to_the_last(world, stage):
    setting, trained = stage["SASRec"]
    n_items, dim = setting.n_items, setting.dim
    plain = part_sizes(trained.model)
    assert served_bytes(trained.model) == 4 * plain.total  # one block: nothing to tell apart
    compressed = world.model("CpSASRec", **COMPRESSION.as_dict())
    # which of three blocks an item is in: two bits
    assert served_bytes(compressed) == 4 * setting.compressed.total + 2 * -(-n_items // 8)
    coded, _ = made(world, stage, "SASRec", CONTROLS["recjpq-svd"])
    m = coded.table.codes.shape[1]
    layers = part_sizes(coded).layers
    assert served_bytes(coded) == 4 * (layers + CENTROIDS * dim) + m * n_items
    assert part_sizes(coded).table == CENTROIDS * dim
    int8, _ = made(world, stage, "SASRec", CONTROLS["int8"])
    entries = sum(p.numel() for p in trained.model.parameters() if p.ndim > 1)
    rows = sum(len(p) for p in trained.model.parameters() if p.ndim > 1)
    assert served_bytes(int8) == entries + 2 * rows + 4 * (plain.total - entries)
    assert part_sizes(int8) == plain


def test_int8_is_near_the_trained_model_and_leaves_it_alone(world, stage, host_name):
    _, trained = stage[host_name]
    before = copy.deepcopy(trained.model.state_dict())
    model, _ = made(world, stage, host_name, CONTROLS["int8"])
    dense = trained.model.table.dense()
    error = (model.table.dense() - dense)[1:].abs().amax(1)
    # half a step, and the half of a 256th that a scale may be rounded up by
    assert (error <= dense[1:].abs().amax(1) / 254 * (1 + 2**-7)).all()
    batch = torch.randint(1, model.n_items, (4, 8))
    states = trained.model.hidden_states(batch), model.hidden_states(batch)
    assert not torch.equal(*states)
    torch.testing.assert_close(*states, rtol=0.1, atol=0.1)
    assert all(torch.equal(before[n], t) for n, t in trained.model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        *("recovered", "recovered-int8", "uncompressed-recovered"),
        *("uniform-svd-recovered", "uniform-svd-recovered-int8"),
    ],
)
def test_a_recovery_takes_a_quarter_of_the_epochs(stage, name):
    setting, trained = stage["SASRec"]
    control = CONTROLS[name]
    found = control.derive(trained, control.options(setting))
    assert trained.epochs == 4
    assert len(found.recovery.epochs) == 1


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 5000), st.integers(1, 5000))
def test_the_divisor_is_the_largest_that_fits(n_items, rows):
    def taken(q):
        return q + -(-n_items // q)

    divisor = largest_divisor(n_items, rows)
    fitting = [q for q in range(1, n_items + 1) if taken(q) <= rows]
    if fitting:
        assert divisor == max(fitting)
    else:
        assert taken(divisor) <= min(taken(q) for q in range(1, n_items + 1)) + 1


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (4 * 256 * 64 + 32 * 1000, 32),
        (4 * 256 * 64 + 32 * 1000 - 1, 16),
        (4 * 256 * 64 + 4000, 4),
        (4 * 256 * 64 + 3999, 8),  # nothing fits: as many as the paper's
        (0, 8),
    ],
)
def test_codes_fill_the_bytes_that_there_are(limit, expected):
    assert most_codes(1000, 64, limit) == expected


def test_codes_of_odd_dimensions():
    assert most_codes(1000, 50, 10**9) == 25
    assert most_codes(1000, 7, 0) == 7
    assert most_codes(1000, 3, 10**9) == 3


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 700), st.integers(1, 4), st.integers(0, 2**31))
def test_bins_hold_equally_many_items_in_order(n_items, m, seed):
    values = np.random.default_rng(seed).normal(size=(n_items, m))
    codes = binned(values)
    assert codes.dtype == np.uint8
    assert (codes[0] == 0).all()
    for column, code in zip(values[1:].T, codes[1:].T):
        counts = np.bincount(code, minlength=CENTROIDS)
        if n_items > CENTROIDS:
            assert counts.max() - counts.min() <= 1
        else:
            assert counts.max() <= 1
        assert (np.diff(code[np.argsort(column)].astype(int)) >= 0).all()


def test_svd_codes_follow_the_strongest_directions(world):
    generator = np.random.default_rng(0)
    train, _, _ = world.loaders(world.config("CpSASRec"))
    matrix = user_item_matrix(train._dataset)
    codes = svd_codes(matrix, 3, np.random.default_rng(1))
    _, _, exact = np.linalg.svd(matrix.toarray())
    for j in range(3):
        direction, order = exact[j][1:], np.argsort(codes[1:, j].astype(int), kind="stable")
        ordered = direction[order]
        steps = np.diff(ordered)  # rising or falling but for the noise against ties
        assert (steps > -1e-3).all() or (steps < 1e-3).all()
    more = svd_codes(matrix, 60, generator)  # more than the matrix has directions
    assert more.shape == (matrix.shape[1], 60)


def test_the_user_item_matrix_holds_the_training_items(world):
    for training in ("all_positions", "last_position"):
        train, _, _ = world.loaders(world.config("CpSASRec", training=training))
        dataset = train._dataset
        matrix = user_item_matrix(dataset).toarray()
        assert set(np.unique(matrix)) == {0.0, 1.0}
        assert matrix[0].sum() == matrix[:, 0].sum() == 0
        counts = item_counts(dataset)
        assert ((matrix.sum(0) > 0) == (counts > 0)).all()
        assert (matrix.sum(0) <= counts).all()


def test_names_of_controls():
    assert find_controls([]) == []
    assert find_controls(["all"]) == list(CONTROLS.values())
    assert [c.name for c in find_controls(["tree", "narrower", "tree"])] == ["tree", "narrower"]
    with pytest.raises(
        CompressionError, match=r"out of recovered, .*hashing.*did you mean 'narrower'"
    ):
        find_controls(["narower"])


def test_nothing_narrower_than_the_narrowest_is_an_error(world):
    config = world.config("CpSASRec", hidden_size=2, **CompressionConfig(ranks=(2, 1)).as_dict())
    setting = Setting(config, create_dataset(config), CompressionConfig(ranks=(2, 1)))
    with pytest.raises(CompressionError, match="`hidden_size` to be above 2"):
        CONTROLS["narrower"].options(setting)
