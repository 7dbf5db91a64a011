"""`cprec compare`: an uncompressed and a compressed model, trained side by side; or a study."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from cprec_recbole.commands.common import (
    MODELS,
    add_compression,
    compression_for,
    console,
    dataset_of,
    model_of,
)
from cprec_recbole.compare import Experiment, as_markdown, as_table, contenders, save
from cprec_recbole.compare.controls import ALL, CONTROLS, find_controls
from cprec_recbole.compare.findings.runs import read_runs
from cprec_recbole.compare.findings.standings import subject_of
from cprec_recbole.compare.results import COMPRESSED, as_json
from cprec_recbole.compare.study import Spec, run_study, write_summary
from cprec_recbole.config import CompressionError
from cprec_recbole.files import make_folder


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
    compare.add_argument("--model", choices=MODELS, help="or in --config; none for a study")
    compare.add_argument("--dataset", help="RecBole's name, or in --config (default: ml-100k)")
    compare.add_argument(
        "--data-path",
        "--data_path",
        metavar="FOLDER",
        help="where data sets are (RecBole: dataset)",
    )
    compare.add_argument("--seeds", type=int, metavar="N", help="repeat with N seeds (default: 1)")
    compare.add_argument("--with-stock", action="store_true", help="also RecBole's own model")
    compare.add_argument(
        "--length", type=int, choices=(10, 20, 50, 100), help="items of a history (RecBole: 50)"
    )
    compare.add_argument(
        "--out", default="cprec-compare", metavar="FOLDER", help="for compare.json and compare.md"
    )
    compare.add_argument(
        "--controls",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"also controls: {ALL}, or out of {', '.join(CONTROLS)}",
    )
    add_compression(compare)
    study = compare.add_argument_group("study", "many comparisons; see docs/comparing.md")
    study.add_argument("--study", metavar="FILE", help="YAML: what to run; goes on where it was")
    study.add_argument("--jobs", type=int, metavar="N", help="trainings at a time (default: 1)")
    study.add_argument("--only", nargs="+", metavar="KEY", help="patterns of keys of runs")
    study.add_argument("--retry", action="store_true", help="try again what failed")
    study.add_argument("--summary", action="store_true", help="only write the tables of --out")
    study.add_argument("--latex", action="store_true", help="also compare.tex")
    study.add_argument(
        "--against",
        metavar="NAME",
        help="the contender that others are measured against, beside the uncompressed model",
    )


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Train, measure, print the table and write it; or run a study. Gives 1 where a contender has
    failed."""
    if options.study is not None or options.summary:
        return _study(options, passed_on)
    options.model = model_of(options, MODELS)
    for name in ("only", "retry", "latex", "against", "jobs"):
        if getattr(options, name):
            raise CompressionError(
                f"Expected `{name}` only with --study or --summary, but got it without."
            )
    if options.data_path is not None:
        passed_on = {"data_path": options.data_path, **passed_on}
    if options.length is not None:
        passed_on = {"MAX_ITEM_LIST_LENGTH": options.length, **passed_on}
    compression = compression_for(options.model, options)
    if "loss_memory" in passed_on:  # a contender's own options win over RecBole's
        compression = replace(compression, loss_memory=passed_on["loss_memory"])
    columns = contenders(
        options.model,
        compression,
        with_stock=options.with_stock,
        controls=find_controls(options.controls),
    )
    screen = console()
    logging.getLogger("recbole").setLevel(logging.ERROR)
    dataset, seeds = dataset_of(options), 1 if options.seeds is None else options.seeds
    experiment = Experiment(columns, dataset, seeds, passed_on, options.config)
    out = Path(options.out)
    make_folder(out)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, valid {task.fields[score]}"),
        TimeElapsedColumn(),
        console=screen,
    ) as progress:
        tasks: dict[tuple[str, int], TaskID] = {}

        def on_run(contender: str, seed: int) -> None:
            _finish(progress, tasks)
            label = f"{contender}, seed {seed}"
            tasks[contender, seed] = progress.add_task(label, total=experiment.epochs, score="-")

        def on_epoch(contender: str, seed: int, epoch: int, score: float) -> None:
            shown = f"{score:.4f}"
            progress.update(tasks[contender, seed], completed=epoch + 1, score=shown)
            if not screen.is_terminal:  # a log shows no bars: a line an epoch
                screen.print(f"{contender}, seed {seed}, epoch {epoch + 1}: valid {shown}")

        comparison = experiment.run(command, on_epoch, on_run)
        _finish(progress, tasks)
    save(as_json(comparison), out / "compare.json")
    save(as_markdown(comparison), out / "compare.md")
    screen.print(as_table(comparison))
    for name, reason in comparison.failed.items():
        screen.print(f"{name} failed, {reason}", soft_wrap=True, markup=False, highlight=False)
    screen.print(f"Written: {out / 'compare.json'}, {out / 'compare.md'}", markup=False)
    return 1 if comparison.failed else 0


def _study(options: argparse.Namespace, passed_on: dict[str, Any]) -> int:
    """Run what is left of a study, then write its tables; or the tables alone. Gives 1 where a run
    that was asked for has failed."""
    own = {name: getattr(options, name) for name in ("model", "length", "ranks", "cutoffs")}
    own |= {name: getattr(options, name) for name in ("sharing", "softmax", "tied", "training")}
    own |= {name: getattr(options, name) for name in ("dataset", "seeds")}
    given = [name for name, value in (own | passed_on).items() if value is not None]
    given += [name for name in ("controls", "with_stock", "config") if getattr(options, name)]
    if given:
        raise CompressionError(
            f"Expected a study to be all in its file, but got `{given[0]}` on the command line."
        )
    screen, out, against = console(), Path(options.out), options.against
    failed = 0
    for name in ("only", "retry", "jobs") if options.summary else ():
        if getattr(options, name):
            raise CompressionError(
                f"Expected `{name}` without --summary, which trains nothing, but got both."
            )
    if not options.summary:
        file = Path(options.study)
        shown = file.name if file.is_absolute() else options.study
        data = "" if options.data_path is None else " --data-path DATA"
        spec = Spec.read(options.study)
        if against is not None:
            # a wrong name is no news after hours
            subject_of([*spec.contenders, *_finished(out)], against)
        done = run_study(
            spec,
            out,
            jobs=1 if options.jobs is None else options.jobs,
            data_path=options.data_path and str(Path(options.data_path).resolve()),
            command=f"cprec compare --study {shown} --out FOLDER{data}",
            only=options.only,
            retry=options.retry,
            console=screen,
        )
        for goal in done.dropped:
            stands = replace(goal, contender=COMPRESSED).key
            screen.print(
                f"{goal.key}: left out, it would be the same model as {stands}", soft_wrap=True
            )
        if len(done.dropped) == len(done.goals):
            return 0
        failed = _failed(out, {goal.key for goal in done.goals})
        if failed:
            screen.print(
                f"{failed} of {len(done.goals)} runs failed, each for a reason that compare.md "
                "gives; --retry tries them again.",
                soft_wrap=True,
            )
        if against is not None and against not in _finished(out):
            screen.print(f"No run of {against} is finished: nothing is measured against it.")
            against = None
    written = write_summary(out, latex=options.latex, against=against)
    paths = ", ".join(str(path) for path in written)
    screen.print(f"Written: {paths}", soft_wrap=True, markup=False)
    return 1 if failed else 0


def _failed(out: Path, wanted: set[str]) -> int:
    """How many of the wanted runs failed."""
    return sum(run.error is not None and run.key in wanted for run in read_runs(out))


def _finished(out: Path) -> set[str]:
    """The contenders of which a run is finished in a study's folder."""
    try:
        return {run.contender for run in read_runs(out) if run.error is None}
    except CompressionError:
        return set()  # no runs yet


def _finish(progress: Progress, tasks: dict[tuple[str, int], TaskID]) -> None:
    """Early stopping ends a run before its last epoch; its bar is full all the same."""
    for task in tasks.values():
        progress.update(task, total=progress.tasks[task].completed)
        progress.stop_task(task)
