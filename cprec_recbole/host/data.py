"""What RecBole's data sets need: current pandas, any size, full precision of times."""

from __future__ import annotations

import builtins
import warnings
from collections.abc import Callable
from typing import Any

import pandas as pd

from cprec_recbole.host.patching import View, replace


def adapt() -> None:
    """Mend RecBole's data sets; a second call is harmless."""
    import recbole.data.utils
    from recbole.data.dataset import Dataset, SequentialDataset, dataset, kg_dataset
    from recbole.data.dataset import sequential_dataset as sequential

    from cprec_recbole.data import interactions, sequences

    for module in (dataset, kg_dataset, sequential):
        module.len = _len
    dataset.pd = View(pd, read_csv=_read_csv)
    replace(Dataset, "_load_feat", interactions.quickly_read)
    replace(Dataset, "_filter_by_inter_num", interactions.quickly_filtered)
    replace(Dataset, "_fill_nan", _with_working_fillna)
    replace(Dataset, "_remap", interactions.quickly_numbered)
    replace(Dataset, "_change_feat_format", interactions.in_full_precision)
    replace(Dataset, "sort", interactions.quickly_sorted)
    replace(Dataset, "leave_one_out", sequences.by_leaving_out)
    replace(Dataset, "split_by_ratio", sequences.by_ratios)
    replace(Dataset, "time_based_split", sequences.by_time)
    replace(SequentialDataset, "data_augmentation", sequences.of_prefixes)
    replace(SequentialDataset, "build", sequences.with_targets)
    replace(recbole.data.utils, "save_split_dataloaders", _with_generators_kept)


def _len(found: Any) -> Any:
    """RecBole asks a column of lists for `agg(len)`; pandas 3 hands `len` the whole column."""
    return found.map(builtins.len) if isinstance(found, pd.Series) else builtins.len(found)


def _read_csv(*args: Any, **options: Any) -> pd.DataFrame:
    """RecBole fills a list that is missing in place, which changes nothing since pandas 3."""
    frame = pd.read_csv(*args, **options)
    lists = [name for name in frame if name.endswith("_seq")]
    return frame.fillna(dict.fromkeys(lists, ""))


def _with_working_fillna(original: Callable) -> Callable:
    def _fill_nan(self: Any) -> None:
        # RecBole fills a column in place, which changes nothing since pandas 3
        kinds = self.field2type
        for feat_name in self.feat_name_list:
            feat = getattr(self, feat_name)
            fill = {f: 0 for f in feat if kinds[f].name == "TOKEN"}
            fill |= {f: feat[f].mean() for f in feat if kinds[f].name == "FLOAT"}
            setattr(self, feat_name, feat.fillna(fill))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            original(self)

    return _fill_nan


def _with_generators_kept(original: Callable) -> Callable:
    def save_split_dataloaders(config: Any, dataloaders: Any) -> None:
        # RecBole takes them away to pickle the loaders, and trains with those
        holders = [part for loader in dataloaders for part in (loader, loader.sampler)]
        kept = [(holder, getattr(holder, "generator", None)) for holder in holders]
        try:
            original(config, dataloaders)
        finally:
            for holder, generator in kept:
                holder.generator = generator

    return save_split_dataloaders
