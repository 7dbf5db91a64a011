"""What RecBole's data sets need: current pandas, any size, full precision of times."""

from __future__ import annotations

import builtins
import glob
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from cprec_recbole.host.patching import View, replace, replaces

_SAVED = ("dataset_save_path", "dataloaders_save_path")


def adapt() -> None:
    """Mend RecBole's data sets; a second call is harmless."""
    from recbole.data.dataset import Dataset, SequentialDataset, dataset, kg_dataset
    from recbole.data.dataset import sequential_dataset as sequential

    from cprec_recbole.data import interactions, sequences, splits

    for module in (dataset, kg_dataset, sequential):
        module.len = _len
    dataset.pd = View(pd, read_csv=interactions.quickly_read(_read_csv))
    replace(Dataset, "_load_inter_feat", interactions.with_ids)
    replace(Dataset, "_change_feat_format", interactions.in_full_precision)
    replace(Dataset, "sort", interactions.quickly_sorted)
    replace(Dataset, "leave_one_out", splits.by_leaving_out)
    replace(Dataset, "split_by_ratio", splits.by_ratios)
    replace(Dataset, "time_based_split", splits.by_time)
    replace(SequentialDataset, "data_augmentation", sequences.of_prefixes)
    replace(SequentialDataset, "build", sequences.with_targets)
    replace(SequentialDataset, "_benchmark_presets", interactions.with_lists)


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
    """RecBole's functions that read saved data sets and loaders; none that is older than a file of
    the data set, whose changes RecBole does not see."""
    saved = Path(config["checkpoint_dir"]).glob(f"{glob.escape(config['dataset'])}-*.pth")
    paths = [*saved, *(Path(config[name]) for name in _SAVED if config[name])]
    written = [path.stat().st_mtime_ns for path in paths if path.is_file()]
    folder = Path(config["data_path"])
    files = [folder, *folder.glob("*")]
    links = [each for each in (*files, *folder.parents) if each.is_symlink()]
    seen = [each.stat() for each in files if each.exists()] + [each.lstat() for each in links]
    changed = [each.st_ctime_ns for each in seen]
    is_stale = bool(written and changed) and max(changed) >= min(written)
    with without_saved_data(config) if is_stale else nullcontext():
        return original(config)


def _len(found: Any) -> Any:
    """RecBole asks a column of lists for `agg(len)`; pandas 3 hands `len` the whole column."""
    return found.map(builtins.len) if isinstance(found, pd.Series) else builtins.len(found)


def _read_csv(*args: Any, **options: Any) -> pd.DataFrame:
    """RecBole fills a list that is missing in place, which changes nothing since pandas 3."""
    frame = pd.read_csv(*args, **options)
    lists = [name for name in frame if name.endswith("_seq")]
    return frame.fillna(dict.fromkeys(lists, ""))


@replaces("recbole.data.dataset.Dataset._fill_nan")
def _fill_nan(original: Callable, self: Any) -> None:
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


@replaces("recbole.data.utils.save_split_dataloaders")
def _save_split_dataloaders(original: Callable, config: Any, dataloaders: Any) -> None:
    # RecBole takes the generators away to pickle the loaders, and trains with those
    holders = [part for loader in dataloaders for part in (loader, loader.sampler)]
    kept = [(holder, getattr(holder, "generator", None)) for holder in holders]
    try:
        original(config, dataloaders)
    finally:
        for holder, generator in kept:
            holder.generator = generator
