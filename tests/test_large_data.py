"""Reading and splitting without an object for each row: the same as RecBole's own."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from recbole.data.dataset import SequentialDataset

from cprec_recbole import CompressionError
from cprec_recbole.compression.histories import histories_of
from cprec_recbole.data import NEXT_ITEMS
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.data.windows import PositionsDataLoader
from cprec_recbole.host import data
from tests.builders import World
from tests.oracles import StockDataset, windows
from tests.test_memory import STATUS
from tests.test_sequences import all_windows, assert_same_rows, rows

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
SPLITS = [
    ({"LS": "valid_and_test"}, "user"),
    ({"LS": "valid_only"}, "user"),
    ({"LS": "test_only"}, "user"),
    ({"RS": [5, 3, 2]}, "user"),
    ({"RS": [0.5, 0.25, 0.25]}, "none"),
    ({"TS": [0.7, 0.1, 0.2]}, "user"),
]
FILTERS = [
    {},
    {"user_inter_num_interval": "[1,1];[3,9]", "item_inter_num_interval": "[2,inf)"},
    {"rm_dup_inter": "first", "val_interval": {"timestamp": "[2,inf)"}},
    {"val_interval": {"item_id": ["1", "01", "b"]}},
]

tokens = st.sampled_from(["a", "b", "1", "01", "1.0", "-3", "1e3", "NA", "", " ", "ä", "[PAD]"])
times = st.sampled_from(["1", "2", "2", "3.5", "-1", "1e3", "", "1500000000", "1500000001"])
interaction = st.tuples(tokens, tokens, times).map("\t".join)
# users of few items, in any order, many at the same time
few = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdefgh"), st.integers(0, 5)),
    min_size=4,
    max_size=60,
).map(lambda rows: ["\t".join(map(str, row)) for row in rows])
several = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> World:
    """A data set whose file the tests write anew."""
    world = World(str(tmp_path_factory.mktemp("written")))
    (Path(world.data_path) / world.name).mkdir()
    return world


def write(world, text, suffix="inter"):
    path = Path(world.data_path) / world.name / f"{world.name}.{suffix}"
    path.write_bytes(text.encode())
    return path


def both(config):
    """RecBole's data set and ours out of the same file; None and None where both refuse it."""
    try:
        stock = StockDataset(config)
    except Exception as error:  # whatever RecBole or pandas makes of it
        with pytest.raises(type(error)):
            SequentialDataset(config)
        return None, None
    return stock, SequentialDataset(config)


def assert_same_data(stock, ours):
    for feat in ("inter_feat", "user_feat", "item_feat"):
        a, b = getattr(stock, feat), getattr(ours, feat)
        assert (a is None) == (b is None)
        if a is not None:
            assert list(a) == list(b)
            assert list(a.index) == list(b.index)
            for column in a:
                assert [str(x) for x in a[column]] == [str(x) for x in b[column]], column
    assert list(stock.field2id_token) == list(ours.field2id_token)
    for field, names in stock.field2id_token.items():
        assert names.dtype == ours.field2id_token[field].dtype
        assert names.tolist() == ours.field2id_token[field].tolist()
        assert stock.field2token_id[field] == ours.field2token_id[field]
    for properties in ("field2type", "field2source", "field2seqlen", "field2bucketnum"):
        assert list(getattr(stock, properties).items()) == list(getattr(ours, properties).items())


@several
@given(st.lists(interaction, min_size=1, max_size=30), st.sampled_from(FILTERS))
def test_a_file_gives_recboles_ids_and_tokens(folder, lines, options):
    write(folder, HEADER + "\n".join(lines))
    stock, ours = both(folder.config("CpSASRec", **options))
    if stock is not None:
        assert_same_data(stock, ours)


@several
@example("u\t1\t2\t\n", "")  # what the parsers of pandas differ over
@example('"u\t1\t2', "\n")
@example("u\t1\r\t2", "\n")
@example("u\t1\0\t2", "\n")
@given(st.text('a1\t\n\r" ,.\0', max_size=40), st.sampled_from(["", "\n", "\r\n"]))
def test_a_file_of_anything_is_read_as_recbole_reads_it(folder, text, end):
    write(folder, HEADER + "u\ti\t1\n" + text + end)
    with mock.patch.object(data, "_BYTES", 8):
        stock, ours = both(folder.config("CpSASRec"))
    if stock is not None:
        assert_same_data(stock, ours)


def test_a_plain_file_is_not_read_by_recbole(folder):
    write(folder, HEADER + "u\ti\t1\nu\tj\t2\n")
    config = folder.config("CpSASRec")
    with mock.patch.object(pd, "read_csv", wraps=pd.read_csv) as read:
        dataset = SequentialDataset(config)
    assert [call.kwargs["engine"] for call in read.call_args_list] == ["c"]
    assert (dataset.user_num, dataset.item_num) == (2, 3)  # padding counted


COLUMNS = "shop:token\tuser_id:token\trating:float\titem_id:token\ttimestamp:float\n"
PEOPLE = "user_id:token\tage:float\tsex:token\nw\t3\tf\nu\t\tm\nx\t5\tf\n"
GENRES = "item_id:token\tgenre:token\nk\tg\ni\tg\nj\t\n"
ALL = {"load_col": None}
# options, interactions, and other files
MORE = {
    "no times": ({"load_col": {"inter": ["user_id", "item_id"]}}, "u\ti\t1\nv\tj\t2\nu\tj\t2\n"),
    "more columns": (
        {**ALL, "normalize_all": True},
        COLUMNS + "s\tu\t1\ti\t1\nt\tv\t2.5\tj\t2\n\tu\t\tj\t3\n",
    ),
    "lists": (ALL, HEADER[:-1] + "\ttags:token_seq\nu\ti\t1\ta b\nu\tj\t2\tc\nv\tj\t2\ta\n"),
    "users and items": (
        {**ALL, "user_inter_num_interval": "[2,inf)"},
        "u\ti\t1\nu\tj\t2\nv\tj\t3\nw\tk\t4\nw\ti\t3\n",
        {"user": PEOPLE, "item": GENRES},
    ),
    "two characters": (
        {**ALL, "field_separator": "::"},
        HEADER.replace("\t", "::") + "u::i::1\nv::j::2\nu::j::2\n",
    ),
    "latin": ({"encoding": "latin-1"}, "u\tä\t1\nu\tj\t2\n"),
    "python's number": ({}, "u\ti\t1_0\nu\tj\t2\n"),
}
REFUSED = {
    "twice": ({}, HEADER[:-1] + "\titem_id:token\nu\ti\t1\tj\n"),
    "no number": ({}, "u\ti\tyesterday\n"),
    "no rows": ({}, ""),
    "byte order mark": ({}, "\ufeff" + HEADER + "u\ti\t1\n"),
}


@pytest.mark.parametrize("case", [*MORE, *REFUSED])
def test_beyond_the_plain_case(tmp_path, case):
    options, text, *others = {**MORE, **REFUSED}[case]
    world = World(str(tmp_path))
    (tmp_path / world.name).mkdir()
    write(world, text if ":token" in text else HEADER + text)
    for suffix, other in (others[0] if others else {}).items():
        write(world, other, suffix)
    stock, ours = both(world.config("CpSASRec", **options))
    if case != "lists":  # which RecBole cannot read with pandas 3
        assert (stock is None) == (case in REFUSED)
    if stock is not None:
        assert_same_data(stock, ours)


@pytest.mark.parametrize(("split", "group_by"), SPLITS)
@several
@given(few, st.sampled_from([1, 3, 50]))
def test_splits_are_recboles_own(folder, split, group_by, lines, length):
    write(folder, HEADER + "\n".join(lines))
    options = {
        "MAX_ITEM_LIST_LENGTH": length,
        "eval_args": {"split": split, "group_by": group_by, "order": "TO", "mode": "full"},
        "unused_col": {"inter": ["timestamp"]} if length == 3 else None,
    }
    stock = StockDataset(folder.config("CpSASRec", **options))
    assume(len({line.split("\t")[0] for line in lines}) < len(lines))  # else RecBole has no rows
    expected = stock.build()
    config = folder.config("CpSASRec", **options)
    if not len(expected[0]):
        with pytest.raises(CompressionError, match="training split"):
            SequentialDataset(config).build()
        return
    found = SequentialDataset(config).build()
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected):
        if len(theirs):
            assert_same_rows(ours, theirs)
        assert len(ours) == len(theirs)
    assert_windows_of(PositionsDataLoader(config, found[0], None), expected[0])


def assert_windows_of(loader, prefixes):
    """Every target of RecBole's training rows once, in the windows of its user's history."""
    histories: dict[int, list[int]] = {}
    for user, item, read in zip(
        *(rows(prefixes)[f] for f in ("user_id", "item_id", "item_id_list"))
    ):
        # a user's training rows are the oldest ones, in order of time
        histories.setdefault(int(user), [int(read[0])]).append(int(item))
    batch, train = all_windows(loader), loader._dataset
    found = []
    for user, read, targets, size in zip(
        *(batch[f] for f in ("user_id", "item_id_list", NEXT_ITEMS, "item_length"))
    ):
        assert not read[size:].any()
        assert not targets[size:].any()
        found.append((int(user), read[:size].tolist(), targets[:size].tolist()))
    length = train.max_item_list_len
    assert sorted(found) == sorted(
        (user, *window)
        for user, history in histories.items()
        for window in windows(history, length)
    )
    counts = np.bincount(np.concatenate([*histories.values()]), minlength=train.item_num)
    assert item_counts(train).tolist() == counts.tolist()


@pytest.mark.parametrize("name", ["SASRec", "CpSASRec"])
def test_histories_are_the_same_in_pieces(world, name):
    train = world.loaders(world.config(name))[0]
    whole = histories_of(train, 41, 8)
    with mock.patch.object(sys.modules[histories_of.__module__], "_ROWS", 7):
        pieces = histories_of(train, 41, 8)
    assert torch.equal(pieces.items, whole.items)
    assert torch.equal(pieces.targets, whole.targets)


PREPARE = """
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tests.builders import World
from tests.test_memory import peak_mib

n, rng = 10**6, np.random.default_rng(0)
world = World(sys.argv[1])
(Path(world.data_path) / world.name).mkdir()
names = ("user_id:token", "item_id:token", "timestamp:float")
numbers = rng.integers(20_000, size=n), rng.zipf(1.2, size=n) % 10**6, np.arange(n)
pd.DataFrame(dict(zip(names, numbers))).to_csv(
    Path(world.data_path) / world.name / f"{world.name}.inter", sep="\t", index=False
)
del numbers
config = world.config("CpSASRec", MAX_ITEM_LIST_LENGTH=50)
used = peak_mib(lambda: world.loaders(config))
print(round(used))
assert used < 250, used
"""


@pytest.mark.skipif(not STATUS.exists(), reason="reads the peak from Linux's /proc")
def test_a_million_interactions_take_little_memory(tmp_path):
    """A tenth of what the issue allows for ten million: 2 GiB, or 200 MiB for each million, and
    what does not grow with them."""
    child = subprocess.run(
        [sys.executable, "-c", PREPARE, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
