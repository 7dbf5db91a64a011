"""`cprec`: the console command."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from cprec_recbole.backbones import BACKBONES
from cprec_recbole.catalogue import size_rows
from cprec_recbole.compare import Experiment, as_markdown, as_table, contenders, save
from cprec_recbole.compare.results import as_json
from cprec_recbole.config import (
    OBJECTIVES,
    SHARING_SCHEMES,
    SOFTMAXES,
    CompressionConfig,
    CompressionError,
)
from cprec_recbole.host import read_options

MODELS = tuple(backbone.host.__name__ for backbone in BACKBONES)
TABLE_WIDTH = 140
REPORT_CAPTION = (
    "Parameters by part; sharing: sets of parameters kept/layers; softmax +: what the softmax has "
    "beside the table; MFLOP: to score the catalogue for one user, once its hidden state is known."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `cprec`; returns the exit status. Errors of the user's are one line on standard error."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options, rest = _parser().parse_known_args(argv)
        return options.run(options, recbole_options(rest), shlex.join(["cprec", *argv]))
    except CompressionError as error:
        print(f"cprec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cprec: stopped", file=sys.stderr)
        return 130


def recbole_options(arguments: Sequence[str]) -> dict[str, Any]:
    """RecBole options off a command line: `--name=value` or `--name value`, values as YAML."""
    options: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise CompressionError(f"Expected options as --name=value, but got {argument!r}.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise CompressionError(f"Expected a value for --{name}, but got none.")
            text = rest.pop(0)
        options[name] = _value(text)
    return options


def _compare(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    if options.length is not None:
        passed_on = {"MAX_ITEM_LIST_LENGTH": options.length, **passed_on}
    columns = contenders(options.model, _compression(options), with_stock=options.with_stock)
    console = _console()
    logging.getLogger("recbole").setLevel(logging.ERROR)
    experiment = Experiment(columns, options.dataset, options.seeds, passed_on, options.config)
    out = Path(options.out)
    _make_folder(out)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, valid {task.fields[score]}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        tasks: dict[tuple[str, int], TaskID] = {}

        def on_run(contender: str, seed: int) -> None:
            _finish(progress, tasks)
            label = f"{contender}, seed {seed}"
            tasks[contender, seed] = progress.add_task(label, total=experiment.epochs, score="-")

        def on_epoch(contender: str, seed: int, epoch: int, score: float) -> None:
            shown = f"{score:.4f}"
            progress.update(tasks[contender, seed], completed=epoch + 1, score=shown)
            if not console.is_terminal:  # a log shows no bars: a line an epoch
                console.print(f"{contender}, seed {seed}, epoch {epoch + 1}: valid {shown}")

        comparison = experiment.run(command, on_epoch, on_run)
        _finish(progress, tasks)
    save(as_json(comparison), out / "compare.json")
    save(as_markdown(comparison), out / "compare.md")
    console.print(as_table(comparison))
    console.print(f"Written: {out / 'compare.json'}, {out / 'compare.md'}")
    return 0


def _finish(progress: Progress, tasks: dict[tuple[str, int], TaskID]) -> None:
    """Early stopping ends a run before its last epoch; its bar is full all the same."""
    for task in tasks.values():
        progress.update(task, total=progress.tasks[task].completed)
        progress.stop_task(task)


def _report(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    title, rows = size_rows(
        options.model,
        _compression(options),
        options.dataset,
        options.items,
        passed_on,
        options.config,
    )
    table = Table(title=title, title_justify="left", caption=REPORT_CAPTION, caption_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row.values())
    _console().print(table)
    return 0


def _console() -> Console:
    """A terminal as wide as it is; a file or a pipe as wide as the tables are."""
    return Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)


def _compression(options: argparse.Namespace) -> CompressionConfig:
    """The compression options: the files', then the command line's."""
    names = CompressionConfig.option_names()
    found: dict[str, Any] = {}
    for file in options.config:
        found |= {name: value for name, value in read_options(file).items() if name in names}
    given = {name: getattr(options, name) for name in names}
    return CompressionConfig(**found | {k: v for k, v in given.items() if v is not None})


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressionError(
            f"Expected `out` to be a folder that can be written, but got {out}: {error.strerror}."
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cprec",
        description="CpRec for RecBole: small and fast sequential recommenders.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="train an uncompressed and a compressed model side by side",
        description="Train an uncompressed and a compressed model side by side and report quality, "
        "size and speed. Any further --name=value is passed on to RecBole.",
        allow_abbrev=False,
    )
    compare.set_defaults(run=_compare)
    compare.add_argument("--model", required=True, choices=MODELS)
    compare.add_argument(
        "--dataset", default="ml-100k", help="RecBole's name (default: %(default)s)"
    )
    compare.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N seeds")
    compare.add_argument("--with-stock", action="store_true", help="also RecBole's own model")
    compare.add_argument(
        "--length", type=int, choices=(10, 20, 50, 100), help="items of a history (RecBole: 50)"
    )
    compare.add_argument(
        "--out", default="cprec-compare", metavar="FOLDER", help="for compare.json and compare.md"
    )
    report = commands.add_parser(
        "report",
        help="sizes alone, before any training",
        description="What each choice of ranks, cutoffs and sharing would cost, untrained.",
        allow_abbrev=False,
    )
    report.set_defaults(run=_report)
    report.add_argument("model", choices=MODELS)
    catalogue = report.add_mutually_exclusive_group()
    catalogue.add_argument("--dataset", help="RecBole's name (default: ml-100k)")
    catalogue.add_argument("--items", type=int, metavar="N", help="a catalogue of N items")
    for command in (compare, report):
        command.add_argument(
            "--config", action="append", default=[], metavar="FILE", help="a RecBole YAML file"
        )
        _add_compression(command)
    return parser


def _add_compression(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compression")
    group.add_argument("--ranks", type=_numbers, metavar="64,16,4")
    group.add_argument("--cutoffs", type=_numbers, metavar="400,900 or 0.1,0.3")
    group.add_argument("--sharing", metavar="{" + ",".join(SHARING_SCHEMES) + "}")
    group.add_argument("--softmax", metavar="{" + ",".join(SOFTMAXES) + "}")
    group.add_argument("--tied", type=_value, metavar="{true,false}")
    group.add_argument("--training", metavar="{" + ",".join(OBJECTIVES) + "}")


def _value(text: str) -> Any:
    """A value as YAML writes it; `64,16,4` is a list too."""
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str) and "," in value and not value.startswith(("[", "{")):
            value = yaml.safe_load(f"[{value}]")
    except yaml.YAMLError as error:
        raise CompressionError(f"Expected a value as in YAML, but got {text!r}.") from error
    return value


def _numbers(text: str) -> Any:
    """A list of numbers; one number is a list of one."""
    value = _value(text)
    return [value] if isinstance(value, int | float) else value


if __name__ == "__main__":
    sys.exit(main())
