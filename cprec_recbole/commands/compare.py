"""`cprec compare`: an uncompressed and a compressed model, trained side by side; or a study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cprec_recbole.commands.common import (
    MODELS,
    add_compression,
    compression_for,
    console,
    dataset_of,
    from_files,
    model_of,
)
from cprec_recbole.compare import Spec, as_screen, findings_of, run_study, write_report
from cprec_recbole.compare.contenders import ALL, COMPRESSED, CONTROLS
from cprec_recbole.compare.results import subject_of
from cprec_recbole.config import CompressionError


def add_parser(commands: Any) -> None:
    """Add the command to `cprec`."""
    compare = commands.add_parser(
        "compare",
        help="train an uncompressed and a compressed model side by side",
        description="Train an uncompressed and a compressed model side by side and report quality, "
        "size and speed. Any further --name=value is passed on to RecBole.",
        allow_abbrev=False,
    )
    compare.set_defaults(run=run)
    add = compare.add_argument
    add("--model", choices=MODELS, help="or in --config; none for a study")
    add("--dataset", help="RecBole's name, or in --config (default: ml-100k)")
    where = "where data sets are (RecBole: dataset)"
    add("--data-path", "--data_path", metavar="FOLDER", help=where)
    add("--seeds", type=int, metavar="N", help="repeat with N seeds (default: 1)")
    add("--with-stock", action="store_true", default=None, help="also RecBole's own model")
    lengths = (10, 20, 50, 100)
    add("--length", type=int, choices=lengths, help="items of a history (RecBole: 50)")
    add("--out", default="cprec-compare", metavar="FOLDER", help="for trials, tables and a page")
    names = f"also controls: {ALL}, or out of {', '.join(CONTROLS)}"
    add("--controls", nargs="+", default=[], metavar="NAME", help=names)
    add_compression(compare)
    add("--study", metavar="FILE", help="YAML: many comparisons; see docs/comparing.md")
    add("--jobs", type=int, metavar="N", help="trainings at a time (default: 1)")
    add("--only", nargs="+", metavar="KEY", help="patterns of keys of runs")
    add("--retry", action="store_true", help="try again what failed")
    add("--summary", action="store_true", help="only write the tables of --out")
    add("--latex", action="store_true", help="also compare.tex")
    against = "the contender that others are measured against, beside the uncompressed model"
    add("--against", metavar="NAME", help=against)


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Train, measure, print the table of a single comparison and write everything; or write the
    tables alone. Gives 1 where a run that was asked for has failed."""
    screen, out, failed = console(), Path(options.out), 0
    if options.study is not None or options.summary:
        _check_alone(options, passed_on)
    if not options.summary:
        spec = _single(options, passed_on) if options.study is None else Spec.read(options.study)
        if options.against is not None:
            subject_of(spec.contenders, options.against)  # a wrong name is no news after hours
        data_path = options.data_path or {**from_files(options), **passed_on}.get("data_path")
        done = run_study(
            spec,
            out,
            jobs=1 if options.jobs is None else options.jobs,
            data_path=data_path and str(Path(data_path).resolve()),
            command=command,
            only=options.only,
            retry=options.retry,
            console=screen,
        )
        for goal in done.dropped:
            same = goal._replace(contender=COMPRESSED).key
            screen.print(f"{goal.key}: left out, the same model as {same}", soft_wrap=True)
        for goal, reason in done.failed.items():
            line = f"{goal.key} failed: {reason}"
            screen.print(line, soft_wrap=True, markup=False, highlight=False)
        if done.failed:
            failed = len(done.failed)
            screen.print(f"{failed} of {len(done.goals)} runs failed; --retry tries them again.")
        if len(done.goals) == failed:
            return min(failed, 1)
    findings = findings_of(out, options.against)
    if findings.study.spec.is_single and findings.tables and not options.summary:
        screen.print(as_screen(findings))
    written = write_report(findings, out, latex=options.latex)
    screen.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True, markup=False)
    return min(failed, 1)


def _single(options: argparse.Namespace, passed_on: dict[str, Any]) -> Spec:
    """One model on one data set, by the command line and the files of --config."""
    model = model_of(options, MODELS)
    own = {"MAX_ITEM_LIST_LENGTH": options.length, "data_path": options.data_path}
    return Spec.single(
        model,
        dataset_of(options),
        compression_for(model, options),
        controls=options.controls,
        with_stock=bool(options.with_stock),
        seeds=1 if options.seeds is None else options.seeds,
        options=passed_on | {name: value for name, value in own.items() if value is not None},
        config_files=options.config,
    )


def _check_alone(options: argparse.Namespace, passed_on: dict[str, Any]) -> None:
    """Raise a CompressionError for what a study's file says, or what trains where nothing does."""
    names = ["model", "length", "ranks", "cutoffs", "sharing", "softmax", "tied", "training"]
    names += ["dataset", "seeds", "controls", "with_stock", "config"]
    own = {name: getattr(options, name) for name in names}
    for name in (name for name, value in (own | passed_on).items() if value not in (None, [])):
        raise CompressionError(
            f"Expected a study to be all in its file, but got `{name}` on the command line."
        )
    for name in ("study", "only", "retry", "jobs") if options.summary else ():
        if getattr(options, name):
            raise CompressionError(
                f"Expected `{name}` without --summary, which trains nothing, but got both."
            )
