"""From a file of millions of interactions to windows: seconds and memory by step, one run.

    python benchmarks/data.py [--interactions N ...] [--repeat N] [--out FOLDER]

`create_dataset` and `data_preparation` of a CpSASRec, leave one out, on made-up files in RecBole's
format, kept in `benchmarks/cache/`; beside it RecBole's own SASRec on the smallest of them, because
it is slow. Every measurement is a process of its own, and the contenders take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import pandas as pd

CACHE = Path(__file__).parent / "cache"
STATUS = Path("/proc/self/status")
N_ITEMS, PER_USER = 1_000_000, 50  # items to draw from; mean interactions of a user
LENGTH, N_BATCHES = 50, 200
CHUNK = 10**6
# RecBole's methods that do a step; what they call in turn is counted with its own step
STEPS = {
    "_load_data": "read the file",
    "_data_filtering": "filters",
    "_remap_ID_all": "tokens to ids",
    "_change_feat_format": "order by user and time, histories",
    "build": "order by time, split, windows",
}
REST, EPOCH = "rest", f"{N_BATCHES} training batches"
CONTENDERS = {"SASRec": "RecBole", "CpSASRec": "ours"}


def made_up(n_interactions: int) -> str:
    """The name of a data set in the cache: items by Zipf's law, users of unequal activity, in no
    order of time."""
    name = f"made-up-{n_interactions}"
    file = CACHE / name / f"{name}.inter"
    if not file.exists():
        rng = np.random.default_rng(0)
        activity = rng.lognormal(size=n_interactions // PER_USER).cumsum()
        popularity = (1 / np.arange(1, N_ITEMS + 1)).cumsum()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text("user_id:token\titem_id:token\ttimestamp:float\n")
        for start in range(0, n_interactions, CHUNK):
            n = min(CHUNK, n_interactions - start)
            users, items = (
                np.searchsorted(edges, rng.random(n) * edges[-1])
                for edges in (activity, popularity)
            )
            rows = {
                "user": "u" + pd.Series(users).astype(str),
                "item": "i" + pd.Series(items).astype(str),
                "time": rng.integers(1_500_000_000, 1_600_000_000, size=n),
            }
            pd.DataFrame(rows).to_csv(part, sep="\t", header=False, index=False, mode="a")
        part.rename(file)
    return name


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at the peak since it was last forgotten."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


class Clock:
    """Seconds and peak memory of steps, each without the steps inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self.running = [REST]
        self.since = perf_counter()

    def charge(self) -> None:
        """Charge what has passed to the step that is running."""
        step, now = self.running[-1], perf_counter()
        self.seconds[step] = self.seconds.get(step, 0) + now - self.since
        self.peaks[step] = max(self.peaks.get(step, 0), memory("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.since = perf_counter()

    def watch(self, owner: type, name: str, step: str) -> None:
        """Charge a method to a step."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            self.running.append(step)
            result = method(*args, **kwargs)
            self.charge()
            self.running.pop()
            return result

        setattr(owner, name, watched)


def as_recbole_has_it(owner: type) -> None:
    """Undo what the plugin puts in the place of a class's methods."""
    for name, method in list(vars(owner).items()):
        if hasattr(method, "_cprec_original"):
            setattr(owner, name, method._cprec_original)


def measure(model: str, name: str) -> dict[str, Any]:
    """One measurement, in this process."""
    from recbole.data import create_dataset, data_preparation
    from recbole.data.dataset import Dataset, SequentialDataset

    from cprec_recbole.host.library import recbole_config

    options = {
        "data_path": str(CACHE),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "show_progress": False,
        "state": "ERROR",
    }
    config = recbole_config(model, name, options)
    if CONTENDERS[model] == "RecBole":
        for owner in (Dataset, SequentialDataset):
            as_recbole_has_it(owner)
    clock = Clock()
    for method, step in STEPS.items():
        clock.watch(SequentialDataset, method, step)
    before, started = memory("VmRSS"), process_time()
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    clock.charge()
    wall, processor = sum(clock.seconds.values()), process_time() - started
    clock.running = [EPOCH]
    for n_batches, _ in enumerate(train, 1):
        if n_batches == N_BATCHES:
            break
    clock.charge()
    return {
        "seconds": {**clock.seconds, "total": wall, "processor": processor},
        "peaks": {**clock.peaks, "total": max(clock.peaks.values()), "imports": before},
        "users": dataset.user_num - 1,
        "items": dataset.item_num - 1,
        "windows": train.sample_size,
    }


def middle(runs: list[dict[str, Any]], of: str, step: str) -> float:
    """The median of a figure."""
    return median(run[of][step] for run in runs)


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Seconds and peaks of the contenders of one size, step by step."""
    names = [CONTENDERS[model] for model in runs]
    versus = len(runs) > 1
    head = [*(f"{name}, s" for name in names), *["ratio"][: int(versus)]]
    head += [f"{name}, peak MiB" for name in names]
    lines = [f"| step | {' | '.join(head)} |", "|---|" + "--:|" * len(head)]
    for step in [*STEPS.values(), REST, "total", "processor", EPOCH]:
        seconds = [middle(of, "seconds", step) for of in runs.values()]
        cells = [f"{value:.2f}" for value in seconds]
        if versus:
            cells.append(f"÷ {seconds[0] / seconds[1]:.1f}")
        peaks = [
            f"{middle(of, 'peaks', step):,.0f}" for of in runs.values() if step in of[0]["peaks"]
        ]
        cells += peaks or [""] * len(runs)
        label = {"total": "**all of it**", "processor": "of it, time of the processor"}
        lines.append(f"| {label.get(step, step)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interactions", type=int, nargs="+", default=[10**6, 10**7])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return

    from cprec_recbole.environment import environment
    from cprec_recbole.files import write_text

    sizes = sorted(arguments.interactions)
    lines = [
        "# From a file of interactions to windows",
        "",
        f"`python benchmarks/data.py --interactions {' '.join(map(str, sizes))} --repeat "
        f"{arguments.repeat}`",
        "",
        ", ".join(f"{name} {value}" for name, value in environment().items() if value),
        "",
        f"`create_dataset` and `data_preparation` of CpSASRec (ours) and SASRec (RecBole's "
        f"SequentialDataset), leave one out, at most {LENGTH} items, one thread. Medians of "
        f"{arguments.repeat} runs; peaks are of the whole process, imports included.",
    ]
    for size in sizes:
        name = made_up(size)
        models = list(CONTENDERS) if size == sizes[0] else ["CpSASRec"]
        runs: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
        for _ in range(arguments.repeat):
            for model in models:
                command = [sys.executable, "-W", "ignore", __file__, "--measure", model, name]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs[model].append(json.loads(done.stdout.splitlines()[-1]))
                print(size, model, runs[model][-1], flush=True)
        ours = runs["CpSASRec"]
        totals = [run["seconds"]["total"] for run in ours]
        megabytes = (CACHE / name / f"{name}.inter").stat().st_size / 1e6
        lines += [
            "",
            f"## {size:,} interactions",
            "",
            f"{ours[0]['users']:,} users, {ours[0]['items']:,} items, a file of {megabytes:,.0f} "
            f"MB; {ours[0]['windows']:,} windows. The imports alone take "
            f"{middle(ours, 'peaks', 'imports'):,.0f} MiB. Ours took {min(totals):.1f} to "
            f"{max(totals):.1f} s.",
            "",
            *table(runs),
        ]
        write_text(arguments.out / "data.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
