"""Models in folders: what is loaded is what was saved, and damage is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cprec_recbole
from cprec_recbole import CompressionConfig, CompressionError, CpSASRec, compress, load_pretrained
from cprec_recbole.files import held
from cprec_recbole.models import saving
from cprec_recbole.models.saving import read_folder
from tests.builders import SCHEMES, train_a_step
from tests.test_serving import catalogue_model

OPTIONS = {"ranks": [16, 4, 1], "cutoffs": [6, 20]}


def small_of(trained, host_name, **options):
    return compress(trained[host_name], **{**OPTIONS, **options})


def factors_by_item(table):
    """Items, rows in the order of item ids, and projection of each block. Their products are not
    compared: where a row stands in a matrix can move the last bit of its product."""
    found = []
    for block, start, end in zip(table.blocks, table.partition.starts, table.partition.cutoffs):
        items, order = table.partition.item_at[start:end].sort()
        found += [items, block.weight[order]]
        found += [] if block.projection is None else [block.projection]
    return found


def same(a, b):
    """Whether two models have the same options, weights by item, and scores."""
    assert type(a) is type(b)
    for one, other in ((a.table, b.table), (a.softmax.table, b.softmax.table)):
        assert all(map(torch.equal, factors_by_item(one), factors_by_item(other)))
    histories = [[1, 2, 3], [4], list(range(1, 12))]
    one, other = a.recommend(histories, 9), b.recommend(histories, 9)
    assert torch.equal(one.items, other.items)
    # rows of a block are added up in another order, which can move the last bit of a normaliser
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-6, atol=1e-6)
    return True


@pytest.fixture(scope="module")
def pair(trained):
    """Two models, of which one is saved where the other was."""
    return tuple(small_of(trained, "GRU4Rec", ranks=[rank, 4, 1]) for rank in (16, 8))


def test_whoever_reads_while_it_is_replaced_gets_the_new_model(pair, tmp_path, monkeypatch):
    old, new = pair
    old.save_pretrained(tmp_path)
    read, calls = saving._read_config, []

    def late(out):
        header = read(out)
        if not calls:
            calls.append(1)
            new.save_pretrained(tmp_path)  # another process, just after config.json was read
        return header

    monkeypatch.setattr(saving, "_read_config", late)
    assert same(load_pretrained(tmp_path), new)


def test_a_folder_that_another_writes_to_is_refused_and_stays(pair, tmp_path):
    old, new = pair
    old.save_pretrained(tmp_path)
    with held(tmp_path), pytest.raises(CompressionError, match="`folder` to be a folder that noth"):
        new.save_pretrained(tmp_path)
    assert same(load_pretrained(tmp_path), old)
    assert len([p for p in tmp_path.iterdir() if not p.name.startswith("layers-")]) == 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("scheme", "softmax"), zip(SCHEMES, ["full", "tree"] * 3))
def test_what_is_loaded_is_what_was_saved(trained, host_name, scheme, softmax, tied, tmp_path):
    small = small_of(trained, host_name, sharing=scheme, softmax=softmax, tied=tied)
    loaded = load_pretrained(small.save_pretrained(tmp_path))
    assert same(small, loaded)
    assert not loaded.training
    names = {n for n, _ in small.named_parameters()}
    assert {n for n, _ in loaded.named_parameters()} == names
    _, weights, _ = read_folder(tmp_path)
    assert set(weights) == {*names, "blocks"}  # what is tied or shared is there once


def test_a_model_that_recbole_trained_is_kept_and_trained_further(world, tmp_path):
    model = world.model("CpSASRec")
    train_a_step(model, world.batch("CpSASRec"))
    loaded = load_pretrained(model.eval().save_pretrained(tmp_path))
    assert same(model, loaded)
    batch = world.evaluation_batch("CpSASRec")
    torch.testing.assert_close(loaded.full_sort_predict(batch), model.full_sort_predict(batch))
    assert train_a_step(loaded, world.batch("CpSASRec")) > 0


def test_the_type_of_the_weights_and_the_column_that_is_read_are_kept(world, tmp_path):
    small = compress(world.model("NextItNet").double().eval(), **OPTIONS)
    loaded = load_pretrained(small.save_pretrained(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert loaded.reads_last_column
    assert same(small, loaded)


def test_the_folder_is_as_small_as_its_parameters(tmp_path):
    from cprec_recbole import CpSASRec
    from tests.test_serving import catalogue_model

    model = catalogue_model(CpSASRec, 20_000)
    folder = model.save_pretrained(tmp_path)
    parameters = sum(p.numel() * 4 for p in model.parameters())
    vocabulary = next(folder.glob("items-*.json")).stat().st_size
    whole = sum(path.stat().st_size for path in folder.iterdir())
    assert whole <= 1.05 * parameters + vocabulary
    assert len(list(folder.iterdir())) == 3


def test_loading_leaves_the_random_state_alone(saved):
    state = torch.random.get_rng_state()
    load_pretrained(saved)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_saving_again_replaces_the_model_and_nothing_else(pair, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".cprec-weights-1.tmp").write_text("of a process that was killed")
    for model in pair:
        model.save_pretrained(tmp_path)
    names = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert names == ["config.json", "items", "notes.txt", "weights"]
    assert same(load_pretrained(tmp_path), pair[1])


@pytest.mark.parametrize("step", range(6))
def test_a_crash_in_the_middle_leaves_the_old_model_whole(pair, tmp_path, monkeypatch, step):
    old, new = pair
    old.save_pretrained(tmp_path)
    calls = []

    def failing(real):
        def call(*arguments, **options):
            calls.append(real)
            if len(calls) > step:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace))
        patch.setattr(os, "fsync", failing(os.fsync))
        with pytest.raises(CompressionError, match=r"one that can be written.*No space left"):
            new.save_pretrained(tmp_path)
    assert same(load_pretrained(tmp_path), old)
    new.save_pretrained(tmp_path)
    assert same(load_pretrained(tmp_path), new)
    assert len([p for p in tmp_path.iterdir() if not p.name.startswith("layers-")]) == 3


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    return small_of(trained, "SASRec").save_pretrained(tmp_path_factory.mktemp("saved"))


def damaged(saved, tmp_path, pattern, change):
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    path = next(folder.glob(pattern))
    content = change(path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    return folder


def rewritten(**changes):
    """config.json with some values changed and a checksum that fits."""
    from cprec_recbole.models.saving import _checksum

    def change(content):
        header = json.loads(content)
        header.pop("checksum")
        header |= changes
        return json.dumps({**header, "checksum": _checksum(header)}).encode()

    return change


@pytest.mark.parametrize(
    ("pattern", "change", "match"),
    [
        ("config.json", lambda b: b[:100], "config.json is missing, cut short or damaged"),
        ("config.json", lambda b: b"[]", "of something else"),
        ("config.json", lambda b: b"\xff\xfe", "cut short or damaged"),
        (
            "config.json",
            lambda b: None,
            "save_pretrained wrote, but .*config.json is missing",
        ),
        ("config.json", lambda b: b.replace(b'"n_heads": 2', b'"n_heads": 4'), "has been changed"),
        ("config.json", rewritten(format_version=5), "format 5: it was written by a newer"),
        ("config.json", rewritten(format="other"), "of something else"),
        ("config.json", rewritten(model="CpBERT"), "`model` to be one of"),
        ("config.json", rewritten(n_items=99), "`cutoffs` to have 2 entries below the 99 items"),
        ("config.json", rewritten(compression={"cutoffs": [7, 20]}), r"blocks of \[7.*of \[6, 14"),
        ("config.json", rewritten(rows="int2"), "belong together.*'int2'"),
        ("config.json", rewritten(rows="int8"), "the weights lack .*scale"),
        ("config.json", rewritten(rows="int4"), "the weights lack .*scale"),
        ("config.json", rewritten(architecture={}), "belong together"),
        ("config.json", rewritten(files={"weights": {"name": "../weights"}}), "no file of ours"),
        ("weights-*", lambda b: b[:-7], "weights-.* cut short: .* bytes and not"),
        ("weights-*", lambda b: b + b"x", "longer than it was"),
        ("weights-*", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "bytes have been changed"),
        ("weights-*", lambda b: None, "weights-.* to be as config.json describes it, .* missing"),
        ("items-*", lambda b: b.replace(b"i1", b"i9", 1), "items-.* bytes have been changed"),
        ("items-*", lambda b: None, "items-.* missing"),
    ],
)
def test_damage_is_named(saved, tmp_path, pattern, change, match):
    folder = damaged(saved, tmp_path, pattern, change)
    with pytest.raises(CompressionError, match=match):
        load_pretrained(folder)


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_changed_byte_goes_unnoticed(saved, tmp_path, data):
    pattern = data.draw(st.sampled_from(["config.json", "weights-*", "items-*"]))
    flip = data.draw(st.integers(1, 255))

    def change(content):
        place = data.draw(st.integers(0, len(content) - 1))
        return content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]

    folder = damaged(saved, tmp_path, pattern, change)
    header, weights, tokens = read_folder(saved)
    try:
        found = read_folder(folder)
    except CompressionError:
        return
    assert found[0] == header  # white space in config.json is all that may differ
    assert found[2] == tokens
    assert all(torch.equal(found[1][name], weights[name]) for name in weights)


def test_its_files_may_be_read_by_whom_the_umask_lets(pair, tmp_path):
    before = os.umask(0o027)
    try:
        folder = pair[0].save_pretrained(tmp_path / "small")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("weights", r"weight .*is .*\[14, 4\], but it is .*\[14, 2\]"),
        ("items", "there are 41 tokens for 40 items"),
    ],
)
def test_files_of_two_models_do_not_pass_for_one(saved, trained, tmp_path, kind, match):
    model = small_of(trained, "SASRec", ranks=[16, 2, 1])
    if kind == "items":
        model.add_items(["new"])
    other = model.save_pretrained(tmp_path / "other")
    ours, theirs = (json.loads((f / "config.json").read_bytes())["files"] for f in (saved, other))
    folder = damaged(saved, tmp_path, "config.json", rewritten(files={**ours, kind: theirs[kind]}))
    shutil.copy(other / theirs[kind]["name"], folder)
    with pytest.raises(CompressionError, match=match):
        load_pretrained(folder)


def test_a_folder_without_tokens_is_loaded_too(saved, tmp_path):
    files = json.loads((saved / "config.json").read_bytes())["files"]
    folder = damaged(saved, tmp_path, "config.json", rewritten(files={"weights": files["weights"]}))
    assert load_pretrained(folder).vocabulary is None


@pytest.mark.parametrize(
    ("folder", "match"),
    [
        (__file__, "`folder` to be one that can be written"),
        ("", "`folder` to be a path, but got ''"),
        (7, "`folder` to be a path, but got 7"),
        ("a\0b", "`folder` to be a path"),
    ],
)
def test_a_folder_that_cannot_be_one_is_refused(pair, folder, match):
    with pytest.raises(CompressionError, match=match):
        pair[0].save_pretrained(folder)


def test_nothing_in_a_folder_is_a_pickle(saved):
    assert json.loads((saved / "config.json").read_bytes())["format"] == "cprec_recbole"
    assert "i0" in json.loads(next(saved.glob("items-*")).read_bytes())
    header = next(saved.glob("weights-*")).read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert "blocks" in json.loads(header[8 : 8 + length])  # safetensors: JSON, then numbers


def test_an_uncompressed_model_is_kept_too(trained, tmp_path):
    small = compress(trained["NextItNet"], CompressionConfig.uncompressed())
    assert same(small, load_pretrained(small.save_pretrained(tmp_path)))


OF_0_1 = Path(__file__).parent / "folder-0.1"  # written by version 0.1; SASRec, untied tree, int8


@pytest.fixture
def of_0_1(tmp_path):
    """A copy: the first answer keeps a graph beside the model."""
    return shutil.copytree(OF_0_1, tmp_path / "of-0.1")


def test_a_folder_of_version_0_1_is_loaded_and_written_again_as_it_was(of_0_1, tmp_path):
    model = load_pretrained(of_0_1)
    best = model.recommend_tokens([["i1", "i5", "i3"], ["i7"]], k=5)
    assert best.tokens == [["i0", "i1", "i2", "i3", "i5"]] * 2
    expected = torch.tensor(
        [
            [-1.34522, -2.35019, -2.37186, -2.78528, -3.12759],
            [-1.33251, -2.33661, -2.35677, -2.77259, -3.11555],
        ]
    )
    torch.testing.assert_close(best.scores, expected, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (OF_0_1 / "config.json").read_bytes()


def test_the_names_of_version_0_1_work_with_a_warning(of_0_1):
    model = load_pretrained(of_0_1)
    for old, new in (("head", "softmax"), ("backbone", "inner"), ("record", "spec")):
        with pytest.warns(DeprecationWarning, match=f"`{old}` is called `{new}`"):
            assert getattr(model, old) is getattr(model, new)
    state = {
        name.replace("inner.", "backbone.").replace("softmax.", "head."): value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    with pytest.warns(DeprecationWarning, match="`Backbone` is called `ModelSpec`"):
        old = cprec_recbole.Backbone
    spec = model.spec
    made = old(host=spec.model_class, group=2, size_option="n", table_std=len, architecture=())
    assert (made.model_class, made.layers_per_block) == (spec.model_class, 2)


def test_tokens_of_any_text_come_back(tmp_path):
    """They are read in pieces, which must not be cut within a token."""
    ends = ('","', "\\", '\\","', '"', ",", '\\"', "é", '","' * 9, "\\\\")
    tokens = [f"{i}{end}" for i in range(3_000) for end in ends]
    model = catalogue_model(CpSASRec, len(tokens) + 1)
    model.save_pretrained(tmp_path, tokens)
    assert list(load_pretrained(tmp_path).known_vocabulary().tokens) == tokens
