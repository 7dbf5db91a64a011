"""What RecBole's own reading of data needs to run on current pandas, and to be kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from cprec_recbole.host.patching import replace


def adapt() -> None:
    """Mend RecBole's data sets; a second call is harmless."""
    import recbole.data.utils
    from recbole.data.dataset import Dataset, SequentialDataset

    replace(Dataset, "_fill_nan", _with_working_fillna)
    replace(Dataset, "_remap", _with_working_remap)
    replace(SequentialDataset, "_benchmark_presets", _with_working_presets)
    replace(recbole.data.utils, "save_split_dataloaders", _with_generators_kept)


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


def _with_working_remap(original: Callable) -> Callable:
    def _remap(self: Any, remap_list: list) -> None:
        # RecBole asks a column of lists for `agg(len)`, which is one number since pandas 3
        if all(kind.name != "TOKEN_SEQ" for _, _, kind in remap_list):
            original(self, remap_list)
            return
        tokens, ends = self._concat_remaped_tokens(remap_list)
        numbers, known = pd.factorize(tokens)
        names = np.array(["[PAD]", *known])
        by_token = {token: number for number, token in enumerate(names)}
        for (feat, field, kind), own in zip(remap_list, np.split(numbers + 1, ends)):
            ids: Any = own
            if field not in self.field2id_token:
                self.field2id_token[field] = names
                self.field2token_id[field] = by_token
            if kind.name == "TOKEN_SEQ":
                ids = np.split(ids, np.cumsum(feat[field].map(len))[:-1])
            feat[field] = ids

    return _remap


def _with_working_presets(original: Callable) -> Callable:
    def _benchmark_presets(self: Any) -> None:
        original(self)  # which asks for `agg(len)` too
        lists = self.inter_feat[self.item_id_list_field]
        self.inter_feat[self.item_list_length_field] = lists.map(len)

    return _benchmark_presets


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
