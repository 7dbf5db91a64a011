"""RecBole's checkpoints as torch.load reads them, and files that want more than to be read."""

import copy
import io
import os
import pickle
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recbole.utils import EvaluatorType, get_model, get_trainer

from cprec_recbole import CompressionError
from cprec_recbole.host.checkpoint import read_checkpoint

NAMES = ("NextItNet", "SASRec", "GRU4Rec", "CpGRU4Rec")
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
PROTOCOL, STOP = b"\x80\x04", b"."


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
    assert replace(found, state={}) == replace(expected, state={})


def rewritten(source, target, changes, **options):
    """A copy of a zip with other parts; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        root = old.namelist()[0].removesuffix("data.pkl")
        parts = {name.removeprefix(root): old.read(name) for name in old.namelist()}
        for name, data in {**parts, **changes}.items():
            if data is not None:
                new.writestr(root + name, data)
    return target


def part(source, name):
    with zipfile.ZipFile(source) as archive:
        return archive.read(archive.namelist()[0].replace("data.pkl", name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def contents(world, folder):
    """What a checkpoint holds, but of a small model."""
    weights = torch.arange(6.0).view(2, 3)
    return {
        "config": world.config("SASRec"),
        "epoch": 3,
        "cur_step": 0,
        "best_valid_score": np.float64(0.25),
        "state_dict": OrderedDict(weight=weights, ids=torch.tensor([3, 1, 2])),
        "other_parameter": {},
        "optimizer": {"state": {0: {"exp_avg": weights / 2}}, "param_groups": [{"lr": 0.1}]},
    }


@pytest.fixture(scope="module")
def good(contents, folder):
    file = folder / "good.pth"
    torch.save(contents, file, pickle_protocol=4)
    return file


def saved(contents, folder, **changes):
    file = folder / "changed.pth"
    torch.save({**contents, **changes}, file, pickle_protocol=4)
    return file


def with_options(contents, **options):
    config = pickle.loads(pickle.dumps(contents["config"]))
    config.final_config_dict.update(options)
    return {"config": config}


# what is read


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_torch_reads(world, tmp_path, name):
    file = trained(world, name, tmp_path)
    found, expected = read_checkpoint(file), trusted(file)
    final = expected["config"].final_config_dict
    left_out = {"MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "device"}
    assert (found.model, found.dataset, found.epoch) == (name, world.name, expected["epoch"])
    assert found.options == {key: final[key] for key in final if key not in left_out}
    assert_same_tensors(found.state, expected["state_dict"])
    again = get_model(name)(expected["config"], world.loaders(expected["config"])[0]._dataset)
    again.load_state_dict(found.state)


@pytest.mark.parametrize("learner", ["sgd", "adagrad", "rmsprop"])
def test_of_other_optimizers_too(world, tmp_path, learner):
    metrics = ["Recall", "MRR", "Precision"]
    options = {"learner": learner, "metrics": metrics, "topk": [1, 10], "enable_amp": True}
    file = trained(world, "GRU4Rec", tmp_path, **options)
    found = read_checkpoint(file)
    assert {key: found.options[key] for key in options} == options
    assert_same_tensors(found.state, trusted(file)["state_dict"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_kind_of_number_and_of_view(contents, folder, protocol):
    table = torch.arange(24.0).view(4, 6)
    state = OrderedDict(
        {f"{dtype}": torch.tensor([0, 1, 2]).to(dtype) for dtype in DTYPES},
        table=table,
        turned=table.T,
        some=table[1:3, ::2],
        one=table[2, 3],
        none=table[:0],
        nothing=torch.empty(0, 3),
        parameter=torch.nn.Parameter(torch.ones(2)),
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    file = folder / "kinds.pth"
    changed = {**contents, "state_dict": state, "best_valid_score": np.float64(-np.inf)}
    torch.save(changed, file, pickle_protocol=protocol)
    found = read_checkpoint(file).state
    assert_same_tensors(found, trusted(file)["state_dict"])
    found["table"][1, 0] = -1.0
    assert found["turned"][0, 1] == found["some"][0, 0] == -1.0
    assert not any(tensor.requires_grad for tensor in found.values())


def test_a_path_is_its_text(contents, folder):
    """As RecBole takes one for data_path."""
    options = {"data_path": Path("/data") / "here", "checkpoint_dir": PureWindowsPath("saved/x")}
    found = read_checkpoint(saved(contents, folder, **with_options(contents, **options)))
    assert found.options["data_path"] == "/data/here"
    assert found.options["checkpoint_dir"] == "saved/x"


def test_options_are_plain_values_and_numpys_numbers(contents, folder):
    plain = {
        "a": [1, (2.5, None), {"b": "c", 3: True}],
        "big": 2**70,
        "none": float("inf"),
        "ordered": OrderedDict(first=1),
    }
    numbers = {
        "f8": np.float64(0.1),
        "f4": np.float32(0.25),
        "i8": np.int64(-3),
        "u1": np.uint8(200),
        "b1": np.bool_(True),
    }
    others = {
        "device": torch.device("cuda", 1),
        "enums": [EvaluatorType.RANKING],
        "model": "SASRec",
        "kind": type(contents["config"]),
        "tensor": torch.ones(1),
        "deep": {"a": [EvaluatorType.VALUE]},
        "dtype": np.dtype("f4"),
        "bytes": b"x",
        7: "a name that is none",
    }
    config = with_options(contents)["config"]
    config.final_config_dict = {"dataset": "d", **plain, **numbers, **others}
    found = read_checkpoint(saved(contents, folder, config=config)).options
    assert found == {"dataset": "d", "model": "SASRec", **plain, **numbers}
    assert {type(found[name]) for name in numbers} == {float, int, bool}
    assert type(found["ordered"]) is dict


def test_an_enum_as_python_3_11_2_writes_it(contents, folder, monkeypatch):
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(EvaluatorType, "__reduce_ex__", by_name)
    file = saved(contents, folder)
    assert b"getattr" in part(file, "data.pkl")
    assert_same_tensors(read_checkpoint(file).state, contents["state_dict"])


def test_paths_of_either_kind(good):
    assert_same(read_checkpoint(str(good)), read_checkpoint(good))


def test_a_file_without_a_byte_order_is_little_endian(good, folder):
    file = rewritten(good, folder / "old.pth", {"byteorder": None, ".format_version": None})
    assert_same(read_checkpoint(file), read_checkpoint(good))


# pickles by hand


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name_of(name):
    module, _, last = name.rpartition(".")
    return text(module) + text(last) + b"\x93"


def attack(good, target, opcodes):
    """A good file in which something happens first."""
    pickled = part(good, "data.pkl")
    body = pickled[2 + 9 :]  # without its protocol and its frame
    return rewritten(good, target, {"data.pkl": pickled[:2] + opcodes + body})


class Stored:
    """A storage, as its persistent id."""

    def __init__(self, length, key="0", location="cpu", kind=torch.FloatStorage):
        self.pid = ("storage", kind, key, location, length)


class Described:
    """A tensor, as the arguments it is rebuilt from."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def described(good, target, arguments, **parts):
    """A checkpoint of one tensor that is described by hand."""
    contents = {**trusted(good), "state_dict": {"w": Described(*arguments)}, "optimizer": None}
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 4)
    pickler.persistent_id = lambda part: part.pid if isinstance(part, Stored) else None
    pickler.dump(contents)
    parts = {"data/0": np.arange(6, dtype="<f4").tobytes(), **parts}
    return rewritten(good, target, {"data.pkl": buffer.getvalue(), **parts})


def test_a_tensor_of_a_gpu_comes_to_the_cpu(good, folder):
    arguments = (Stored(6, location="cuda:1"), 1, (2, 2), (3, 1), False, OrderedDict())
    found = read_checkpoint(described(good, folder / "gpu.pth", arguments)).state
    assert_same_tensors(found, {"w": torch.arange(6.0).view(2, 3)[:, 1:]})


@pytest.mark.parametrize(
    "arguments",
    [
        (Stored(6), 0, (7,), (1,), False, {}),
        (Stored(6), 4, (3,), (1,), False, {}),
        (Stored(6), 0, (2, 3), (4, 1), False, {}),
        (Stored(6), -1, (2,), (1,), False, {}),
        (Stored(6), 3, (2,), (-1,), False, {}),
        (Stored(6), 0, (-2, -3), (3, 1), False, {}),
        (Stored(6), 7, (0,), (1,), False, {}),
        (Stored(6), 0, (10**12,), (0,), False, {}),
        (Stored(6), 0, (2**62, 2**62, 0), (1, 1, 2**80), False, {}),
        (Stored(6), 0, (2, 3), (3,), False, {}),
        (Stored(6), 0, (1,) * 10_000, (1,) * 10_000, False, {}),
        (Stored(6), 0.0, (6,), (1,), False, {}),
        (Stored(6), 0, "6", "1", False, {}),
        (Stored(6), 0, 6, 1, False, {}),
        (Stored(6), 0, (6,), (1,), False, {}, {"conj": True}),
        (Stored(6), 0),
        ("storage", 0, (6,), (1,), False, {}),
        (Stored(5), 0, (5,), (1,), False, {}),
        (Stored(7), 0, (6,), (1,), False, {}),
        (Stored(2**61), 0, (6,), (1,), False, {}),
        (Stored(-6), 0, (6,), (1,), False, {}),
        (Stored(6, key="../0"), 0, (6,), (1,), False, {}),
        (Stored(6, key="1000"), 0, (6,), (1,), False, {}),
        (Stored(6, key=0), 0, (6,), (1,), False, {}),
        (Stored(6, kind=OrderedDict), 0, (6,), (1,), False, {}),
        (Stored(6, kind=torch.DoubleStorage), 0, (6,), (1,), False, {}),
    ],
)
def test_a_tensor_lies_within_its_storage_and_that_within_the_file(good, folder, arguments):
    with pytest.raises(CompressionError, match="damaged or not RecBole's: "):
        read_checkpoint(described(good, folder / "outside.pth", arguments))


# files that ask for code


class Asks:
    """Calls a function where it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["config", "state_dict", "optimizer", "epoch", "option", "key"])
@pytest.mark.parametrize("function", [os.system, eval], ids=["system", "eval"])
def test_code_is_refused_by_name_and_not_run(contents, folder, tmp_path, place, function):
    marker = tmp_path / "ran"
    code = f"echo > {marker}" if function is os.system else f"open({str(marker)!r}, 'w').close()"
    asks = Asks(function, code)
    changes = {
        "config": {"config": asks},
        "state_dict": {"state_dict": OrderedDict(contents["state_dict"], more=asks)},
        "optimizer": {"optimizer": {"state": [asks]}},
        "epoch": {"epoch": asks},
        "option": with_options(contents, metrics=[asks]),
        "key": {"other_parameter": {asks: 1}},
    }
    file = saved(contents, folder, **changes[place])
    asked = f"{function.__module__}.{function.__name__}"
    with pytest.raises(CompressionError) as error:
        read_checkpoint(file)
    assert str(error.value) == (
        f"Expected `checkpoint` to hold what RecBole writes, but {file} asks for {asked}; it was "
        "not run. Do not trust this file."
    )
    assert not marker.exists()
    trusted(file)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "posix.system", "subprocess.Popen", "torch.load", "torch.hub.load"),
        *(
            "builtins.eval",
            "builtins.exec",
            "builtins.getattr",
            "builtins.open",
            "__builtin__.eval",
        ),
        *("pickle.loads", "importlib.import_module", "_codecs.decode", "numpy.load"),
        *("collections.OrderedDict.fromkeys", "torch._utils._rebuild_tensor_v3", "torch.Storage"),
        *("torch.storage._load_from_bytes", "recbole.quick_start.run_recbole", "numpy.ndarray"),
        *("recbole.config.configurator.os", "recbole.modelling.Evil", "cprec_recbole.modelsx.Cp"),
        *("cprec_recbole.models.os.system", "recbole.config.configurator.Config.__init__"),
    ],
)
def test_every_name_that_is_not_on_the_list_is_refused(good, folder, tmp_path, name):
    marker = tmp_path / "ran"
    call = name_of(name) + text(f"echo > {marker}") + text("upper") + b"\x86R"
    with pytest.raises(CompressionError) as error:
        read_checkpoint(attack(good, folder / "attack.pth", call))
    assert f" asks for {name}; it was not run" in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("opcodes", [b"cthis\ns\n", text("this") + text("s") + b"\x93"])
def test_nothing_is_imported(good, folder, opcodes):
    with pytest.raises(CompressionError, match=r"asks for this\.s;"):
        read_checkpoint(attack(good, folder / "attack.pth", opcodes))
    assert "this" not in sys.modules


@pytest.mark.parametrize("name", ["recbole.model.no_such.Model", "cprec_recbole.models.np"])
def test_a_model_is_a_name_and_no_more(good, folder, name):
    called = name_of(name) + text("x") + b"\x85R"
    file = attack(good, folder / "attack.pth", name_of(name) + called)
    assert_same(read_checkpoint(file), read_checkpoint(good))
    assert "recbole.model.no_such" not in sys.modules


def test_a_name_is_shown_on_one_line_and_not_at_length(good, folder):
    name = name_of("evil\x1b[2J\n" + 240 * "x" + ".y")
    with pytest.raises(CompressionError) as error:
        read_checkpoint(attack(good, folder / "attack.pth", name))
    assert str(error.value).isprintable()
    assert 150 * "x" not in str(error.value)


def test_numpy_gives_numbers_only(contents, folder):
    file = saved(contents, folder, best_valid_score=np.dtype(object))
    with pytest.raises(CompressionError, match=r"asks for numpy\.dtype\(O8\); it was not run"):
        read_checkpoint(file)
    file = saved(contents, folder, best_valid_score=np.array([None]))
    with pytest.raises(CompressionError, match=r"asks for numpy\._?core\.multiarray\._reconstruct"):
        read_checkpoint(file)
    file = saved(contents, folder, best_valid_score=np.dtype(">f8"))
    with pytest.raises(CompressionError, match="little-endian"):
        read_checkpoint(file)


LISTED = [
    *("builtins.getattr", "collections.OrderedDict", "numpy.dtype", "torch.FloatStorage"),
    *("numpy._core.multiarray.scalar", "recbole.config.configurator.Config", "torch.device"),
    *("recbole.utils.enum_type.ModelType", "recbole.model.sequential_recommender.sasrec.SASRec"),
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
    *("yaml.loader.FullLoader", "cprec_recbole.models.CpSASRec"),
]
EMPTY = b")"
F8 = text("f8") + b"\x89\x88\x87"
RAISES = ["run", "name", "state", "__call__", "__class__", "__setstate__", "__dict__", "append"]


def state(names, slots):
    """Attributes for BUILD to set: from a dict, or one by one as those of slots."""
    values = b"}" + b"".join(text(name) + name_of("torch.device") + b"s" for name in names)
    return b"N" + values + b"\x86" if slots else values


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("name", LISTED)
def test_no_stand_in_takes_attributes(good, folder, name, slots):
    before = read_checkpoint(good)
    file = attack(good, folder / "attack.pth", name_of(name) + state(RAISES, slots) + b"b")
    with pytest.raises(CompressionError, match="not RecBole's"):
        read_checkpoint(file)
    assert_same(read_checkpoint(good), before)


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize(
    ("name", "arguments", "taken"),
    [
        ("collections.OrderedDict", EMPTY, True),  # but dropped
        ("recbole.config.configurator.Config", EMPTY, True),  # but by that one Config
        ("numpy.dtype", F8, False),
        ("torch.device", text("cpu") + b"\x85", False),
        ("recbole.utils.enum_type.ModelType", b"K\x01\x85", False),
    ],
)
def test_nor_does_what_a_stand_in_makes(good, folder, name, arguments, taken, slots):
    before = read_checkpoint(good)
    built = name_of(name) + arguments + b"R" + state(RAISES, slots) + b"b"
    file = attack(good, folder / "attack.pth", built)
    if taken:
        assert_same(read_checkpoint(file), before)
    else:
        with pytest.raises(CompressionError, match="not RecBole's"):
            read_checkpoint(file)
    assert_same(read_checkpoint(good), before)


@pytest.mark.parametrize(
    "opcodes",
    [
        name_of("collections.OrderedDict") + b"]" + text("x") + text("y") + b"\x86a\x85R",
        name_of("recbole.config.configurator.Config") + text("x") + b"\x85\x81",
        name_of("yaml.loader.FullLoader") + text("x") + b"a",
        name_of("yaml.loader.FullLoader") + text("x") + text("y") + b"s",
        name_of("builtins.getattr") + name_of("torch.device") + b"\x85R",
        name_of("numpy._core.multiarray.scalar") + text("f8") + b"C\x08" + 8 * b"x" + b"\x86R",
        name_of("numpy._core.multiarray.scalar") + name_of("numpy.dtype") + F8 + b"RC\x01x\x86R",
        text("f8") + EMPTY + b"R",
        b"K\x01K\x02\x93",
        b"K\x01Q",
        b"ios\nsystem\n",
        b"\x82\x01",
        b"})Ns",
        b"K\x01K\x02a",
        b"}(K\x01u",
        b"h\x63",
        b"t",
        b"b",
        b"R",
        b"0",
    ],
)
def test_other_uses_of_the_list_and_of_the_stack_are_errors(good, folder, opcodes):
    with pytest.raises(CompressionError, match=r"not RecBole's|asks for builtins\.getattr"):
        read_checkpoint(attack(good, folder / "attack.pth", opcodes))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"Nr\xff\xff\xff\xff",  # pickle.Unpickler makes room for so many
        b"\x8e\x00\x00\x00\x00\x0f\x00\x00\x00",  # bytes that are not there
        b"B\xff\xff\xff\xff",
        b"\x95\x00\x00\x00\x00\x0f\x00\x00\x00",
        b"}N" + b"q\x00h\x00\x86" * 60 + b"Ns",  # 2**60 tuples in one another, to be hashed
    ],
)
def test_a_small_file_takes_little(good, folder, opcodes):
    file = rewritten(good, folder / "bomb.pth", {"data.pkl": PROTOCOL + opcodes + STOP})
    tracemalloc.start()
    try:
        with pytest.raises(CompressionError, match="not RecBole's"):
            read_checkpoint(file)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_tuples_so_deep_that_to_hash_one_overflows_the_c_stack(good, folder):
    pickled = PROTOCOL + b"}N" + b"\x85" * 200_000 + b"Ns" + STOP
    with pytest.raises(CompressionError, match="not RecBole's"):
        read_checkpoint(rewritten(good, folder / "deep.pth", {"data.pkl": pickled}))


def test_options_have_an_end(contents, folder):
    doubled, own = [0], []
    own.append(own)
    for _ in range(60):
        doubled = [doubled, doubled]
    for value in (doubled, own):
        with pytest.raises(CompressionError, match="not RecBole's"):
            read_checkpoint(saved(contents, folder, **with_options(contents, x=value)))


# damaged files, and others


def outcome(file):
    """A checkpoint or the words of a CompressionError; any other error is raised."""
    try:
        return read_checkpoint(file), ""
    except CompressionError as error:
        return None, str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(1, 255))
def test_a_flipped_byte_is_noticed_or_does_not_matter(good, folder, data, flip):
    damaged = bytearray(good.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= flip
    file = folder / "flipped.pth"
    file.write_bytes(damaged)
    found, error = outcome(file)
    if error:
        assert error.startswith(f"Expected `checkpoint` to hold what RecBole writes, but {file}")
    else:
        assert_same(found, read_checkpoint(good))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.lists(st.integers(1, 255), min_size=1, max_size=3))
def test_a_wrong_pickle_is_read_or_refused_but_raises_nothing_else(good, folder, data, flips):
    pickled = bytearray(part(good, "data.pkl"))
    for flip in flips:
        pickled[data.draw(st.integers(0, len(pickled) - 1))] ^= flip
    file = rewritten(good, folder / "wrong.pth", {"data.pkl": bytes(pickled)})
    found, error = outcome(file)
    if error:
        assert error.startswith(f"Expected `checkpoint` to hold what RecBole writes, but {file}")
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.state.values())


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.95, 0.999])
def test_a_truncated_file(good, folder, share):
    whole = good.read_bytes()
    file = folder / "short.pth"
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CompressionError, match=r"but .*short\.pth is damaged or not RecBole's: "):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data.pkl": None}, "no data.pkl"),
        ({"constants.pkl": b"x"}, "TorchScript"),
        ({"byteorder": b"big"}, "endian"),
        ({"data/0": None}, "storage of it is missing"),
        ({"data/1": b"four"}, "another size"),
        ({"data.pkl": b""}, "exhausted|stop"),
        ({"data.pkl": b"\x80\x04N."}, "lacks a config"),
        ({"data.pkl": b"\x80\x04}"}, "exhausted|stop"),
    ],
)
def test_a_zip_that_torch_did_not_write(good, folder, changes, reason):
    with pytest.raises(CompressionError, match=f"not RecBole's: .*({reason})"):
        read_checkpoint(rewritten(good, folder / "other.pth", changes))


def test_a_zip_that_unpacks_to_more_than_it_has(good, folder):
    file = rewritten(good, folder / "packed.pth", {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CompressionError, match="compressed"):
        read_checkpoint(file)
    for again in ("a/data/0", "a/data/1"):  # one name, or one place in the file, twice
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", b"N.")
            archive.writestr("a/data/0", bytes(1000))
            twice = copy.copy(archive.getinfo("a/data/0"))
            twice.filename = again
            archive.filelist.append(twice)
        with pytest.raises(CompressionError, match="overlap"):
            read_checkpoint(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": None},
        {"config": {"final_config_dict": {"model": "SASRec", "dataset": "d"}}},
        {"state_dict": None},
        {"state_dict": [torch.ones(1)]},
        {"state_dict": {"w": 1.0}},
        {"state_dict": {"w": torch.ones(1), "more": OrderedDict(w=torch.ones(1))}},
        {"state_dict": {1: torch.ones(1)}},
        {"epoch": None},
        {"epoch": 1.0},
    ],
)
def test_a_checkpoint_that_is_not_of_recbole(contents, folder, changes):
    with pytest.raises(CompressionError, match="not RecBole's: it"):
        read_checkpoint(saved(contents, folder, **changes))


@pytest.mark.parametrize("missing", ["config", "state_dict", "epoch"])
def test_a_checkpoint_without_a_part(contents, folder, missing):
    file = folder / "part.pth"
    rest = {key: value for key, value in contents.items() if key != missing}
    torch.save(rest, file, pickle_protocol=4)
    with pytest.raises(CompressionError, match="lacks a config, a state_dict or an epoch"):
        read_checkpoint(file)


@pytest.mark.parametrize("missing", ["model", "dataset"])
def test_a_config_without_a_name(contents, folder, missing):
    file = saved(contents, folder, **with_options(contents, **{missing: 1}))
    with pytest.raises(CompressionError, match="lacks a config"):
        read_checkpoint(file)


def test_files_of_other_kinds(contents, folder):
    legacy, table, model = folder / "legacy.pth", folder / "table.pth", folder / "model.pth"
    torch.save(contents, legacy, _use_new_zipfile_serialization=False)
    torch.save(contents["state_dict"], table)
    model.write_bytes(b"x" * 1000)
    for file in (legacy, table, model):
        with pytest.raises(CompressionError, match="damaged or not RecBole's: "):
            read_checkpoint(file)
    for file in (folder, folder / "missing.pth", os.devnull):
        with pytest.raises(
            CompressionError, match=r"to be a file that can be read, but .* is none"
        ):
            read_checkpoint(file)
