"""How long the 20 best items of a catalogue take, ours against dense products and FAISS, one run.

    pip install faiss-cpu matplotlib
    python benchmarks/inference.py [--items N ...] [--out FOLDER]

All contenders of a size have the same hidden states and the same (trained) weights, in one process,
and take turns; see made_up.py for where the weights come from. Each finished size is kept in
`inference.json`, and not run again. A second process runs our search alone, for its memory.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from made_up import BATCH, DIM, LENGTH, RANKS, STEPS, Trained, cutoffs_of, hit_rate, trained
from torch import Tensor

from cprec_recbole.compare.results import environment, save
from cprec_recbole.softmax import Softmax

K = 20
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BATCHES = (1, 32, 256)
GROUP, PIECE = 32, 2**21  # of the dense product in its best form

Search = Callable[[Tensor], Tensor]  # hidden states [B, d] to items [B, k]


def dense(table: Tensor) -> Search:
    """As RecBole does it: all scores, then topk."""

    def search(hidden: Tensor) -> Tensor:
        scores = hidden @ table.T
        scores[:, 0] = -torch.inf
        return scores.topk(K).indices

    return search


def dense_in_pieces(table: Tensor) -> Search:
    """A dense product in its best form: pieces that fit the cache, of which the best of each group
    of rows is kept; topk over those, then over the rows of the k best groups."""
    n_items = len(table)
    n_groups = -(-n_items // GROUP)

    def search(hidden: Tensor) -> Tensor:
        n_rows = len(hidden)
        size = max(GROUP, PIECE // n_rows // GROUP * GROUP)
        columns = hidden.T.contiguous()
        buffer = torch.empty(size, n_rows)
        maxima = torch.full((n_groups, n_rows), -torch.inf)
        for start in range(0, n_items, size):
            rows = table[start : start + size]
            scores = torch.mm(rows, columns, out=buffer[: len(rows)])
            if start == 0:
                scores[0] = -torch.inf
            whole = len(rows) // GROUP
            first = start // GROUP
            grouped = scores[: whole * GROUP].view(-1, GROUP, n_rows)
            torch.amax(grouped, 1, out=maxima[first : first + whole])
            if whole * GROUP < len(rows):
                maxima[-1] = scores[whole * GROUP :].amax(0)
        groups = maxima.topk(K, dim=0).indices.T  # [B, k]
        items = (groups.unsqueeze(2) * GROUP + torch.arange(GROUP)).flatten(1)
        inside = items < n_items
        items = items.clamp(max=n_items - 1)
        scores = torch.bmm(table[items], hidden.unsqueeze(2)).squeeze(2)
        scores.masked_fill_(~inside | (items == 0), -torch.inf)
        return items.gather(1, scores.topk(K).indices)

    return search


def faiss_flat(table: Tensor) -> Search:
    """FAISS's exact search; its index is a copy of the table."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(table.shape[1])
    index.add(table.numpy()[1:])  # without padding
    return lambda hidden: torch.from_numpy(index.search(hidden.numpy(), K)[1]) + 1


def adaptive(head: Softmax, n_items: int) -> Search:
    """PyTorch's adaptive softmax with the tree's weights: log_prob, then topk."""
    cutoffs = [cutoff - 1 for cutoff in cutoffs_of(n_items)]  # no padding
    oracle = torch.nn.AdaptiveLogSoftmaxWithLoss(DIM, cutoffs[-1], cutoffs[:-1], div_value=4.0)
    clusters = head.state_dict()["clusters"]
    with torch.no_grad():
        oracle.head.weight.copy_(torch.cat([head.table.blocks[0].weight[1:], clusters]))
        for block, tail in zip(head.table.blocks[1:], oracle.tail):
            tail[0].weight.copy_(block.projection)
            tail[1].weight.copy_(block.weight)
    return lambda hidden: oracle.log_prob(hidden).topk(K).indices + 1


def contenders(n_items: int) -> tuple[dict[str, Search], dict[str, Softmax]]:
    """All contenders by name, and our heads among them."""
    flat, tree = trained("full", n_items), trained("tree", n_items)
    table = flat.softmax.table.dense().detach()
    searches = {
        "dense": dense(table),
        "dense, in pieces": dense_in_pieces(table),
        "FAISS flat": faiss_flat(table),
        "adaptive softmax": adaptive(tree.softmax, n_items),
    }
    heads = {}
    for name, head in (("flat", flat.softmax), ("tree", tree.softmax)):
        heads[f"ours, {name}"] = head
        heads[f"ours, {name}, index"] = copy.copy(head)  # the same weights
        heads[f"ours, {name}, index"].build_index()
    for name, head in heads.items():
        searches[name] = lambda hidden, head=head: head.topk(hidden, K).items
    return searches, heads


def states(name: str, n_items: int) -> Trained:
    """What a contender is asked: hidden states that belong to its weights."""
    return trained("tree" if "tree" in name or "adaptive" in name else "full", n_items)


def fits(name: str, n_items: int, batch: int) -> bool:
    """Whether a contender's dense scores fit this benchmark's 24 GiB."""
    copies = {"adaptive softmax": 3, "dense": 1}.get(name, 0)
    return copies * n_items * batch * 4 < 12e9


@torch.no_grad()
def measure(n_items: int) -> list[dict[str, Any]]:
    """Milliseconds, memory and share read of every contender at every batch."""
    searches, heads = contenders(n_items)
    hidden = {name: states(name, n_items).hidden for name in searches}
    rows = []
    for batch in BATCHES:
        repeats = {1: 31, 32: 9, 256: 5}[batch] if n_items <= 1_000_000 else {1: 11}.get(batch, 3)
        names = [name for name in searches if fits(name, n_items, batch)]
        parts = {name: hidden[name][: batch * (repeats + 1)].split(batch) for name in names}
        extra = {name: peak_mib(partial(searches[name], parts[name][-1])) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats):
            for name in names:  # in turns: a machine that slows down slows all of them
                part = parts[name][repeat]
                start = perf_counter()
                searches[name](part)
                times[name].append(1e3 * (perf_counter() - start))
        exact = searches["dense, in pieces"](parts["dense, in pieces"][0])
        for name in names:
            rows.append(
                {
                    "items": n_items,
                    "batch": batch,
                    "contender": name,
                    "ms": median(times[name]),
                    "least_ms": min(times[name]),
                    "most_ms": max(times[name]),
                    "repeats": repeats,
                    "extra_mib": extra[name],
                    **read_share(heads.get(name), parts[name][:repeats], n_items),
                    "same_lists": None
                    if states(name, n_items).softmax is not states("dense", n_items).softmax
                    else float((searches[name](parts[name][0]) == exact).all(1).float().mean()),
                }
            )
            print_row(rows[-1])
    return rows


def read_share(head: Softmax | None, parts: list[Tensor], n_items: int) -> dict[str, float]:
    """Share of the catalogue, and of its tail, that was read for a row of the batch."""
    if head is None:
        return {"read": 1.0, "tail_read": 1.0}
    shares = [head.search(part, K).tail_share for part in parts]
    tail, first = sum(shares) / len(shares), cutoffs_of(n_items)[0]
    return {"read": (first + tail * (n_items - first)) / n_items, "tail_read": tail}


def alone(n_items: int) -> dict[str, float]:
    """In a process of its own: MiB of the whole process that searches, and seconds to index."""
    found = trained("full", n_items)
    start = perf_counter()
    found.softmax.build_index()
    seconds = perf_counter() - start
    for batch in BATCHES:
        found.softmax.topk(found.hidden[:batch], K)
    return {"items": n_items, "index_seconds": seconds, "process_mib": status_mib("VmHWM")}


def peak_mib(action: Callable[[], Any]) -> float:
    """MiB that the process grows by while something runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    action()
    return max(0.0, status_mib("VmHWM") - before)


def status_mib(field: str) -> float:
    """A size from the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['items']:>10,} items, batch {row['batch']:>3}: {row['contender']:<18}"
        f"{row['ms']:9.2f} ms ({row['least_ms']:.2f} to {row['most_ms']:.2f}), "
        f"{row['extra_mib']:6.0f} MiB, tail read {row['tail_read']:.2%}",
        flush=True,
    )


def report(results: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    targets = STEPS * BATCH * (LENGTH - 1)
    lines = [
        "# Latency of exact top-k",
        "",
        f"`{results['command']}`",
        "",
        ", ".join(f"{name} {value}" for name, value in results["environment"].items() if value),
        "",
        f"The {K} best of all items, d = {DIM}; ours: ranks {RANKS} over the first 2%, the next "
        f"18% and the rest of the items. Weights: {STEPS} steps of training on a made-up "
        f"catalogue (`made_up.py`), {targets / 1e6:.1f} million targets in all, so that of ten "
        "million items most were never seen: none of their tail comes near the best, and none is "
        "read. Milliseconds a batch, median of repeats, contenders in turns; in brackets how many "
        "times faster than `dense`. MiB: what the process grows by in a call, beyond weights and "
        "index. Tail read: share of the rows outside the head that were read for a row of the "
        "batch. A dash: its scores do not fit the machine's memory.",
    ]
    rows = {(r["items"], r["batch"], r["contender"]): r for r in results["rows"]}
    names = list(dict.fromkeys(r["contender"] for r in results["rows"]))
    for n_items in sorted({r["items"] for r in results["rows"]}):
        found = next(r for r in results["alone"] if r["items"] == n_items)
        quality = results["quality"][str(n_items)]
        lines += [
            "",
            f"## {n_items:,} items",
            "",
            f"HR@20 of the trained weights: flat {quality['full']:.3f}, tree "
            f"{quality['tree']:.3f}, the {K} most popular items {quality['popular']:.3f}. Index "
            f"of the flat head: {found['index_seconds']:.1f} s to build. A process that only "
            "loads the flat head, indexes and searches it peaks at "
            f"{found['process_mib']:,.0f} MiB.",
            "",
            "| | " + " | ".join(f"batch {b}, ms | MiB | tail read" for b in BATCHES) + " |",
            "|---|" + "--:|--:|--:|" * len(BATCHES),
        ]
        for name in names:
            cells = []
            for batch in BATCHES:
                row, base = rows.get((n_items, batch, name)), rows.get((n_items, batch, "dense"))
                if row is None:
                    cells += ["-"] * 3
                    continue
                ratio = f" ({base['ms'] / row['ms']:.1f}x)" if base else ""
                share = f"{row['tail_read']:.2%}" if name.startswith("ours") else "all"
                cells += [f"{row['ms']:.2f}{ratio}", f"{row['extra_mib']:.0f}", share]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], target: Path) -> None:
    """Latency against the size of the catalogue."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "inference"
    from matplotlib import pyplot

    # Okabe and Ito's palette, which colour-blind readers can tell apart
    styles = {
        "dense": ("#000000", "o-"),
        "dense, in pieces": ("#999999", "s-"),
        "FAISS flat": ("#E69F00", "^-"),
        "adaptive softmax": ("#CC79A7", "v-"),
        "ours, flat": ("#56B4E9", "o--"),
        "ours, flat, index": ("#0072B2", "o-"),
        "ours, tree": ("#66C2A5", "D--"),
        "ours, tree, index": ("#009E73", "D-"),
    }
    figure, axes = pyplot.subplots(1, len(BATCHES), figsize=(11, 4.2), sharey=True)
    for axis, batch in zip(axes, BATCHES):
        for name, (colour, style) in styles.items():
            rows = [r for r in results["rows"] if r["contender"] == name and r["batch"] == batch]
            sizes = [r["items"] for r in rows]
            axis.plot(sizes, [r["ms"] / batch for r in rows], style, color=colour, label=name)
        axis.set(xscale="log", yscale="log", xlabel="items", title=f"batch {batch}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds for a user")
    axes[-1].legend(fontsize=8)
    figure.suptitle(f"The {K} best items of a catalogue, exactly, on {results['cores']} cores")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(arguments.alone)))
        return
    file = arguments.out / "inference.json"
    empty = {"rows": [], "alone": [], "quality": {}}
    results = json.loads(file.read_text()) if file.exists() else empty
    for n_items in arguments.items:
        if any(row["items"] == n_items for row in results["rows"]):
            continue
        flat, tree = trained("full", n_items), trained("tree", n_items)
        popular = torch.arange(1, K + 1).expand(512, -1)
        results["quality"][str(n_items)] = {
            "full": flat.hit_rate(),
            "tree": tree.hit_rate(),
            "popular": hit_rate(popular, flat.last[:512]),
        }
        results["rows"] += measure(n_items)
        child = [sys.executable, __file__, "--alone", str(n_items)]
        output = subprocess.run(child, capture_output=True, text=True, check=True).stdout
        results["alone"].append(json.loads(output.splitlines()[-1]))
        found = environment()
        results.update(
            command="python benchmarks/inference.py", environment=found, cores=found["cores"]
        )
        save(json.dumps(results, indent=1), file)
        save(report(results), file.with_suffix(".md"))
        plot(results, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
