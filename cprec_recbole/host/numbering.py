"""RecBole's numbers for items and users, by first appearance, so that another order of rows gives
other ones; and whether a model and data agree about them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from cprec_recbole.config import CompressionError


def remember(model: Any, config: Any, dataset: Any) -> None:
    """Let a model know the tokens that it is built with, and its checkpoints a checksum of them."""
    for name, field in (("item", dataset.iid_field), ("user", dataset.uid_field)):
        if field in dataset.field2id_token:
            setattr(model, f"{name}_tokens", dataset.field2id_token[field])
            if hasattr(config, "final_config_dict"):  # which is what a checkpoint keeps
                config.final_config_dict[f"{name}_numbering"] = numbering(dataset, field)


def check_numbering(model: Any, data: Any, argument: str) -> None:
    """Raise a CompressionError where a model and data, given as `argument`, number items (or users,
    of models that know them) differently; nothing is compared where either knows no tokens."""
    dataset = getattr(data, "_dataset", data)
    if not hasattr(dataset, "field2id_token"):
        return
    vocabulary = getattr(model, "vocabulary", None)
    items = getattr(model, "item_tokens", None)
    users = getattr(model, "user_tokens", None) if hasattr(model, "user_embedding") else None
    for kind, field, known in (
        ("item", dataset.iid_field, items if vocabulary is None else ("", *vocabulary.tokens)),
        ("user", dataset.uid_field, users),
    ):
        if known is None:
            continue
        own, tokens = tokens_by_id(known), tokens_by_id(dataset.field2id_token[field])
        if own == tokens:
            continue
        difference = f"the model has {len(own)} {kind}s and the data {len(tokens)}"
        if len(own) == len(tokens):
            i = next(i for i, (a, b) in enumerate(zip(own, tokens)) if a != b)
            difference = f"{kind} {i + 1} is {own[i]!r} in the model and {tokens[i]!r} in the data"
        raise CompressionError(
            f"Expected `{argument}` to number its {kind}s as the model does, but {difference}. "
            "RecBole counts them by first appearance: keep the rows that the model was trained on "
            "first, in their order and with the same filters, new ones behind them, and give items "
            "that the model does not know to `add_items` in the order of their ids."
        )


def check_checkpoint_numbering(
    file: Any, options: Mapping[str, Any], dataset: Any, kind: str = "item"
) -> None:
    """Raise a CompressionError where a data set numbers its items, or users, otherwise than that of
    a checkpoint's options; an older checkpoint does not say."""
    expected = options.get(f"{kind}_numbering")
    field = dataset.iid_field if kind == "item" else dataset.uid_field
    if expected is not None and expected != numbering(dataset, field):
        raise CompressionError(
            f"Expected `data_path` to hold the data that {file} was trained on, but the {kind}s of "
            f"{dataset.dataset_name} in {dataset.dataset_path} have other numbers: RecBole numbers "
            "them by first appearance, and the rows, their order or the filters have changed."
        )


def numbering(dataset: Any, field: str) -> str:
    """A checksum of the tokens of a field of a RecBole data set, in the order of their ids."""
    tokens = "\0".join(tokens_by_id(dataset.field2id_token[field]))
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


def tokens_by_id(tokens: Iterable[object]) -> list[str]:
    """Tokens by id, without the first, which is padding's."""
    return [str(token) for token in tokens][1:]
