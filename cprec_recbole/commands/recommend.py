"""`cprec recommend`: the best next items for histories of tokens, from a folder alone."""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from itertools import groupby, islice
from typing import Any, NamedTuple, TextIO

from cprec_recbole.config import CompressionError, check_choice, reject_unknown
from cprec_recbole.models import load_pretrained
from cprec_recbole.models.engine import ENGINES
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.models.vocabulary import UNKNOWN

_BATCH = 64
_OURS = ("history", "items", "scores", "error", "line")  # of a request, what no answer repeats


class _Asked(NamedTuple):
    answer: dict[str, Any]
    ids: list[int]
    k: Any
    exclude_seen: bool


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
    parser.add_argument("folder", metavar="FOLDER")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--history", metavar="50,181", help="tokens, oldest first; those with a comma need --input"
    )
    source.add_argument("--input", metavar="FILE", help="JSON lines; - is standard input")
    parser.add_argument("-k", type=int, default=20, help="how many items (default: %(default)s)")
    parser.add_argument("--unknown", default="warn", metavar="{" + ",".join(UNKNOWN) + "}")
    parser.add_argument("--exclude-seen", action="store_true", help="leave out the history's items")
    parser.add_argument(
        "--engine",
        default="auto",
        metavar="{" + ",".join(ENGINES) + "}",
        help="what computes hidden states (default: onnxruntime where it can be had, else torch)",
    )


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Print a table for one history, or answer a line for each line read."""
    reject_unknown(passed_on, ("history", "input", "k", "unknown", "exclude-seen", "engine"))
    check_choice("unknown", options.unknown, UNKNOWN)
    model = load_pretrained(options.folder, engine=options.engine)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"cprec: {message}", file=sys.stderr)
        if options.history is None:
            return _answer_lines(model, options)
        history = [token.strip() for token in options.history.split(",") if token.strip()]
        best = model.recommend_tokens(
            [history], options.k, unknown=options.unknown, exclude_seen=options.exclude_seen
        )
    for place, (token, score) in enumerate(zip(best.tokens[0], best.scores[0].tolist()), start=1):
        print(f"{place:>3}  {token}  {score:.4f}")
    return 0


def _answer_lines(model: CompressedRecommender, options: argparse.Namespace) -> int:
    """Answer every line, a batch at a time (one by one from a person or a pipe); returns 1 where
    one could not be answered. A bad line gets an `error` of its own; the next ones are read."""
    failed = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        # half a character, which JSON can spell and UTF-8 cannot, comes out as JSON spells it
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    with _opened(options.input) as lines:
        numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        while batch := list(islice(numbered, 1 if options.input == "-" else _BATCH)):
            answers: list[dict[str, Any]] = [{} for _ in batch]
            asked: list[_Asked] = []
            for (_, line), answer in zip(batch, answers):
                try:
                    asked.append(_asked(model, line, options, answer))
                except CompressionError as error:
                    answer["error"] = str(error)
            for _, group in groupby(asked, lambda each: repr((each.k, each.exclude_seen))):
                _answer(model, list(group))
            for (number, _), answer in zip(batch, answers):
                if "error" in answer:
                    answer["line"], failed = number, True
                print(json.dumps(answer, ensure_ascii=False))
            sys.stdout.flush()
    return int(failed)


def _asked(
    model: CompressedRecommender, line: str, options: argparse.Namespace, answer: dict[str, Any]
) -> _Asked:
    """What a line asks for; its answer gets what else it held."""
    got = repr(line.strip()[:60])
    try:
        request = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CompressionError(f"Expected a line of JSON, but got {got}: {error}.") from error
    if isinstance(request, list):
        request = {"history": request}
    if not isinstance(request, dict) or not isinstance(request.get("history"), list):
        raise CompressionError(
            f"Expected a list of tokens, or an object with one as `history`, but got {got}."
        )
    answer |= {name: value for name, value in request.items() if name not in _OURS}
    exclude_seen = request.get("exclude_seen", options.exclude_seen)
    if not isinstance(exclude_seen, bool):
        raise CompressionError(
            f"Expected `exclude_seen` to be true or false, but got {exclude_seen!r}."
        )
    ids = model.known_vocabulary().ids(request["history"], options.unknown, "the history")
    if not ids:
        raise CompressionError(
            "Expected every history to hold a token of the catalogue, but this one has none."
        )
    return _Asked(answer, ids, request.get("k", options.k), exclude_seen)


def _answer(model: CompressedRecommender, asked: list[_Asked]) -> None:
    """Answer histories for which the same options hold."""
    try:
        best = model.recommend([each.ids for each in asked], asked[0].k, asked[0].exclude_seen)
    except CompressionError as error:
        if len(asked) == 1:
            asked[0].answer["error"] = str(error)
        else:
            for each in asked:  # not all of them are bad
                _answer(model, [each])
        return
    vocabulary = model.known_vocabulary()
    for each, items, scores in zip(asked, best.items.tolist(), best.scores.tolist()):
        each.answer["items"] = [vocabulary.token(item) for item in items]
        each.answer["scores"] = [round(score, 6) for score in scores]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _opened(name: str) -> TextIO:
    file = sys.stdin.fileno() if name == "-" else name
    try:  # a bad line is one line
        return open(file, encoding="utf-8-sig", errors="replace", closefd=name != "-")
    except OSError as error:
        raise CompressionError(
            f"Expected `input` to be a file that can be read, but got {name}: {error.strerror}."
        ) from error
