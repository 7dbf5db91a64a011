"""RecBole's atomic files and orders of interactions, without an object for each row.

RecBole reads with pandas' parser in Python. Here the one in C reads what both read alike, and rows
are ordered by times in full precision. Each function with `original` takes a function that RecBole
calls and gives what stands in its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from cprec_recbole.config import CompressionError

_SEPARATORS = "\t,;|"
_BYTES = 2**24  # of a file that are checked together


def quickly_read(original: Callable) -> Callable:
    """pandas' `read_csv` as RecBole calls it; files of tokens and floats by the parser in C."""

    def read_csv(filepath: str, **options: Any) -> pd.DataFrame:
        types = options["dtype"]
        tokens = [name for name in types if name.endswith(":token")]
        floats = [name for name in types if name.endswith(":float")]
        if (
            len(tokens) + len(floats) == len(options["usecols"])
            and options["encoding"] in (None, "utf-8")
            and is_simple(filepath, options["delimiter"])
        ):
            try:
                frame = pd.read_csv(filepath, **{**options, "engine": "c"})
            except ValueError:  # the parser in Python knows a way, or says what is wrong
                return original(filepath, **options)
            return frame.astype(dict.fromkeys(tokens, object))  # RecBole counts them in Python
        return original(filepath, **options)

    return read_csv


def in_full_precision(original: Callable) -> Callable:
    """RecBole's `_change_feat_format`, which makes times float32: those of today lie two minutes
    apart there. Rows that are to be ordered by time are put into that order before; RecBole's own
    sort, which is stable, then leaves those that have become equal as they are."""

    def _change_feat_format(self: Any) -> None:
        feat, time = self.inter_feat, self.time_field
        from recbole.data.dataset import SequentialDataset

        by_time = isinstance(self, SequentialDataset) or self.config["eval_args"]["order"] == "TO"
        if by_time and self.benchmark_filename_list is None and time in feat:
            times = feat[time].to_numpy()
            if times.dtype == np.float64:
                self.inter_feat = feat.iloc[stable_order(times)].reset_index(drop=True)
        original(self)

    return _change_feat_format


def quickly_sorted(original: Callable) -> Callable:
    """RecBole's `sort`, equal rows in the order they had; a column that is not there is named."""

    def sort(self: Any, by: str | list[str], ascending: bool | list[bool] = True) -> None:
        names, feat = [by] if isinstance(by, str) else list(by), self.inter_feat
        ways = [ascending] * len(names) if isinstance(ascending, bool) else list(ascending)
        for name in names:
            if name not in feat:
                raise _missing(self, "TIME_FIELD", name)
        if len(ways) != len(names):
            original(self, by, ascending)
            return
        for name, is_rising in zip(reversed(names), reversed(ways)):
            key = feat[name] if feat[name].dim() == 1 else feat[name][..., 0]
            order = torch.from_numpy(stable_order(key.numpy()))
            feat._reindex(order if is_rising else order.flip(0))

    return sort


def with_ids(original: Callable) -> Callable:
    """RecBole's `_load_inter_feat`; interactions without users or items are refused."""

    def _load_inter_feat(self: Any, token: str, dataset_path: str) -> None:
        original(self, token, dataset_path)
        for option, name in (("USER_ID_FIELD", self.uid_field), ("ITEM_ID_FIELD", self.iid_field)):
            if name is not None and (self.inter_feat is None or name not in self.inter_feat):
                raise _missing(self, option, name)

    return _load_inter_feat


def with_lists(original: Callable) -> Callable:
    """RecBole's `_benchmark_presets`; files without histories are refused."""

    def _benchmark_presets(self: Any) -> None:
        lists = self.iid_field + self.config["LIST_SUFFIX"]
        if lists not in self.inter_feat:
            raise CompressionError(
                f"Expected the files of `benchmark_filename` to hold {lists}:token_seq, the "
                f"history of each row, but they have {', '.join(self.inter_feat)}; write it, name "
                "it in `load_col`, or leave `benchmark_filename` out."
            )
        original(self)

    return _benchmark_presets


def _missing(dataset: Any, option: str, name: str | None) -> CompressionError:
    """The error for interactions without the column that an option names."""
    parts = dataset.benchmark_filename_list or []
    file = ".".join([dataset.dataset_name, *parts[:1], "inter"])
    with open(
        os.path.join(dataset.dataset_path, file), encoding=dataset.config["encoding"]
    ) as rows:
        header = rows.readline().strip("\ufeff\n").split(dataset.config["field_separator"])
    columns = [column.split(":")[0] for column in header]
    if name in columns:
        return CompressionError(
            f"Expected `load_col` to name {name}, the `{option}`, but it was not loaded; write "
            f"--load_col='{{inter: [{', '.join(columns)}]}}'."
        )
    line = ""
    if option == "TIME_FIELD":
        line = f", or write one, such as {name or 'timestamp'}:float with the number of each line"
    return CompressionError(
        f"Expected `{option}` to be a column of {file}, but got {name}, and it has "
        f"{', '.join(columns)}; name that column, as in --{option}=NAME{line}."
    )


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Row numbers by key, equal keys in the order they had, `[n]`. PyTorch sorts whole numbers by
    their digits, NumPy compares them: at ten million a quarter of the time."""
    keys = np.require(keys, requirements="W")  # of pandas they may be read-only: torch warns
    return torch.from_numpy(keys).argsort(stable=True).numpy()


def is_simple(filepath: str, separator: str) -> bool:
    """Whether both parsers of pandas read the same out of a file in UTF-8.

    They differ over quotes, carriage returns within a line, NUL, and rows with more fields than the
    header.
    """
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
