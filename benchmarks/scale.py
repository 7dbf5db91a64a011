"""What a step of the tree costs at a hundred million and a billion items, from measured pieces.

    python benchmarks/scale.py [--processes 8] [--out FOLDER]

Nothing of that size is run. From `results/training-0.1.json`, which training.py wrote, come the
time of a logit and of a parameter, as the differences between its catalogues of 1 and 10 million
items and 100 thousand; counts of logits, parameters and messages are arithmetic, under Zipf's law.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (10**6, 10**7, 10**8, 10**9)
RANKS, HEAD, DIM, TARGETS = (64, 21, 7, 2), 20_000, 64, 2048
COPIES = 16  # bytes of a parameter with its gradient and Adam's two moments
ITEM_BYTES = 12  # of the order of the items and its reverse
BUCKETS = 4  # bytes of a parameter in which DistributedDataParallel sends its gradient
TREE = "ours, tree"


def shares_below(ends: np.ndarray, n_items: int) -> np.ndarray:
    """Share of the occurrences that the most popular items have, by Zipf's law."""
    harmonic = np.log(np.maximum(ends, 1)) + 0.5772
    return harmonic / (math.log(n_items) + 0.5772)


def blocks_of(n_items: int, ranks: tuple[int, ...]) -> list[tuple[int, int, float]]:
    """Size, rank and share of the targets of each block, at the cheapest cutoffs (training.py)."""
    head = min(HEAD, n_items // 5)
    ends = np.unique(np.geomspace(head, n_items, 200).astype(np.int64))
    below = shares_below(ends, n_items)
    cost, before = np.full(len(ends), np.inf), []
    cost[0] = 0.0
    for rank in ranks[1:]:
        sizes, targets = np.subtract.outer(ends, ends), np.subtract.outer(below, below)
        total = cost + np.where(sizes > 0, sizes * targets * (18 + rank), np.inf)
        before.append(total.argmin(1))
        cost = total.min(1)
    place, cuts = len(ends) - 1, [len(ends) - 1]
    for starts in reversed(before):
        place = int(starts[place])
        cuts.append(place)
    cuts.reverse()
    found = [(int(ends[cuts[0]]), ranks[0], float(below[cuts[0]]))]
    for rank, start, end in zip(ranks[1:], cuts, cuts[1:]):
        found.append((int(ends[end] - ends[start]), rank, float(below[end] - below[start])))
    return found


def n_parameters(blocks: list[tuple[int, int, float]]) -> int:
    """Of the factors."""
    return sum(size * rank + (rank * DIM if rank < DIM else 0) for size, rank, _ in blocks)


def work_of(blocks: list[tuple[int, int, float]]) -> float:
    """What a step computes, in operations: the head for every target, a block for its own."""
    return TARGETS * sum(
        size * (18 + rank) * (share if j else 1.0) for j, (size, rank, share) in enumerate(blocks)
    )


def measured(file: Path) -> tuple[float, dict[str, Any]]:
    """Nanoseconds of an operation as `work_of` counts them, and where they come from."""
    content = json.loads(file.read_text())
    rows, threads = content["rows"], content["environment"]["torch_threads"]
    tree = {r["items"]: r for r in rows if r["contender"] == TREE and r["dataset"] == "made up"}
    small, large = tree[100_000], tree[10_000_000]

    def work(row: dict[str, Any]) -> float:
        ends = np.array(row["cutoffs"])
        below = shares_below(ends, row["items"])
        sizes, shares = np.diff(ends, prepend=0), np.diff(below, prepend=0.0)
        return work_of(list(zip(sizes, row["ranks"], shares)))

    nanoseconds = 1e6 * (large["ms"] - small["ms"]) / (work(large) - work(small))
    here = "one thread" if threads == 1 else f"{threads} threads"
    return nanoseconds, {"small": small, "large": large, "threads": here}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    world = arguments.processes
    nanoseconds, rows = measured(arguments.out / "training-0.1.json")
    lines = [
        "# A step at a hundred million and a billion items, computed",
        "",
        f"`python benchmarks/scale.py --processes {world}`",
        "",
        f"Measured: {nanoseconds:.3f} ns for one of the operations by which blocks are chosen (18 "
        "+ rank for a logit; optimizer and gradients of the rows included), the difference between "
        f"{rows['small']['ms']:,.0f} ms at 100 thousand and {rows['large']['ms']:,.0f} ms at 10 "
        f"million items in training-0.1.md, {rows['threads']}. Computed from that, under Zipf's "
        "law: "
        f"{TARGETS:,} targets a step, tree softmax, ranks {'/'.join(map(str, RANKS))}, a head of "
        f"{HEAD:,}. Memory: {COPIES} bytes a parameter (weights, gradient, Adam) and {ITEM_BYTES} "
        f"an item; on several processes {BUCKETS} bytes a parameter more, in which gradients "
        f"travel. Traffic: what one of {world} processes sends in a step to add all gradients up.",
        "",
        "| items | blocks | parameters | GB on one process "
        f"| GB on each of {world} | GB a step | seconds a step, {rows['threads']} |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for n_items in SIZES:
        blocks = blocks_of(n_items, RANKS)
        parameters = n_parameters(blocks)
        alone = COPIES * parameters + ITEM_BYTES * n_items
        traffic = 2 * 4 * parameters * (world - 1) / world  # around the ring
        seconds = 1e-9 * nanoseconds * work_of(blocks)
        ends = np.cumsum([size for size, _, _ in blocks])
        lines.append(
            f"| {n_items:,} | {' / '.join(f'{end:,}' for end in ends)} "
            f"| {parameters / 1e6:,.1f} M | {alone / 1e9:,.1f} "
            f"| {(alone + BUCKETS * parameters) / 1e9:,.1f} | {traffic / 1e9:,.2f} "
            f"| {seconds:,.2f} |"
        )
    (arguments.out / "scale.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
