"""`cprec export`: a folder as an ONNX file or one of torch.export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cprec_recbole.config import check_choice, reject_unknown
from cprec_recbole.models import load_pretrained
from cprec_recbole.serving.export import SUFFIXES, export, tokens_path


def add_parser(commands: Any) -> None:
    """Add the command to `cprec`."""
    parser = commands.add_parser(
        "export",
        help="write a model as ONNX or torch.export, for serving without RecBole",
        description="Write a folder's model as one graph: item ids of histories and of items to "
        "leave out go in, the best items and their scores come out. The tokens are written beside.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--to", required=True, metavar="{" + ",".join(SUFFIXES) + "}")
    parser.add_argument("--out", metavar="FILE", help="default: FOLDER.onnx or FOLDER.pt2")
    parser.add_argument("-k", type=int, default=20, help="how many items (default: %(default)s)")


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Write the file and say how large it is."""
    reject_unknown(passed_on, ("to", "out", "k"))
    check_choice("to", options.to, tuple(SUFFIXES))
    folder = Path(options.folder)
    model = load_pretrained(folder)
    out = options.out or folder.resolve().with_name(folder.resolve().name + SUFFIXES[options.to])
    file = export(model, out, options.to, options.k)
    sizes = f"{file.stat().st_size:,} bytes"
    print(f"Written: {file} ({sizes}), tokens: {tokens_path(file)}")
    return 0
