"""`python -m examples.serve FOLDER`: start the service."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import uvicorn

from cprec_recbole import CompressionError
from cprec_recbole.threads import threads_for
from examples.serve.app import create_app


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted."""
    options = _parser().parse_args(arguments)
    try:
        folders = _named(options.folders)
        app = create_app(
            folders,
            options.titles or _titles_beside(folders),
            max_batch=options.max_batch,
            max_wait=options.max_wait_ms / 1e3,
        )
    except CompressionError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    with threads_for(n_items=1, dim=1):  # a request is too small for a second one
        uvicorn.run(
            app,
            host=options.host,
            port=options.port,
            access_log=options.access_log,
            log_level="info",
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.serve", description=__doc__)
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="folders of save_pretrained; requests that name no model get the first",
    )
    parser.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--max-batch", type=_positive, default=32, help="(default: %(default)s)")
    parser.add_argument(
        "--max-wait-ms",
        type=_milliseconds,
        default=2.0,
        help="how long a request waits for others (default: %(default)s)",
    )
    parser.add_argument(
        "--titles", type=Path, help="for the page (default: titles.json beside the first folder)"
    )
    parser.add_argument("--access-log", action="store_true", help="a line for each request")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _milliseconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1000:
        raise ValueError
    return number


def _named(folders: list[str]) -> dict[str, Path]:
    """Folders by name; one without a name has that of its last part."""
    found: dict[str, Path] = {}
    for text in folders:
        name, equals, path = text.partition("=")
        if not equals or Path(text).is_dir():  # a folder may have such a name
            name, path = Path(text).resolve().name, text
        if not name or name in found:
            raise CompressionError(
                f"Expected each folder to have a name of its own, but got {text!r}; use "
                "NAME=FOLDER."
            )
        found[name] = Path(path)
    return found


def _titles_beside(folders: dict[str, Path]) -> Path | None:
    file = next(iter(folders.values())).resolve().parent / "titles.json"
    return file if file.exists() else None


if __name__ == "__main__":
    sys.exit(main())
