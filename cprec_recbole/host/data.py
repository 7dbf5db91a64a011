"""What RecBole's data sets need: current pandas, any size, full precision of times."""

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
from cprec_recbole.data.sequences import stable_order
from cprec_recbole.host.patching import replaces

_SAVED = ("dataset_save_path", "dataloaders_save_path")
_SEPARATORS = "\t,;|"
_BYTES = 2**24  # of a file that are checked together


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
