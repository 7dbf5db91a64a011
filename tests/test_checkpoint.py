"""RecBole's checkpoints as torch.load reads them, and files that want more than to be read."""

import copy
import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recbole.utils import EvaluatorType, get_model, get_trainer

from cprec_recbole import CompressionError
from cprec_recbole.host.checkpoint import read_checkpoint

DAMAGED = "damaged or not RecBole's: "
DTYPES = "float64 float32 float16 bfloat16 complex64 complex128 int64 int32 int16 int8 uint8 bool"


def trained(world, name, folder, **options):
    """The file that RecBole's trainer writes after an epoch."""
    config = world.config(name, checkpoint_dir=str(folder), state="ERROR", **options)
    train, valid, _ = world.loaders(config)
    model = get_model(name)(config, train._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
    trainer.fit(train, valid, saved=True, verbose=False)
    return trainer.saved_model_file


def trusted(file):
    """What torch makes of a file."""
    return torch.load(file, weights_only=False)


def assert_same_tensors(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride())
        assert found[name].device.type == "cpu"


def assert_same(found, expected):
    assert_same_tensors(found.state, expected.state)
    assert found._replace(state={}) == expected._replace(state={})


def refuses(file, message=DAMAGED):
    """Check that a file is refused, and return the message."""
    with pytest.raises(CompressionError, match=message) as error:
        read_checkpoint(file)
    return str(error.value)


def rewritten(source, target, changes, **options):
    """A copy of a zip with other parts; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        root = old.namelist()[0].removesuffix("data.pkl")
        parts = {name.removeprefix(root): old.read(name) for name in old.namelist()}
        for name, data in {**parts, **changes}.items():
            if data is not None:
                new.writestr(root + name, data)
    return target


def pickle_of(source):
    with zipfile.ZipFile(source) as archive:
        return archive.read(archive.namelist()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def contents(world):
    """What a checkpoint holds, but of a small model."""
    weights = torch.arange(6.0).view(2, 3)
    return {
        "config": world.config("SASRec"),
        "epoch": 3,
        "best_valid_score": np.float64(0.25),
        "state_dict": OrderedDict(weight=weights, ids=torch.tensor([3, 1, 2])),
        "other_parameter": {},
        "optimizer": {"state": {0: {"exp_avg": weights / 2}}, "param_groups": [{"lr": 0.1}]},
    }


@pytest.fixture(scope="module")
def good(contents, folder):
    torch.save(contents, folder / "good.pth", pickle_protocol=4)
    return folder / "good.pth"


@pytest.fixture
def saved(contents, folder):
    """Saves the contents with changes, and returns the file."""

    def save(protocol=4, **changes):
        torch.save({**contents, **changes}, folder / "changed.pth", pickle_protocol=protocol)
        return folder / "changed.pth"

    return save


def with_options(contents, **options):
    config = pickle.loads(pickle.dumps(contents["config"]))
    config.final_config_dict.update(options)
    return config


ADAPTED = {"enable_amp": True, "topk": [1, 10], "learner": "sgd", "valid_metric": "MRR@10"}
LEARNERS = [("NextItNet", {"learner": "rmsprop"}), ("CpGRU4Rec", {}), ("GRU4Rec", ADAPTED)]


@pytest.mark.parametrize(("name", "options"), LEARNERS)
def test_it_is_what_torch_reads(world, tmp_path, name, options):
    file = trained(world, name, tmp_path, **options)
    found, expected = read_checkpoint(file), trusted(file)
    final = expected["config"].final_config_dict
    left_out = {"MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "device"}
    assert (found.model, found.dataset, found.epoch) == (name, world.name, expected["epoch"])
    assert found.options == {key: final[key] for key in final if key not in left_out}
    assert {key: found.options[key] for key in options} == options
    assert_same_tensors(found.state, expected["state_dict"])
    again = get_model(name)(expected["config"], world.loaders(expected["config"])[0]._dataset)
    again.load_state_dict(found.state)


@pytest.mark.parametrize("protocol", [2, 5])
def test_every_dtype_and_view_is_read_and_tensors_share_memory(saved, protocol):
    table = torch.arange(24.0).view(4, 6)
    state = OrderedDict(
        {name: torch.tensor([0, 1, 2]).to(getattr(torch, name)) for name in DTYPES.split()},
        table=table,
        turned=table.T,
        some=table[1:3, ::2],
        one=table[2, 3],
        none=table[:0],
        nothing=torch.empty(0, 3),
        parameter=torch.nn.Parameter(torch.ones(2)),
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    file = saved(protocol, state_dict=state, best_valid_score=np.float64(-np.inf))
    found = read_checkpoint(file).state
    assert_same_tensors(found, trusted(file)["state_dict"])
    found["table"][1, 0] = -1.0
    assert found["turned"][0, 1] == found["some"][0, 0] == -1.0
    assert not any(tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("protocol", [2, 4])
def test_options_are_plain_values_numpys_numbers_and_the_text_of_paths(contents, saved, protocol):
    plain = {"model": "SASRec", "dataset": "d", "ordered": OrderedDict(first=1), "big": 2**70}
    plain["deep"] = [1, (2.5, None), {"b": "c", 3: True}]
    numbers = {"f8": np.float64(0.1), "i8": np.int64(-3), "u1": np.uint8(200), "b1": np.bool_(True)}
    others = {"device": torch.device("cuda", 1), "kind": type(contents["config"])}
    others |= {"tensor": torch.ones(1), "enums": {"a": [EvaluatorType.VALUE]}, 7: "no name"}
    config = with_options(contents)
    paths = {"data_path": Path("/data") / "here", "checkpoint_dir": PureWindowsPath("saved/x")}
    config.final_config_dict = {**plain, **numbers, **paths, **others, "dtype": np.dtype(">f4")}
    found = read_checkpoint(saved(protocol, config=config)).options
    texts = {"data_path": "/data/here", "checkpoint_dir": "saved/x"}
    assert found == {**plain, **numbers, **texts}
    assert {type(found[name]) for name in numbers} == {float, int, bool}


def test_an_enum_as_python_3_11_2_writes_it(contents, saved, monkeypatch):
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(EvaluatorType, "__reduce_ex__", by_name)
    file = saved()
    assert b"getattr" in pickle_of(file)
    assert_same_tensors(read_checkpoint(file).state, contents["state_dict"])


def test_a_path_or_a_text_and_a_file_of_older_torch_without_its_byte_order(good, folder):
    old = rewritten(good, folder / "old.pth", {"byteorder": None, ".format_version": None})
    for file in (str(good), old):
        assert_same(read_checkpoint(file), read_checkpoint(good))


class Stored:
    """A storage, as its persistent id."""

    def __init__(self, length, key="0", location="cpu", kind=torch.FloatStorage):
        self.pid = ("storage", kind, key, location, length)


class Calls:
    """Calls a function where it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, part):
        return part.pid if isinstance(part, Stored) else None


def described(good, target, *arguments):
    """A checkpoint of one tensor that is described by hand, over six numbers."""
    tensor = Calls(torch._utils._rebuild_tensor_v2, *arguments, False, OrderedDict())
    buffer = io.BytesIO()
    Pickler(buffer, 4).dump({**trusted(good), "state_dict": {"w": tensor}, "optimizer": None})
    numbers = np.arange(6, dtype="<f4").tobytes()
    return rewritten(good, target, {"data.pkl": buffer.getvalue(), "data/0": numbers})


def test_a_tensor_of_a_gpu_comes_to_the_cpu(good, folder):
    file = described(good, folder / "gpu.pth", Stored(6, location="cuda:1"), 1, (2, 2), (3, 1))
    expected = {"w": torch.arange(6.0).view(2, 3)[:, 1:]}
    assert_same_tensors(read_checkpoint(file).state, expected)


@pytest.mark.parametrize(
    ("storage", "offset", "size", "stride"),
    [
        (Stored(6), 4, (3,), (1,)),
        (Stored(6), -1, (2,), (1,)),
        (Stored(6), 3, (2,), (-1,)),
        (Stored(6), 0, (-2, -3), (3, 1)),
        (Stored(6), 0, (10**12,), (0,)),
        (Stored(6), 0, "6", "1"),
        ("storage", 0, (6,), (1,)),
        (Stored(-6), 0, (6,), (1,)),
        (Stored(6, key="../0"), 0, (6,), (1,)),
        (Stored(6, kind=OrderedDict), 0, (6,), (1,)),
        (Stored(6, kind=torch.DoubleStorage), 0, (6,), (1,)),
    ],
)
def test_a_tensor_lies_within_its_storage_and_that_within_the_file(
    good, folder, storage, offset, size, stride
):
    refuses(described(good, folder / "outside.pth", storage, offset, size, stride))


# hostile files


def test_code_is_refused_by_name_and_not_run(contents, saved, tmp_path):
    marker = tmp_path / "ran"
    asks = Calls(eval, f"open({str(marker)!r}, 'w').close()")
    for place in (
        {"config": asks},
        {"state_dict": OrderedDict(contents["state_dict"], more=asks)},
        {"optimizer": {"state": [asks]}},
        {"config": with_options(contents, metrics=[asks])},
        {"other_parameter": {asks: 1}},
    ):
        file = saved(**place)
        assert refuses(file, "asks for") == (
            f"Expected `checkpoint` to hold what RecBole writes, but {file} asks for "
            "builtins.eval; it was not run. Do not trust this file."
        )
        assert not marker.exists()
        trusted(file)
        marker.unlink()  # it would have run


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(name):
    module, _, last = name.rpartition(".")
    return text(module) + text(last) + b"\x93"


def attack(good, folder, opcodes):
    """A good file in which something happens first."""
    pickled = pickle_of(good)
    body = pickled[2 + 9 :]  # without its protocol and its frame
    return rewritten(good, folder / "attack.pth", {"data.pkl": pickled[:2] + opcodes + body})


UNLISTED = """
    os.system torch.load builtins.getattr _codecs.decode collections.OrderedDict.fromkeys this.s
    torch.storage._load_from_bytes recbole.config.configurator.os
    recbole.modelling.Evil cprec_recbole.modelsx.Cp numpy._core.multiarray._reconstruct
"""


@pytest.mark.parametrize("name", UNLISTED.split())
def test_a_name_that_is_not_on_the_list_is_refused(good, folder, tmp_path, name):
    module, _, last = name.rpartition(".")
    for asked in (named(name), f"c{module}\n{last}\n".encode()):  # of protocols 4 and 2
        call = asked + text(f"echo > {tmp_path / 'ran'}") + text("upper") + b"\x86R"
        refuses(attack(good, folder, call), f" asks for {name}; it was not run")
    assert not (tmp_path / "ran").exists()
    assert "this" not in sys.modules


@pytest.mark.parametrize("name", ["recbole.model.no_such.Model", "cprec_recbole.models.np"])
def test_a_model_is_a_name_and_no_more(good, folder, name):
    called = named(name) + named(name) + text("x") + b"\x85R"
    assert_same(read_checkpoint(attack(good, folder, called)), read_checkpoint(good))
    assert "recbole.model.no_such" not in sys.modules


def test_a_name_is_shown_on_one_line_and_not_at_length(good, folder):
    said = refuses(attack(good, folder, named("evil\x1b[2J\n" + 240 * "x" + ".y")), "asks for")
    assert said.isprintable()
    assert 150 * "x" not in said


LISTED = """
    builtins.getattr collections.OrderedDict numpy.dtype torch.device numpy._core.multiarray.scalar
    recbole.config.configurator.Config recbole.model.x.SASRec torch._utils._rebuild_parameter
"""
ATTRIBUTES = ["__call__", "__class__", "__setstate__", "__dict__", "name", "arguments"]


@pytest.mark.parametrize("name", LISTED.split())
def test_a_file_changes_nothing_for_the_next_one(good, folder, name):
    before = read_checkpoint(good)
    state = b"}" + b"".join(text(each) + named("torch.device") + b"s" for each in ATTRIBUTES)
    for call in (b"", b")R", b")\x81", text("cpu") + b"\x85R"):
        for each in (state, b"N" + state + b"\x86"):  # of the object, and of its slots
            file = attack(good, folder, named(name) + call + each + b"b")
            with suppress(CompressionError):
                assert_same(read_checkpoint(file), before)
            assert_same(read_checkpoint(good), before)


LENGTH = b"\x00\x00\x00\x00\x0f\x00\x00\x00"  # 64 GiB
DEVICE, SCALAR = named("torch.device"), named("numpy._core.multiarray.scalar")
MISUSES = {
    "memo index": b"Nr\xff\xff\xff\xff",  # the unpickler makes room for so many
    "bytes": b"\x8e" + LENGTH,
    "bytearray": b"\x96" + LENGTH,
    "item of a stand-in": DEVICE + text("x") + b"Ns",
    "object of a function": DEVICE + b")\x81",
    "number of a text": SCALAR + text("f8") + b"C\x01x\x86R",
    "number of an object": SCALAR + named("numpy.dtype") + text("O8") + b"\x85RC\x01x\x86R",
    "state of a text": text("f8") + b"}" + text("x") + b"Nsb",
    "extension": b"\x82\x01",
    "no opcode": b"\xff",
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misused_opcodes_are_refused(good, folder, misuse):
    refuses(attack(good, folder, MISUSES[misuse]), "numpy.dtype|" + DAMAGED)


def test_an_option_without_an_end_is_left_out(contents, saved):
    doubled, own = [0], []
    own.append(own)
    for _ in range(60):
        doubled = [doubled, doubled]
    found = read_checkpoint(saved(config=with_options(contents, x=doubled, y=own, z=[[1]])))
    assert found.options["z"] == [[1]]
    assert not {"x", "y"} & set(found.options)


# damaged files, and others


def flipped(data, original, flips):
    changed = bytearray(original)
    for flip in flips:
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= flip
    return bytes(changed)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.lists(st.integers(1, 255), min_size=1, max_size=3))
def test_flipped_bytes_are_noticed_or_do_not_matter(good, folder, data, flips):
    file = folder / "flipped.pth"
    file.write_bytes(flipped(data, good.read_bytes(), flips[:1]))
    with suppress(CompressionError):
        assert_same(read_checkpoint(file), read_checkpoint(good))
    pickled = flipped(data, pickle_of(good), flips)  # of which the zip knows nothing
    with suppress(CompressionError):
        read_checkpoint(rewritten(good, file, {"data.pkl": pickled}))


def test_a_truncated_file(good, folder):
    file, whole = folder / "short.pth", good.read_bytes()
    for size in (0, len(whole) - 1):
        file.write_bytes(whole[:size])
        refuses(file, rf"but .*short\.pth is {DAMAGED}")


def test_a_zip_that_torch_did_not_write(good, folder):
    for name, part, reason in (
        ("data.pkl", None, "it holds no data.pkl"),
        ("constants.pkl", b"x", "it is a TorchScript archive"),
        ("byteorder", b"big", "its numbers are not little-endian"),
        ("data/0", None, "a storage of it is missing"),
        ("data/1", b"four", "a storage of it is missing, or has another size"),
        ("data.pkl", b"\x80\x04}", "ValueError: pickle exhausted"),
    ):
        refuses(rewritten(good, folder / "other.pth", {name: part}), DAMAGED + reason)


def test_a_zip_that_unpacks_to_more_than_it_has(good, folder):
    file, zeros = folder / "packed.pth", {"data/0": bytes(100_000)}
    overlap = "it is compressed, or its entries overlap"
    refuses(rewritten(good, file, zeros, compression=zipfile.ZIP_DEFLATED), overlap)
    for again in ("a/data/0", "a/data/1"):  # one name, or one place in the file, twice
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", b"N.")
            archive.writestr("a/data/0", bytes(1000))
            twice = copy.copy(archive.getinfo("a/data/0"))
            twice.filename = again
            archive.filelist.append(twice)
        refuses(file, overlap)


def test_a_checkpoint_that_is_not_of_recbole(contents, saved):
    no_part = {"config": None, "state_dict": [torch.ones(1)], "epoch": 1.0}
    for name, value in [*no_part.items(), ("config", with_options(contents, model=1))]:
        refuses(saved(**{name: value}), f"{DAMAGED}it lacks a config, a state_dict or an epoch")
    for state in ({"w": 1.0}, {1: torch.ones(1)}):
        refuses(saved(state_dict=state), f"{DAMAGED}its state_dict holds what is no tensor")


def test_files_of_other_kinds(contents, folder):
    legacy, table = folder / "legacy.pth", folder / "table.pth"
    torch.save(contents, legacy, _use_new_zipfile_serialization=False)
    torch.save(contents["state_dict"], table)
    for file in (legacy, table):
        refuses(file)
    for file in (folder, folder / "missing.pth", os.devnull):
        refuses(file, r"to be a file that can be read, but .* is none")
