"""`cprec recommend`: the best next items for histories of tokens, from a folder alone."""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any, TextIO

from cprec_recbole.config import CompressionError, reject_unknown
from cprec_recbole.models import load_pretrained
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.models.vocabulary import UNKNOWN

_BATCH = 64
_OWN = ("k", "exclude_seen")  # options that a request may have of its own


def add_parser(commands: Any) -> None:
    """Add the command to `cprec`."""
    parser = commands.add_parser(
        "recommend",
        help="recommend for histories, without a data set",
        description="Recommend from a folder that `cprec compress` or save_pretrained wrote. Many "
        "users: a line of JSON each, a list of tokens or an object with `history`, and perhaps "
        "with `k` and `exclude_seen` of its own; a line of JSON comes out for each, with what else "
        "the object held.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", metavar="FOLDER")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--history", metavar="50,181", help="tokens, oldest first; those with a comma need --input"
    )
    source.add_argument("--input", metavar="FILE", help="JSON lines; - is standard input")
    parser.add_argument("-k", type=int, default=20, help="how many items (default: %(default)s)")
    parser.add_argument("--unknown", default="warn", metavar="{" + ",".join(UNKNOWN) + "}")
    parser.add_argument("--exclude-seen", action="store_true", help="leave out the history's items")
    parser.add_argument("--index", action="store_true", help="build an index first")


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Print a table for one history, or answer a line for each line read."""
    reject_unknown(passed_on, ("history", "input", "k", "unknown", "exclude-seen", "index"))
    if options.unknown not in UNKNOWN:
        raise CompressionError(
            f"Expected `unknown` to be one of {', '.join(UNKNOWN)}, but got {options.unknown!r}."
        )
    model = load_pretrained(options.folder)
    if options.index:
        model.build_index()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _on_one_line
        return _answer(model, options)


def _answer(model: CompressedRecommender, options: argparse.Namespace) -> int:
    if options.history is not None:
        history = [token.strip() for token in options.history.split(",") if token.strip()]
        tokens, scores = _answers(model, [history], options)[0]
        for place, (token, score) in enumerate(zip(tokens, scores), start=1):
            print(f"{place:>3}  {token}  {score:.4f}")
        return 0
    with ExitStack() as stack:
        failed = _stream(model, _opened(options.input, stack), options)
    return 1 if failed else 0


def _stream(model: CompressedRecommender, lines: TextIO, options: argparse.Namespace) -> int:
    """Answer every line, a batch at a time (one by one from a person or a pipe); returns how many
    could not be answered. A bad line gets an `error` of its own, and the next ones are read."""
    failed = 0
    numbered = enumerate(lines, start=1)
    size = 1 if options.input == "-" else _BATCH
    while batch := list(islice(numbered, size)):
        for answer in _batch_answers(model, batch, options):
            failed += "error" in answer
            print(_as_json(answer))
        sys.stdout.flush()
    return failed


def _batch_answers(
    model: CompressedRecommender, batch: list[tuple[int, str]], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    asked = [(number, _parsed(line)) for number, line in batch if line.strip()]
    found = _at_once(model, [request for _, request in asked if "error" not in request], options)
    for number, request in asked:
        rest = {k: v for k, v in request.items() if k != "history"}
        if "error" in request:
            yield {**rest, "line": number}
            continue
        try:
            one = next(found) if found else _answer_to(model, request, options)
        except CompressionError as error:
            yield {**rest, "error": str(error), "line": number}
            continue
        yield {**rest, "items": one[0], "scores": one[1]}


def _at_once(
    model: CompressedRecommender, requests: list[dict[str, Any]], options: argparse.Namespace
) -> Iterator[tuple[list[str], list[float]]] | None:
    """The answers to a batch; None where they have to be asked for one by one, since some have
    options of their own or one of them is bad."""
    if any(name in request for request in requests for name in _OWN):
        return None
    histories = [request["history"] for request in requests]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            found = _answers(model, histories, options) if histories else []
        except CompressionError:
            return None
    for warning in said:
        _on_one_line(warning.message)
    return iter(found)


def _answer_to(
    model: CompressedRecommender, request: dict[str, Any], options: argparse.Namespace
) -> tuple[list[str], list[float]]:
    """The answer to one request, with its own options."""
    own = {name: request[name] for name in _OWN if name in request}
    if not isinstance(own.get("exclude_seen", True), bool):
        raise CompressionError(
            f"Expected `exclude_seen` to be true or false, but got {own['exclude_seen']!r}."
        )
    (answer,) = _answers(model, [request["history"]], argparse.Namespace(**vars(options) | own))
    return answer


def _answers(
    model: CompressedRecommender, histories: list[Any], options: argparse.Namespace
) -> list[tuple[list[str], list[float]]]:
    best = model.recommend_tokens(
        histories, options.k, unknown=options.unknown, exclude_seen=options.exclude_seen
    )
    return list(zip(best.tokens, [[round(x, 6) for x in row] for row in best.scores.tolist()]))


def _parsed(line: str) -> dict[str, Any]:
    """A line as an object with `history`, or with `error`."""
    try:
        request = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return {"error": f"Expected a line of JSON, but got {line.strip()[:60]!r}: {error}."}
    if isinstance(request, list):
        request = {"history": request}
    if not isinstance(request, dict) or not isinstance(request.get("history"), list):
        return {
            "error": "Expected a list of tokens or an object with `history`, a list of tokens, but "
            f"got {line.strip()[:60]!r}."
        }
    return {k: v for k, v in request.items() if k not in ("items", "scores", "error", "line")}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _as_json(answer: dict[str, Any]) -> str:
    text = json.dumps(answer, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which JSON can spell and UTF-8 cannot
        return json.dumps(answer)
    return text


def _opened(name: str, stack: ExitStack) -> TextIO:
    if name == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")  # a bad line is one line
        return sys.stdin
    try:
        return stack.enter_context(open(name, encoding="utf-8-sig", errors="replace"))
    except OSError as error:
        raise CompressionError(
            f"Expected `input` to be a file that can be read, but got {name}: {error.strerror}."
        ) from error


def _on_one_line(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    print(f"cprec: {message}", file=sys.stderr)
