"""The controls that an honest comparison needs, by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cprec_recbole.compare.controls.choices import (
    BlocksOnly,
    Full,
    Narrower,
    OneRank,
    SharingOnly,
    Tied,
    Tree,
    Untied,
)
from cprec_recbole.compare.controls.control import (
    Control,
    Derived,
    DerivedControl,
    Trained,
    TrainedControl,
)
from cprec_recbole.compare.controls.hashing import Hashing
from cprec_recbole.compare.controls.int8 import Int8, NarrowerInt8
from cprec_recbole.compare.controls.recjpq import RecJPQRandom, RecJPQSVD
from cprec_recbole.compare.controls.recovered import (
    Recovered,
    RecoveredInt8,
    UncompressedRecovered,
)
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compare.controls.svd import (
    UniformSVD,
    UniformSVDRecovered,
    UniformSVDRecoveredInt8,
)
from cprec_recbole.config import CompressionError

ALL = "all"
CONTROLS: dict[str, Control] = {
    control.name: control
    for control in (
        Recovered(),
        RecoveredInt8(),
        UncompressedRecovered(),
        Narrower(),
        RecJPQRandom(),
        OneRank(),
        Tree(),
        Full(),
        RecJPQSVD(),
        BlocksOnly(),
        SharingOnly(),
        Untied(),
        Tied(),
        UniformSVD(),
        UniformSVDRecovered(),
        UniformSVDRecoveredInt8(),
        Int8(),
        NarrowerInt8(),
        Hashing(),
    )
}

__all__ = [
    "ALL",
    "CONTROLS",
    "Control",
    "Derived",
    "DerivedControl",
    "Setting",
    "Trained",
    "TrainedControl",
    "find_controls",
]


def find_controls(names: Sequence[str]) -> list[Control]:
    """The controls of these names, each once; `all` for every one.

    Raises:
        CompressionError: a name that is none; it lists the known ones.
    """
    found: dict[str, Control] = {}
    for name in names:
        if name == ALL:
            found |= CONTROLS
        elif name in CONTROLS:
            found[name] = CONTROLS[name]
        else:
            near = difflib.get_close_matches(name, [ALL, *CONTROLS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise CompressionError(
                f"Expected `controls` to be {ALL} or out of {', '.join(CONTROLS)}, but got "
                f"{name!r}{hint}"
            )
    return list(found.values())
