"""Matrices in int8 and int4: how far off they may be, and that what is exact stays so."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cprec_recbole import (
    CompressionConfig,
    CompressionError,
    compress,
    evaluate,
    load_pretrained,
    quantize,
    recover,
)
from cprec_recbole.commands.cli import main
from cprec_recbole.compression.quantize import in_float, quantized_block
from cprec_recbole.costs import saved_bytes
from cprec_recbole.integers import (
    dtypes_of,
    fill,
    float_matrices,
    int4_scales,
    of_int4,
    packed,
    quantized_rows,
    round_matrix,
    unpacked,
    whole_numbers,
)
from cprec_recbole.models import saving
from cprec_recbole.models.saving import read_folder
from cprec_recbole.softmax import build_softmax
from cprec_recbole.training.trainer import CompressedTrainer
from tests.builders import HOSTS, block_embedding, train_a_step
from tests.oracles import best_by_sort
from tests.test_pretrained import rewritten

OPTIONS = {"ranks": [16, 4, 1], "cutoffs": [6, 20]}
MEASURED = {"metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10"}
HISTORIES = [[1, 2, 3], [4], list(range(1, 12))]


@pytest.fixture(params=["int8", "mixed", "int4"])
def dtype(request):
    return request.param


@pytest.fixture(params=["int8", "int4"])
def of_rows(request):
    return request.param


def quantized_table(table, dtype):
    for j, block in enumerate(table.blocks):
        table.factors[j] = quantized_block(block, dtype)
    return table


def softmax_in(dtype, kind, sizes=(5, 9, 30), ranks=(8, 5, 2), dim=8):
    return build_softmax(kind, quantized_table(block_embedding(sizes, ranks, dim), dtype)).eval()


# -- rows ------------------------------------------------------------------------------------------

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 5))
matrices = arrays.arrays("float32", shapes, elements=finite)


@given(matrices)
@settings(max_examples=100, deadline=None)
def test_no_entry_is_off_by_more_than_half_a_scale(matrix):
    rows = torch.from_numpy(matrix)
    values, scales = quantized_rows(rows)
    assert values.dtype == torch.int8
    assert scales.dtype == rows.dtype
    assert int(values.abs().max()) <= 127
    back = values.double() * scales.double().unsqueeze(1)
    off = (back - rows.double()).abs()
    assert (off <= scales.double().unsqueeze(1) / 2).all()
    least = (rows.double().abs().amax(1) / 127).clamp(min=2.0**-126)
    assert torch.equal(scales, scales.bfloat16().float())
    assert (scales.double() <= least * (1 + 2.0**-7)).all()  # one step of bfloat16


@given(matrices)
@settings(max_examples=100, deadline=None)
def test_a_rounded_matrix_is_its_whole_numbers_times_its_scales(matrix):
    matrix = torch.from_numpy(matrix)[:, None, :]  # as a kernel has it
    values, scales = quantized_rows(matrix.flatten(1))
    rounded = matrix.clone()
    assert torch.equal(round_matrix(rounded, "int8"), scales)
    assert torch.equal(whole_numbers(rounded, scales, "int8"), values.view(matrix.shape))
    again = torch.empty_like(matrix)
    assert torch.equal(fill(again, values, scales.bfloat16()), scales)
    assert torch.equal(again, rounded)
    assert torch.equal(whole_numbers(rounded.double(), scales, "int8"), values.view(matrix.shape))


@given(matrices, st.sampled_from([0, 1]))
@settings(max_examples=100, deadline=None)
def test_int4_scales_have_the_least_error_of_those_that_are_tried(matrix, dim):
    matrix = torch.from_numpy(matrix).clamp(-1e18, 1e18)  # whose squares are numbers
    scales = int4_scales(matrix, dim)
    assert torch.equal(scales, scales.bfloat16().float())

    def error(each):
        numbers = of_int4(matrix, each)
        assert torch.equal(numbers, numbers.round())
        assert (numbers.abs() <= 7).all()
        return (numbers * each - matrix).square().sum(dim)

    whole = matrix.abs().amax(dim, keepdim=True) / 7
    for share in (1.0, 0.7, 0.4):
        tried = (whole * share).clamp(min=2.0**-126).bfloat16().float()
        assert (error(scales) <= error(tried) * (1 + 1e-6)).all()


@given(arrays.arrays("int8", shapes, elements=st.integers(-7, 7)))
def test_what_is_packed_comes_back(numbers):
    numbers = torch.from_numpy(numbers)
    halves = packed(numbers)
    assert halves.shape == (len(numbers), (numbers.shape[1] + 1) // 2)
    assert torch.equal(unpacked(halves, numbers.shape[1]).to(torch.int8), numbers)


# -- the block behind its seam ---------------------------------------------------------------------


def test_look_ups_and_logits_are_those_of_the_float_block_with_the_same_rows(of_rows):
    table = block_embedding((5, 9, 30), (8, 5, 2), 8)
    small = quantized_table(copy.deepcopy(table), of_rows)
    for block, whole in zip(small.blocks, table.blocks):
        whole.weight.data = block.rows()[:]
    items = torch.randint(44, (3, 7))
    assert torch.equal(small(items), table(items))
    assert torch.equal(small.dense(), table.dense())
    torch.testing.assert_close(small.norm(), table.norm())
    hidden = torch.randn(4, 8)
    for block, whole in zip(small.blocks, table.blocks):
        torch.testing.assert_close(block.logits(hidden), whole.logits(hidden))
        assert block.logits(torch.randn(2, 3, 8)).shape == (2, 3, len(block.weight))


@pytest.mark.parametrize("kind", ["full", "tree"])
@pytest.mark.parametrize(("n_rows", "indexed"), [(1, True), (3, False), (40, True)])
def test_top_k_is_that_of_a_sort_of_its_own_scores(of_rows, kind, n_rows, indexed, monkeypatch):
    monkeypatch.setattr("cprec_recbole.search.compiled._MIN_ROWS", 64)
    head = softmax_in(of_rows, kind, (20, 300, 2000))
    hidden = torch.randn(n_rows, 8)
    exclude = torch.randint(1, 2320, (n_rows, 5))
    if indexed:
        head.build_index()
    for some, allowed in ((None, None), (exclude, None), (exclude, torch.arange(5, 1500, 3))):
        found = head.topk(hidden, 11, some, allowed)
        items, scores = best_by_sort(head, hidden, 11, some, allowed)
        assert torch.equal(found.items, items)
        torch.testing.assert_close(found.scores, scores)
    assert head.is_indexed == indexed


@pytest.mark.parametrize("kind", ["full", "tree"])
def test_equal_rows_come_by_lower_id(of_rows, kind):
    head = softmax_in(of_rows, kind, (5, 60), (8, 2))
    tail = head.table.blocks[1]
    tail.weight.data[:] = tail.weight.data[0]
    tail.scale.data[:] = tail.scale.data[0]
    hidden = torch.randn(3, 8)
    for k in (7, 64):
        assert torch.equal(head.topk(hidden, k).items, best_by_sort(head, hidden, k)[0])


def test_a_search_sees_a_scale_that_changed(of_rows):
    head = softmax_in(of_rows, "full")
    hidden = torch.randn(2, 8)
    head.build_index()
    with torch.no_grad():
        head.table.blocks[2].scale.mul_(100)
    assert not head.is_indexed
    assert torch.equal(head.topk(hidden, 9).items, best_by_sort(head, hidden, 9)[0])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused(of_rows, number):
    head = softmax_in(of_rows, "full", (5, 70_000), (8, 2))  # in the first of several pieces
    head.table.blocks[1].scale.data[0] = number
    with pytest.raises(CompressionError, match="to be finite numbers"):
        head.topk(torch.randn(1, 8), 3)


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(trained):
    """A compressed NextItNet in float that nothing is to change."""
    return compress(trained["NextItNet"], **OPTIONS)


@pytest.fixture(scope="module")
def valid(world):
    return world.loaders(world.config("NextItNet", **MEASURED))[1]


@pytest.mark.parametrize(("softmax", "tied"), [("full", True), ("tree", False)])
def test_loaded_is_saved(trained, host_name, softmax, tied, dtype, tmp_path):
    small = quantize(compress(trained[host_name], **OPTIONS, softmax=softmax, tied=tied), dtype)
    assert (small.softmax.table is small.table) == tied
    loaded = load_pretrained(small.save_pretrained(tmp_path))
    assert not loaded.training
    for one, other in ((small.table, loaded.table), (small.softmax.table, loaded.softmax.table)):
        assert one.quantized == other.quantized == dtypes_of(dtype)[0]
        assert torch.equal(one.dense(), other.dense())
    found, again = small.recommend(HISTORIES, 9), loaded.recommend(HISTORIES, 9)
    assert torch.equal(found.items, again.items)
    torch.testing.assert_close(found.scores, again.scores, rtol=1e-6, atol=1e-6)
    dense = small.softmax.scores(small(*histories(small)))
    torch.testing.assert_close(dense.gather(1, found.items), found.scores)
    _, weights, _ = read_folder(tmp_path)
    kinds = [w.dtype for n, w in weights.items() if n.endswith("weight") and "factors" in n]
    assert small.quantized == loaded.quantized == dtype
    kept_as = {"int8": torch.int8, "int4": torch.uint8}
    of_rows, of_others = (kept_as[each] for each in dtypes_of(dtype))
    assert kinds == [of_rows] * (3 if tied else 6)
    others = {n for n, w in weights.items() if w.ndim > 1 and "factors" not in n} - {"blocks"}
    assert {weights[n].dtype for n in others} == {of_others}
    ours, theirs = dict(float_matrices(small)), dict(float_matrices(loaded))
    assert ours.keys() == theirs.keys() == small.matrix_scales.keys() == loaded.matrix_scales.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(small.matrix_scales[name], loaded.matrix_scales[name]) for name in ours)
    assert loaded.save_pretrained(tmp_path / "again").joinpath("config.json").read_bytes() == (
        (tmp_path / "config.json").read_bytes()
    )
    assert sum(w.nbytes for name, w in weights.items() if name != "blocks") == saved_bytes(small)


def histories(model):
    from cprec_recbole.models.inputs import pad_histories

    item_seq, *_ = pad_histories(HISTORIES, model.n_items, model.max_seq_length)
    return item_seq, (item_seq != 0).sum(1)


def test_a_model_in_float64_is_quantized_too(world, dtype, tmp_path):
    small = quantize(compress(world.model("GRU4Rec").double().eval(), **OPTIONS), dtype)
    loaded = load_pretrained(small.save_pretrained(tmp_path))
    assert loaded.table.dtype == torch.float64
    assert loaded.recommend(HISTORIES, 5).scores.dtype == torch.float64
    assert torch.equal(loaded.recommend(HISTORIES, 5).items, small.recommend(HISTORIES, 5).items)


def test_the_original_is_left_as_it_was_and_the_layers_are_rounded_copies(small, dtype):
    before = copy.deepcopy(small.state_dict())
    result = quantize(small, dtype)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    theirs = dict(small.named_parameters())
    for name, value in result.named_parameters():
        if name.endswith("scale") or not value.is_floating_point():
            continue
        if value.ndim > 1:
            scales = result.matrix_scales[name].unsqueeze(1)
            largest = scales * {"int8": 127, "int4": 7}[dtypes_of(dtype)[1]]
            within = theirs[name].flatten(1).clamp(-largest, largest)  # int4 cuts what is beyond
            off = (value.flatten(1) - within).abs()
            assert (off <= scales / 2 * (1 + 1e-5)).all()
            assert not torch.equal(value, theirs[name])
        else:
            assert torch.equal(value, theirs[name])
        assert value.data_ptr() != theirs[name].data_ptr()
    assert result.compression == small.compression
    assert result.vocabulary is small.vocabulary
    assert not result.training


def test_new_items_leave_every_other_row_as_it_is(small, dtype, tmp_path):
    result = quantize(small, dtype)
    before = result.table.dense()
    assert result.add_items(["a", "b", "c"], like=[["i0", "i9"], None, "i30"]) == [41, 42, 43]
    assert torch.equal(result.table.dense()[:41], before)
    assert result.quantized == dtype
    loaded = load_pretrained(result.save_pretrained(tmp_path))
    tokens = [loaded.recommend_tokens(["i1"], 43).tokens[0]]
    assert {"a", "b", "c"} <= set(tokens[0])
    assert tokens == result.recommend_tokens(["i1"], 43).tokens


def test_a_matrix_that_was_changed_since_is_kept_in_float(small, tmp_path):
    result = quantize(small)
    rounded = saved_bytes(result)
    name, matrix = next((n, p) for n, p in float_matrices(result) if n.startswith("inner"))
    with torch.no_grad():
        matrix[0] += 1e-3
    assert saved_bytes(result) == rounded + 3 * matrix.numel() - 2 * len(matrix)
    loaded = load_pretrained(result.save_pretrained(tmp_path))
    assert torch.equal(dict(loaded.named_parameters())[name], matrix)
    assert name not in loaded.matrix_scales
    assert torch.equal(loaded.recommend(HISTORIES, 9).items, result.recommend(HISTORIES, 9).items)


def test_only_a_recovery_trains_it(world, small, dtype):
    result, hidden, items = quantize(small, dtype), torch.randn(2, 16), torch.tensor([1, 30])
    tree = quantize(compress(world.model("SASRec"), **OPTIONS, softmax="tree"), dtype)
    for call in (
        lambda: train_a_step(result, world.batch("CpNextItNet")),
        lambda: result.softmax.loss(hidden, items),
        lambda: tree.softmax.loss(hidden, items),
    ):
        with pytest.raises(
            CompressionError, match=rf"rows are in {dtypes_of(dtype)[0]}.*recover\(\) trains"
        ):
            call()


@pytest.mark.parametrize("tied", [True, False])
def test_a_recovery_trains_its_rows_in_float_and_brings_them_back(trained, valid, tied, dtype):
    teacher = trained["NextItNet"]
    in_float_ = compress(teacher, **OPTIONS, tied=tied)
    result = quantize(in_float_, dtype)
    options = {"batch_size": 8, "progress": False}
    found = recover(result, teacher, HISTORIES * 8, 3, valid_data=valid, **options)
    assert all(
        whole_numbers(p, result.matrix_scales[name], dtype) is not None
        for name, p in float_matrices(result)
    )
    assert found.start == evaluate(quantize(in_float_, dtype), valid)
    assert result.quantized == dtype
    assert result.softmax.table.quantized == dtypes_of(dtype)[0]
    assert found.losses[-1] < found.losses[0]
    best = found.start if found.kept == 0 else found.epochs[found.kept - 1]
    assert evaluate(result, valid) == best  # as it is in int8
    # as if its very numbers had been in float all the time
    twin = quantize(in_float_, dtype)
    plain = in_float(twin)
    plain.compression = replace(plain.compression, rounding=None if dtype == "int8" else dtype)
    for each in (twin, plain):
        recover(each, teacher, HISTORIES * 8, 3, **options)
    plain.matrix_scales = {}
    expected = quantize(plain, dtype).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in twin.state_dict().items())


def test_rounding_in_training_is_that_of_quantize(small, dtype):
    model = copy.deepcopy(small)
    before = copy.deepcopy(model.state_dict())
    item_seq, lengths = histories(model)
    with model.rounded(dtype), torch.no_grad():
        found = model.softmax.scores(model(item_seq, lengths))
    other = quantize(model, dtype)
    torch.testing.assert_close(found, other.softmax.scores(other(item_seq, lengths)))
    assert not torch.equal(found, model.softmax.scores(model(item_seq, lengths)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_training_with_rounding_is_measured_as_the_quantized_model_is(world, dtype):
    options = {**MEASURED, "rounding": dtype, "epochs": 2, "learning_rate": 0.01}
    config = world.config("CpSASRec", **options)
    train, valid, _ = world.loaders(config)
    model = world.model("CpSASRec", **options)
    trainer = CompressedTrainer(config, model)
    trainer.fit(train, valid, saved=True, verbose=False)
    model.load_state_dict(torch.load(trainer.saved_model_file, weights_only=False)["state_dict"])
    assert trainer.best_valid_result == evaluate(quantize(model, dtype), valid)
    assert trainer.evaluate(valid) == evaluate(quantize(model, dtype), valid)


def test_a_recovery_that_fails_leaves_its_very_numbers(small, dtype):
    result = quantize(small, dtype)
    scales = dict(result.matrix_scales)
    before = copy.deepcopy(result.state_dict())
    with pytest.raises(CompressionError, match="`learning_rate` to let the loss fall"):
        recover(result, None, HISTORIES * 8, 3, learning_rate=1e30, batch_size=8, progress=False)
    after = result.state_dict()
    assert result.matrix_scales == scales
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_state_of_other_rows_does_not_fit(small):
    result, in_int4 = quantize(small), quantize(small, "int4")
    pairs = ((result, small), (small, result), (result, in_int4), (in_int4, result))
    for model, other in pairs:
        before = copy.deepcopy(model.state_dict())
        for strict in (True, False):
            with pytest.raises(CompressionError, match=r"`state_dict` to have .*weight in torch\."):
                model.load_state_dict(other.state_dict(), strict=strict)
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
    result.load_state_dict(quantize(small).state_dict())


def test_what_cannot_be_quantized_is_refused(world, trained, small):
    with pytest.raises(CompressionError, match="rows are in int8 already"):
        quantize(quantize(small))
    with pytest.raises(CompressionError, match=r"a compressed model, but got SASRec; use .*uncomp"):
        quantize(trained["SASRec"])
    with pytest.raises(CompressionError, match=r"`small` .*float32 or float64.*got torch.float16"):
        quantize(copy.deepcopy(small).half())
    broken = copy.deepcopy(small)
    broken.table.blocks[1].weight.data[0, 0] = math.nan
    with pytest.raises(CompressionError, match="finite weights"):
        quantize(broken)
    whole = compress(world.model("SASRec"), CompressionConfig.uncompressed(), dtype="int8")
    with pytest.raises(CompressionError, match=r"`model` to be uncompressed, .* which is in int8"):
        compress(whole, **OPTIONS)
    for call in (
        lambda: compress(trained["SASRec"], dtype="int2"),
        lambda: quantize(small, "int2"),
    ):
        with pytest.raises(
            CompressionError, match="`dtype` to be one of int8, mixed, int4, but got 'int2"
        ):
            call()
    with pytest.raises(CompressionError, match=r"`model` .*float32 or float64.*got torch.bfloat16"):
        compress(world.model("SASRec").bfloat16(), **OPTIONS, dtype="int8")


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(HOSTS),
    dtype=st.sampled_from(["int8", "mixed", "int4"]),
    ratio=st.floats(1, 40),
    softmax=st.sampled_from(["full", "tree"]),
    tied=st.booleans(),
)
def test_a_budget_counts_the_bytes_of_the_quantized_model(
    trained, name, dtype, ratio, softmax, tied
):
    model = trained[name]
    options = {"dtype": dtype, "softmax": softmax, "tied": tied, "verbose": False}
    whole = saved_bytes(model)
    try:
        small = compress(model, ratio=ratio, **options)
    except CompressionError as error:
        words = str(error).split()
        least = int(words[words.index("of") + 1].replace(",", ""))
        assert words[words.index("of") + 2] == "bytes"
        assert least > int(whole / ratio)
        small = compress(model, size=least, **options)
        assert saved_bytes(small) == least
        return
    assert saved_bytes(small) <= whole / ratio
    assert small.choice.parameters == saved_bytes(small)
    assert f"{saved_bytes(small):,} bytes" in str(small.choice)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(trained, tmp_path):
    return compress(trained["SASRec"], **OPTIONS, dtype="int8").save_pretrained(tmp_path)


def test_rows_of_another_kind_are_refused(trained, folder):
    config = folder / "config.json"
    before = config.read_bytes()
    assert json.loads(before)["format_version"] == 3
    for rows, match in (("int2", "belong together.*'int2'"), (None, "have .*scale")):
        config.write_bytes(rewritten(rows=rows)(before))
        with pytest.raises(CompressionError, match=match):
            load_pretrained(folder)


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: torch.cat([s, s[:1]]), None])
def test_scales_that_do_not_fit_the_matrices_are_refused(trained, tmp_path, change, monkeypatch):
    small, write = compress(trained["SASRec"], **OPTIONS, dtype="int8"), saving._write

    def write_changed(out, header, weights, vocabulary):
        scales = weights.pop("scales")
        write(out, header, weights | ({"scales": change(scales)} if change else {}), vocabulary)

    monkeypatch.setattr(saving, "_write", write_changed)
    folder = small.save_pretrained(tmp_path)
    with pytest.raises(CompressionError, match="to belong together, but they do not"):
        load_pretrained(folder)


def test_a_folder_of_rows_in_int8_and_layers_in_float_is_still_read(
    trained, small, valid, tmp_path
):
    small = quantize(small)
    small.matrix_scales = {}  # as it was before matrices were rounded
    for block in small.table.blocks[1:]:
        block.projection.data += torch.randn_like(block.projection)  # and are no whole numbers
    small.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_bytes())
    assert header["format_version"] == 2
    loaded = load_pretrained(tmp_path)
    assert loaded.matrix_scales == {}
    assert torch.equal(loaded.recommend(HISTORIES, 9).items, small.recommend(HISTORIES, 9).items)
    whole = evaluate(loaded, valid)
    before = copy.deepcopy(loaded.state_dict())
    options = {"valid_data": valid, "batch_size": 8, "learning_rate": 1e30, "progress": False}
    with pytest.raises(CompressionError, match="`learning_rate`"):
        recover(loaded, None, HISTORIES * 8, 3, **options)
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())
    options["learning_rate"] = 1e-12
    found = recover(loaded, trained["NextItNet"], HISTORIES * 8, 1, **options)
    assert found.start == whole  # as it is, its layers in float


def test_the_command_recommends_from_it(folder, capsys):
    assert main(["recommend", str(folder), "--history", "i1, i2", "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    best = load_pretrained(folder).recommend_tokens(["i1", "i2"], 3).tokens[0]
    assert [line.split()[1] for line in lines] == best
