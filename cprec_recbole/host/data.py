"""What RecBole's data sets need: current pandas, any size, full precision of times; rows and splits
made on arrays. Every split cuts the rows of each group, such as a user, into consecutive runs."""

from __future__ import annotations

import builtins
import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cprec_recbole.config import CompressionError
from cprec_recbole.data.sequences import List, Pointers, SequenceRows, stable_order
from cprec_recbole.data.windows import PositionsDataLoader
from cprec_recbole.host.patching import is_ours, replaces

_SAVED = ("dataset_save_path", "dataloaders_save_path")
_SEPARATORS = "\t,;|"
_BYTES = 2**24  # of a file that are checked together
_NO_TARGETS = (
    "Expected the training split to hold a target with a history before it, but it is empty; "
    "users need at least two interactions, and four to be in every split."
)


@contextmanager
def without_saved_data(config: Any) -> Iterator[None]:
    """Within: RecBole finds no saved data set or loaders. They are pickles, which run what is in
    them, and need not be of the files that are there now."""
    before = {name: config[name] for name in _SAVED}
    config.final_config_dict.update(dict.fromkeys(_SAVED, os.path.join(os.devnull, "none")))
    try:
        yield
    finally:
        config.final_config_dict.update(before)


@replaces(
    "recbole.data.create_dataset",
    "recbole.data.utils.create_dataset",
    "recbole.quick_start.quick_start.create_dataset",
    "recbole.data.utils.load_split_dataloaders",
)
def _unless_stale(original: Callable, config: Any) -> Any:
    # what is saved is not read where it is older than a change of the files
    saved = list(Path(config["checkpoint_dir"]).glob(f"{glob.escape(config['dataset'])}-*.pth"))
    saved += [Path(config[name]) for name in _SAVED if config[name]]
    written = [path.stat().st_mtime_ns for path in saved if path.is_file()]
    folder = Path(config["data_path"])
    files = [folder, *folder.glob("*")]
    links = [each for each in (*files, *folder.parents) if each.is_symlink()]
    seen = [each.stat() for each in files if each.exists()] + [each.lstat() for each in links]
    changed = max((each.st_ctime_ns for each in seen), default=0)
    with without_saved_data(config) if changed >= min(written, default=np.inf) else nullcontext():
        return original(config)


@replaces("recbole.data.utils.save_split_dataloaders")
def _save_split_dataloaders(original: Callable, config: Any, dataloaders: Any) -> None:
    # RecBole takes the generators away to pickle the loaders, and trains with those
    kept = [loader.generator for loader in dataloaders]
    try:
        original(config, dataloaders)
    finally:
        for loader, generator in zip(dataloaders, kept):
            loader.generator = loader.sampler.generator = generator


def read_csv(filepath: str, **options: Any) -> pd.DataFrame:
    """pandas' function as RecBole calls it, for the slow parser in Python; files of tokens and
    floats that the one in C reads alike are read by that."""
    tokens = [name for name in options["dtype"] if name.endswith(":token")]
    floats = [name for name in options["dtype"] if name.endswith(":float")]
    if (
        len(tokens) + len(floats) == len(options["usecols"])
        and options["encoding"] in (None, "utf-8")
        and is_simple(filepath, options["delimiter"])
    ):
        with suppress(ValueError):  # the parser in Python knows a way, or says what is wrong
            frame = pd.read_csv(filepath, **{**options, "engine": "c"})
            return frame.astype(dict.fromkeys(tokens, object))  # RecBole counts them in Python
    frame = pd.read_csv(filepath, **options)
    lists = [name for name in frame if name.endswith("_seq")]
    return frame.fillna(dict.fromkeys(lists, ""))  # RecBole does it in place: not with pandas 3


def is_simple(filepath: str, separator: str) -> bool:
    """Whether both parsers read the same out of a file in UTF-8: they differ over quotes, carriage
    returns within a line, NUL, and rows with more fields than the header."""
    if len(separator) != 1 or separator not in _SEPARATORS:
        return False
    with open(filepath, "rb") as file:
        n_separators = file.readline().count(separator.encode())
        file.seek(0)
        while block := file.read(_BYTES) + file.readline():  # whole lines
            if b'"' in block or b"\0" in block or block.count(b"\r") != block.count(b"\r\n"):
                return False
            text = np.frombuffer(block, dtype=np.uint8)
            ends = np.append(np.flatnonzero(text == ord("\n")), len(text))
            before = np.searchsorted(np.flatnonzero(text == ord(separator)), ends)
            if np.diff(before, prepend=0).max() > n_separators:
                return False
    return True


@replaces(
    "recbole.data.dataset.dataset.len",
    "recbole.data.dataset.kg_dataset.len",
    "recbole.data.dataset.sequential_dataset.len",
)
def _len(original: Callable, found: Any) -> Any:
    # RecBole asks a column of lists for `agg(len)`; pandas 3 hands `len` the whole column
    return found.map(builtins.len) if isinstance(found, pd.Series) else builtins.len(found)


@replaces("recbole.data.dataset.Dataset._fill_nan")
def _fill_nan(original: Callable, self: Any) -> None:
    # RecBole fills a column in place, which changes nothing since pandas 3
    kinds = self.field2type
    for feat_name in self.feat_name_list:
        feat = getattr(self, feat_name)
        fill = {f: 0 for f in feat if kinds[f].name == "TOKEN"}
        fill |= {f: feat[f].mean() for f in feat if kinds[f].name == "FLOAT"}
        setattr(self, feat_name, feat.fillna(fill))
    original(self)


@replaces("recbole.data.dataset.Dataset._change_feat_format")
def _change_feat_format(original: Callable, self: Any) -> None:
    # RecBole makes times float32: those of today lie two minutes apart there. Rows are put into the
    # order of time before; its sort is stable and leaves those that have become equal as they are
    feat, time = self.inter_feat, self.time_field
    is_sequential = hasattr(self, "item_list_length_field")
    by_time = is_sequential or self.config["eval_args"]["order"] == "TO"
    if by_time and self.benchmark_filename_list is None and time in feat:
        times = feat[time].to_numpy()
        if times.dtype == np.float64:
            self.inter_feat = feat.iloc[stable_order(times)].reset_index(drop=True)
    original(self)


@replaces("recbole.data.dataset.Dataset.sort")
def _sort(
    original: Callable, self: Any, by: str | list[str], ascending: bool | list[bool] = True
) -> None:
    names, feat = [by] if isinstance(by, str) else by, self.inter_feat
    ways = [ascending] if isinstance(ascending, bool) else ascending
    ways = ways * len(names) if len(ways) == 1 else ways
    for name in names:
        if name not in feat:
            raise _missing(self, "TIME_FIELD", name)
    for name, is_rising in reversed([*zip(names, ways, strict=True)]):
        key = feat[name] if feat[name].dim() == 1 else feat[name][..., 0]
        order = torch.from_numpy(stable_order(key.numpy()))
        feat._reindex(order if is_rising else order.flip(0))


@replaces("recbole.data.dataset.Dataset._load_inter_feat")
def _load_inter_feat(original: Callable, self: Any, token: str, dataset_path: str) -> None:
    original(self, token, dataset_path)
    for option, name in (("USER_ID_FIELD", self.uid_field), ("ITEM_ID_FIELD", self.iid_field)):
        if name is not None and (self.inter_feat is None or name not in self.inter_feat):
            raise _missing(self, option, name)


def _missing(dataset: Any, option: str, name: str | None) -> CompressionError:
    """The error for interactions without the column that an option names."""
    parts = dataset.benchmark_filename_list or []
    file = ".".join([dataset.dataset_name, *parts[:1], "inter"])
    with open(Path(dataset.dataset_path, file), encoding=dataset.config["encoding"]) as rows:
        header = rows.readline().strip("\ufeff\n")
    columns = [each.split(":")[0] for each in header.split(dataset.config["field_separator"])]
    mend = f"name that column, as in --{option}=NAME"
    if name in columns:
        mend = f"load it, as by --load_col='{{inter: [{', '.join(columns)}]}}'"
    elif option == "TIME_FIELD":
        mend += f", or write one, such as {name or 'timestamp'}:float with the number of each line"
    return CompressionError(
        f"Expected `{option}` to be a column of {file} that is loaded, but got {name}, and it has "
        f"{', '.join(columns)}; {mend}."
    )


@replaces("recbole.data.dataset.SequentialDataset._benchmark_presets")
def _benchmark_presets(original: Callable, self: Any) -> None:
    lists = self.iid_field + self.config["LIST_SUFFIX"]
    if lists not in self.inter_feat:
        raise CompressionError(
            f"Expected the files of `benchmark_filename` to hold {lists}:token_seq, the "
            f"history of each row, but they have {', '.join(self.inter_feat)}; write it, name "
            "it in `load_col`, or leave `benchmark_filename` out."
        )
    original(self)


@replaces("recbole.data.dataset.SequentialDataset.data_augmentation")
def _data_augmentation(original: Callable, self: Any) -> None:
    # a row for each interaction that has any before it
    self._aug_presets()
    self._check_field("uid_field", "time_field")
    self.sort(by=[self.uid_field, self.time_field], ascending=True)
    feat, longest = self.inter_feat, self.config["MAX_ITEM_LIST_LENGTH"]
    sizes = feat[self.uid_field].unique_consecutive(return_counts=True)[1]
    begins = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    ends = (torch.arange(len(begins)) > begins).nonzero()[:, 0]
    if not len(ends):
        raise CompressionError(_NO_TARGETS)
    pointers = Pointers(begins[ends], ends, longest)
    columns = {field: column[ends] for field, column in feat.interaction.items()}
    columns[self.item_list_length_field] = (ends - pointers.begins).clamp(max=longest)
    for field, column in feat.interaction.items():
        if field != self.uid_field:
            columns[getattr(self, f"{field}_list_field")] = List(column, pointers)
    self.inter_feat = SequenceRows(columns, pointers)


@replaces("recbole.data.dataset.SequentialDataset.build")
def _build(original: Callable, self: Any) -> list[Any]:
    parts = original(self)
    if not len(parts[0]):
        raise CompressionError(_NO_TARGETS)
    return parts


@replaces("recbole.data.dataset.Dataset.leave_one_out")
def _leave_one_out(
    original: Callable, self: Any, group_by: str | None, leave_one_mode: str
) -> list[Any]:
    # a group keeps a row for training, and what it can spare goes to the test first
    modes = ("valid_and_test", "valid_only", "test_only")
    is_rows = isinstance(self.inter_feat, SequenceRows)
    if group_by is None or not is_rows or leave_one_mode not in modes:
        return original(self, group_by, leave_one_mode)
    rows, sizes = _grouped(self, group_by)
    first, none = np.minimum(sizes - 1, 1), np.zeros_like(sizes)
    second = np.minimum(sizes - 1, 2) - first
    valid, test = ((second, first), (first, none), (none, first))[modes.index(leave_one_mode)]
    return _parts(self, rows, sizes - valid - test, valid, test)


@replaces("recbole.data.dataset.Dataset.split_by_ratio")
def _split_by_ratio(
    original: Callable, self: Any, ratios: list[float], group_by: str | None = None
) -> list[Any]:
    # RecBole's own rule is asked once for each size of a group
    if not isinstance(self.inter_feat, SequenceRows):
        return original(self, ratios, group_by)
    rows, sizes = _grouped(self, group_by)
    shares = [ratio / sum(ratios) for ratio in ratios]
    different, which = np.unique(sizes, return_inverse=True)
    cuts = [[0, *self._calcu_split_ids(size, shares), size] for size in different.tolist()]
    lengths = np.diff(np.array(cuts, dtype=np.int64).reshape(-1, len(shares) + 1))
    return _parts(self, rows, *lengths[which].T)


@replaces("recbole.data.dataset.Dataset.time_based_split")
def _time_based_split(
    original: Callable, self: Any, ratios: list[float], group_by: str | None
) -> list[Any]:
    # what is later than the boundary of all groups is the test; a share of the rest, training
    times = np.asarray(self.inter_feat.interaction.get(self.time_field, []))
    is_grouped = group_by is not None and isinstance(self.inter_feat, SequenceRows)
    if not is_grouped or len(ratios) != 3 or not len(times) or (np.diff(times) < 0).any():
        return original(self, ratios, group_by)
    train, _, test = (ratio / sum(ratios) for ratio in ratios)
    is_early = times <= np.percentile(times, 100 * (1 - test))
    rows, sizes = _grouped(self, group_by)
    n_early = np.append(0, np.cumsum(is_early[rows]))[np.cumsum(sizes)]
    early = np.diff(n_early, prepend=0)
    first = np.minimum((early * (train / (1 - test))).astype(np.int64), early)
    return _parts(self, rows, first, early - first, sizes - early)


def _grouped(dataset: Any, group_by: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers by group, as groups appear, `[n]`, and rows of each group, `[n_groups]`; without
    a field all rows are one group."""
    if group_by is None:
        return np.arange(len(dataset)), np.array([len(dataset)])
    codes, values = pd.factorize(dataset.inter_feat[group_by].numpy())
    return stable_order(codes.astype(np.int32)), np.bincount(codes, minlength=len(values))


def _parts(dataset: Any, rows: np.ndarray, *lengths: np.ndarray) -> list[Any]:
    """A data set for each part, out of rows by group and the lengths of each part's runs."""
    n_parts, n_groups = len(lengths), len(lengths[0])
    runs = np.stack(lengths, axis=1).ravel()
    part_of = np.tile(np.arange(n_parts, dtype=np.int16), n_groups).repeat(runs)
    parts = [rows[part_of == part] for part in range(n_parts)]
    dataset._drop_unused_col()
    return [dataset.copy(dataset.inter_feat.take(part)) for part in parts]


@replaces("recbole.data.utils.get_dataloader")
def _get_dataloader(original: Callable, config: Any, phase: str) -> type:
    if phase == "train" and is_ours(config) and config["training"] == "all_positions":
        return PositionsDataLoader
    return original(config, phase)
