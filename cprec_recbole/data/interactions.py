"""RecBole's atomic files, filters and orders of interactions, without an object for each row.

RecBole reads with pandas' Python parser, keeps a string for every token of every row and counts in
Python. Here the C parser reads, and token columns are pandas categories until they become ids. The
result is RecBole's, item for item; where that is not certain, RecBole's own methods do the work.

Each public function but `is_simple` and `read_columns` takes a method of RecBole's `Dataset` and
gives what stands in its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import SequentialDataset
from recbole.utils import FeatureSource, FeatureType

from cprec_recbole.config import CompressionError
from cprec_recbole.data.splits import stable_order

_DTYPES: dict[FeatureType, type] = {FeatureType.TOKEN: object, FeatureType.FLOAT: np.float64}
_SEPARATORS = "\t,;|"
_BYTES = 2**24  # of a file that are checked together
_ROWS = 2**20  # of a file that are parsed together


def quickly_read(original: Callable) -> Callable:
    """RecBole's `_load_feat`; of a `.inter` file of tokens and floats, by pandas' C parser."""

    def _load_feat(self: Any, filepath: str, source: Any) -> Any:
        kinds = _simple_columns(self, filepath, source)
        if not kinds or not is_simple(filepath, self.config["field_separator"]):
            return original(self, filepath, source)
        types = {name: _DTYPES[kind] for name, kind in kinds.items()}
        try:
            frame = read_columns(filepath, self.config["field_separator"], types)
        except ValueError:  # RecBole's own reading knows a way, or says what is wrong
            return original(self, filepath, source)
        frame.columns = [name.split(":")[0] for name in kinds]
        for field, kind in zip(frame.columns, kinds.values()):
            self.set_field_property(field, kind, source, 1)
            if kind == FeatureType.FLOAT:
                self.field2bucketnum[field] = 2
        return frame

    return _load_feat


def _simple_columns(dataset: Any, filepath: str, source: Any) -> dict[str, FeatureType]:
    """The columns to load and their types, as the header names them; empty where RecBole's own
    reading has to do it."""
    if (
        source != FeatureSource.INTERACTION
        or not isinstance(dataset, SequentialDataset)
        or dataset.benchmark_filename_list is not None
        or dataset.config["encoding"] not in (None, "utf-8")
    ):
        return {}
    load, unload = dataset._get_load_and_unload_col(source)
    with open(filepath, encoding=dataset.config["encoding"]) as file:
        header = file.readline().rstrip("\n").split(dataset.config["field_separator"])
    known = {kind.value: kind for kind in FeatureType}
    if any(name.count(":") != 1 or name.split(":")[1] not in known for name in header):
        return {}
    if len({name.split(":")[0] for name in header}) < len(header):
        return {}
    kinds = {}
    for name in header:
        field, kind = name.split(":")
        if (load is None or field in load) and field not in (unload or ()):
            kinds[name] = known[kind]
    return kinds if set(kinds.values()) <= set(_DTYPES) else {}


def quickly_filtered(original: Callable) -> Callable:
    """RecBole's `_filter_by_inter_num`: users and items with too few or too many interactions are
    dropped, until there are none."""

    def _filter_by_inter_num(self: Any) -> None:
        intervals = {
            self.uid_field: self._parse_intervals_str(self.config["user_inter_num_interval"]),
            self.iid_field: self._parse_intervals_str(self.config["item_inter_num_interval"]),
        }
        intervals = {field: interval for field, interval in intervals.items() if interval}
        if (
            self.user_feat is not None
            or self.item_feat is not None
            or any(len(interval) > 1 for interval in intervals.values())
            or not all(_is_complete(self.inter_feat, field) for field in intervals)
        ):
            original(self)
            return
        while True:
            keep = np.ones(len(self.inter_feat), dtype=bool)
            for field, interval in intervals.items():
                codes = self.inter_feat[field].cat.codes.to_numpy()
                counts = np.bincount(codes, minlength=1)
                keep &= self._within_intervals(counts, interval)[codes]
            if keep.all():
                return
            self.inter_feat = self.inter_feat[keep]

    return _filter_by_inter_num


def _is_complete(feat: pd.DataFrame, field: str | None) -> bool:
    """Whether a field is a category in every row. (Where both users and items are missing
    somewhere, RecBole drops other rows than those, and the missing ones stay.)"""
    return field in feat and _is_category(feat[field]) and not feat[field].hasnans


def quickly_numbered(original: Callable) -> Callable:
    """RecBole's `_remap`: ids in order of first appearance, from 1; 0 is what is missing."""

    def _remap(self: Any, remap_list: list) -> None:
        if len(remap_list) != 1 or not _is_category(remap_list[0][0][remap_list[0][1]]):
            original(self, remap_list)
            return
        feat, field, _ = remap_list[0]
        ids, tokens = pd.factorize(feat[field])
        ids += 1
        feat[field] = ids
        names = np.array(["[PAD]", *tokens])
        if field not in self.field2id_token:
            self.field2id_token[field] = names
            self.field2token_id[field] = dict(zip(names.tolist(), range(len(names))))

    return _remap


def in_full_precision(original: Callable) -> Callable:
    """RecBole's `_change_feat_format`, which makes times float32: those of today lie two minutes
    apart there. Rows that are to be ordered by time are put into that order before; RecBole's own
    sort, which is stable, then leaves those that have become equal as they are."""

    def _change_feat_format(self: Any) -> None:
        feat, time = self.inter_feat, self.time_field
        by_time = isinstance(self, SequentialDataset) or self.config["eval_args"]["order"] == "TO"
        if by_time and self.benchmark_filename_list is None and time in feat:
            times = feat[time].to_numpy()
            rounded = times.astype(np.float32) if times.dtype == np.float64 else times
            if times.dtype == np.float64 and len(np.unique(rounded)) < len(np.unique(times)):
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


def _is_category(column: pd.Series) -> bool:
    return isinstance(column.dtype, pd.CategoricalDtype)


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


def read_columns(filepath: str, separator: str, types: dict[str, type]) -> pd.DataFrame:
    """Columns of a file, with a category for each token, in order of first appearance.

    Args:
        filepath: a file with a header.
        separator: between the fields of a row.
        types: what to read; columns of type object become categories.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in types}
    tokens = {name: np.empty(0, dtype=object) for name in types if types[name] is object}
    with pd.read_csv(
        filepath, sep=separator, usecols=list(types), dtype=types, engine="c", chunksize=_ROWS
    ) as chunks:
        for chunk in chunks:
            for name in types:
                values = chunk[name].to_numpy()
                if name in tokens:
                    known = tokens[name]
                    codes, tokens[name] = pd.factorize(np.concatenate([known, values]))
                    values = codes[len(known) :].astype(np.int32)
                parts[name].append(values)
    columns: dict[str, Any] = {}
    for name in types:
        column = np.concatenate(parts.pop(name))
        if name in tokens:
            categories = pd.Index(tokens.pop(name), dtype=object)
            column = pd.Categorical.from_codes(column, categories)
        columns[name] = column
    return pd.DataFrame(columns, copy=False)
