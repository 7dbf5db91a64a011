"""What each process holds and does where the tail is spread over 1, 2 and 4 of them.

    python benchmarks/shards.py [--items N] [--processes 1 2 4] [--out FOLDER]

A step of the tree softmax: look-ups of 2,048 items, the loss of as many targets, gradients, Adam;
the targets are shared out over the processes, which talk through Gloo on one machine. Loss and the
best items have to be those of one process. Items occur by Zipf's law, as in training.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from inference import status_mib
from training import DIM, TARGETS, cheapest_cutoffs, ranks_of, zipf_batches, zipf_counts

from cprec_recbole.compare.results import environment, save
from cprec_recbole.embedding import Block, BlockEmbedding
from cprec_recbole.optimizers import build_optimizer
from cprec_recbole.parallel.exchange import Group
from cprec_recbole.parallel.shards import ShardedBlock
from cprec_recbole.partition import Partition
from cprec_recbole.softmax import TreeSoftmax

STEPS = 3


def child(n_items: int) -> dict[str, Any]:
    """One process's steps."""
    dist.init_process_group("gloo")
    group = Group.current()
    rank, world = dist.get_rank(), dist.get_world_size()
    counts, ranks = zipf_counts(n_items), ranks_of(n_items)
    partition = Partition.from_counts(counts, cheapest_cutoffs(counts, ranks))
    batches = zipf_batches(n_items, counts)
    items, targets = (part.flatten() for part in next(batches))
    own = torch.arange(len(items)).tensor_split(world)[rank]
    at_first = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what comes now
    torch.manual_seed(2020)
    tail = Block if group is None else partial(ShardedBlock, group=group)
    table = BlockEmbedding(partition, ranks, DIM, tail)
    table.reset_parameters(std=0.02)
    head = TreeSoftmax(table)
    optimizer = build_optimizer(head, "adam", 1e-3, 0.0)
    times, losses = [], []
    real = targets[own] != 0
    n_targets = int((targets != 0).sum())
    for _ in range(STEPS):
        dist.barrier()
        begin = perf_counter()
        optimizer.zero_grad()
        hidden = table(items[own])[real]
        loss = head.loss(hidden, targets[own][real]) * (len(hidden) / n_targets)
        loss.backward()
        for parameter in head.parameters():
            if type(parameter.data) is torch.Tensor:  # the others' gradients are whole
                dist.all_reduce(parameter.grad)
        optimizer.step()
        times.append(perf_counter() - begin)
        losses.append(loss.detach())
        dist.all_reduce(losses[-1])
    peak = status_mib("VmHWM") - at_first
    states = torch.randn(32, DIM, generator=torch.Generator().manual_seed(1))
    begin = perf_counter()
    best = head.topk(states, 20).items
    search = perf_counter() - begin
    dist.destroy_process_group()
    return {
        "processes": world,
        "items": n_items,
        "mib": peak,
        "ms": 1e3 * median(times),
        "topk_ms": 1e3 * search,
        "losses": [float(loss) for loss in losses],
        "best": best.tolist(),
        "parameters": sum(
            (p.to_local() if hasattr(p, "to_local") else p).numel() for p in head.parameters()
        ),
    }


def report(rows: list[dict[str, Any]], command: str) -> str:
    """The results as a page of Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in environment().items() if v)
    n_items = rows[0]["items"]
    worst = max(abs(a - b) / a for row in rows for a, b in zip(rows[0]["losses"], row["losses"]))
    same = sum(row["best"] == rows[0]["best"] for row in rows)
    lines = [
        "# A tail spread over processes",
        "",
        f"`{command}`",
        "",
        versions,
        "",
        f"{n_items:,} items, d {DIM}, {TARGETS:,} targets a step over all processes, tree softmax, "
        "Adam, Gloo on one machine (so the processes share its two cores, and time does not fall). "
        "*MiB*: the most that a process grows by, the largest of the processes.",
        "",
        "| processes | parameters of one | MiB of one | ms a step | ms for 32 x 20 best |",
        "|--:|--:|--:|--:|--:|",
        *(
            f"| {r['processes']} | {r['parameters']:,} | {r['mib']:,.0f} | {r['ms']:,.0f} "
            f"| {r['topk_ms']:,.0f} |"
            for r in rows
        ),
        "",
        f"Losses of {STEPS} steps differ from those of one process by at most a relative "
        f"{worst:.0e}; the {20 * 32} best items are the same in {same} of {len(rows)} runs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        row = child(arguments.items)
        (arguments.child / f"{os.getpid()}.json").write_text(json.dumps(row))
        return
    rows = []
    folder = arguments.out / "shards.part"
    for n in arguments.processes:
        folder.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        options = [__file__, f"--child={folder}", f"--items={arguments.items}"]
        subprocess.run([*launcher, f"--nproc_per_node={n}", *options], check=True)
        files = sorted(folder.iterdir())
        found = [json.loads(file.read_text()) for file in files]
        for file in files:
            file.unlink()
        rows.append({**found[0], "mib": max(row["mib"] for row in found)})
        rows[-1]["parameters"] = max(row["parameters"] for row in found)
        print({k: v for k, v in rows[-1].items() if k != "best"}, flush=True)
    folder.rmdir()
    command = f"python benchmarks/shards.py --items {arguments.items}"
    save(report(rows, command), arguments.out / "shards.md")


if __name__ == "__main__":
    main()
