"""RecBole's numbers for items and users, and whether a model and data agree about them.

RecBole numbers both by their first appearance, so the same interactions in another order of rows
have other ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cprec_recbole.config import CompressionError


def check_numbering(model: Any, data: Any, argument: str) -> None:
    """Raise a CompressionError where a model and data call an item by different ids, or a user, of
    models that know users.

    RecBole numbers both by their first appearance, so the same interactions in another order of
    rows have other ids. Nothing is compared where either does not know its tokens.

    Args:
        model: one of ours, or one of RecBole's that was built after `import cprec_recbole`.
        data: RecBole's data set or data loader; whatever else is left alone.
        argument: the name that the data was given by.
    """
    dataset = getattr(data, "_dataset", data)
    if not hasattr(dataset, "field2id_token"):
        return
    vocabulary = getattr(model, "vocabulary", None)
    tokens = _tokens(dataset, dataset.iid_field)
    names = getattr(model, "item_tokens", None) if vocabulary is None else None
    if vocabulary is not None and not vocabulary.same_as(tokens):
        _refuse("item", vocabulary.tokens, tokens, argument)
    if names is not None:
        _refuse("item", [str(token) for token in names[1:]], tokens, argument)
    users = getattr(model, "user_tokens", None)
    if users is not None and hasattr(model, "user_embedding"):
        users = [str(token) for token in users[1:]]
        _refuse("user", users, _tokens(dataset, dataset.uid_field), argument)


def _tokens(dataset: Any, field: str) -> list[str]:
    return [str(token) for token in dataset.field2id_token[field][1:]]


def _refuse(kind: str, own: Sequence[str], tokens: Sequence[str], argument: str) -> None:
    """Raise a CompressionError where a model's own tokens are not those of data."""
    if list(own) == list(tokens):
        return
    if len(own) != len(tokens):
        found = f"the model has {len(own)} {kind}s and the data {len(tokens)}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(own, tokens)) if a != b)
        found = f"{kind} {i + 1} is {own[i]!r} in the model and {tokens[i]!r} in the data"
    raise CompressionError(
        f"Expected `{argument}` to number its {kind}s as the model does, but {found}. RecBole "
        "counts them by first appearance: keep the rows that the model was trained on first, in "
        "their order and with the same filters, new ones behind them, and give items that the "
        "model does not know to `add_items` in the order of their ids."
    )


def remember(model: Any, config: Any, dataset: Any) -> None:
    """Let a model know the tokens that it is built with, and its checkpoints a checksum of them."""
    for name, field in (("item", dataset.iid_field), ("user", dataset.uid_field)):
        if field in dataset.field2id_token:
            setattr(model, f"{name}_tokens", dataset.field2id_token[field])
            if hasattr(config, "final_config_dict"):  # which is what a checkpoint keeps
                config.final_config_dict[f"{name}_numbering"] = numbering(dataset, field)


def numbering(dataset: Any, field: str) -> str:
    """A checksum of the tokens of a field of a RecBole data set, in the order of their ids."""
    return hashlib.sha256("\0".join(_tokens(dataset, field)).encode()).hexdigest()[:16]


def check_checkpoint_numbering(
    file: Any, options: Mapping[str, Any], dataset: Any, kind: str = "item"
) -> None:
    """Raise a CompressionError where a data set numbers its items, or users, otherwise than the one
    that a checkpoint's model was trained on; an older checkpoint does not say."""
    expected = options.get(f"{kind}_numbering")
    field = dataset.iid_field if kind == "item" else dataset.uid_field
    if expected is not None and expected != numbering(dataset, field):
        raise CompressionError(
            f"Expected `data_path` to hold the data that {file} was trained on, but the {kind}s of "
            f"{dataset.dataset_name} in {dataset.dataset_path} have other numbers: RecBole numbers "
            "them in the order of their first appearance, and the rows, their order or the filters "
            "have changed."
        )
