"""What a training step costs as the catalogue grows: time, memory and operations, in one run.

    pip install matplotlib
    python benchmarks/training.py [--items N ...] [--data-path DATA --datasets NAME ...]
    python benchmarks/training.py --device cuda [...]

A step is SASRec's (RecBole's defaults, d 64, windows of 50) on 2,048 targets: look-ups, layers,
loss, gradients and Adam (PyTorch's fused one, several times quicker than RecBole's choice, but with
`sparse_adam`, which steps the rows in use).
Its PyTorch operations are counted as they are dispatched, views too, without the optimizer's.
The items of the made-up catalogues occur by Zipf's law with exponent 1; `--datasets` takes windows
of real ones. Times are the processor's, so set OMP_NUM_THREADS=1; on a GPU the clock's. Every
measurement is a process of its own (on a GPU, whose memory can be told apart, one process for all);
contenders take turns, and figures are medians over the rounds. Each finished size is kept in
`training.json` (`training-cuda.json`), and not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cprec_recbole import CompressionConfig, CpSASRec
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.environment import environment
from cprec_recbole.files import write_text
from cprec_recbole.host.library import recbole_config
from cprec_recbole.models.item_tables import RecBoleModel
from cprec_recbole.models.spec import Parts
from cprec_recbole.partition import Partition
from cprec_recbole.training.optimizers import build_optimizer

SIZES = (1683, 12_102, 100_000, 1_000_000, 10_000_000)
TARGETS, LENGTH, DIM = 2048, 50, 64
HEAD = 20_000  # items, but at most a fifth
ROUNDS = 2
STEADY_SECONDS, FEWEST_STEPS = {"cpu": 4.0, "cuda": 0.5}, 2  # measured after a step to warm up
PLAIN = "uncompressed, full softmax"
PIECES = "uncompressed, torch's loss in pieces"  # where this PyTorch has it
OURS_PLAIN = "uncompressed, our loss in pieces"
ADAPTIVE = "torch's adaptive softmax"
TREE, FULL = "ours, tree", "ours, full softmax"
DEFAULT = "ours, tree, default blocks"
PLAIN_SAMPLED, SAMPLED = "uncompressed, sampled softmax", "ours, sampled softmax"
PLAIN_SPARSE, SPARSE = f"{PLAIN_SAMPLED}, sparse_adam", f"{SAMPLED}, sparse_adam"
IN_SAMPLES = (PLAIN_SAMPLED, PLAIN_SPARSE, SAMPLED, SPARSE)
UNCOMPRESSED = (PLAIN, PIECES, OURS_PLAIN, PLAIN_SAMPLED, PLAIN_SPARSE)
CONTENDERS = (*UNCOMPRESSED, ADAPTIVE, TREE, FULL, SAMPLED, SPARSE, DEFAULT)
NEGATIVES = 2048  # of the sampled ones, but at most half of the items

Batch = tuple[Tensor, Tensor]  # items and the next item at each position, [B, L] each


def ranks_of(n_items: int) -> tuple[int, ...]:
    """Three blocks up to a million items, four above; both as torch's adaptive softmax has them."""
    return (64, 16, 4) if n_items <= 10**6 else (64, 21, 7, 2)


def cheapest_cutoffs(counts: np.ndarray, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Cutoffs after a head of `HEAD` at which the tree's step has least to compute.

    A target of block j makes `k_j` logits, of about `18 + r_j` operations each (the 18: the
    exponential and what else is done to a logit, measured).
    """
    shares = np.concatenate([[0.0], np.sort(counts[1:])[::-1]]).cumsum()
    n_items = len(counts)
    head = min(HEAD, n_items // 5)
    ends = np.unique(np.geomspace(head, n_items, 60).astype(int))
    below = shares[ends - 1] / shares[-1]
    cost, before = np.full(len(ends), np.inf), []
    cost[0] = 0.0
    for rank in ranks[1:]:
        sizes, targets = np.subtract.outer(ends, ends), np.subtract.outer(below, below)
        total = cost + np.where(sizes > 0, sizes * targets * (18 + rank), np.inf)  # [end, start]
        before.append(total.argmin(1))
        cost = total.min(1)
    place, found = len(ends) - 1, []
    for starts in reversed(before):
        found.append(int(ends[place]))
        place = starts[place]
    return (head, *reversed(found))


def blocks_of(name: str, counts: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks and cutoffs of a contender: the same for all but the one with our defaults and those
    that are not compressed."""
    if name in UNCOMPRESSED:
        return (DIM,), (len(counts),)
    if name == DEFAULT:
        plan = CompressionConfig().plan(DIM, len(counts))
        return plan.ranks, plan.cutoffs
    ranks = ranks_of(len(counts))
    return ranks, cheapest_cutoffs(counts, ranks)


def zipf_batches(n_items: int, counts: np.ndarray) -> Iterator[Batch]:
    """Windows of items drawn independently by their counts; ids in no order."""
    generator = torch.Generator().manual_seed(2020)
    edges = torch.from_numpy(counts).double().cumsum(0)
    rows = -(-TARGETS // LENGTH)
    while True:
        luck = torch.rand(rows, LENGTH + 1, generator=generator, dtype=torch.float64)
        items = torch.searchsorted(edges, luck * edges[-1], right=True).clamp(1, n_items - 1)
        targets = items[:, 1:].clone()
        targets[-1, TARGETS - rows * LENGTH :] = 0  # 2,048 in all
        yield items[:, :-1], targets


def zipf_counts(n_items: int) -> np.ndarray:
    """Expected counts by Zipf's law, of ids in no order, `[n_items]`."""
    order = np.random.default_rng(2020).permutation(n_items - 1)
    return np.concatenate([[0.0], 1e9 / (1.0 + order)])


class Real:
    """A real data set, read by RecBole for CpSASRec."""

    def __init__(self, data_path: str, name: str) -> None:
        from recbole.data import create_dataset, data_preparation

        options = {
            "data_path": data_path,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": LENGTH,
            "train_batch_size": TARGETS,
        }
        self.config = recbole_config("CpSASRec", name, options)
        self.loader, _, _ = data_preparation(self.config, create_dataset(self.config))
        dataset = self.loader._dataset
        self.counts = item_counts(dataset).astype(float)
        self.n_targets = len(dataset)

    def batches(self) -> Iterator[Batch]:
        """Windows and targets, epoch after epoch."""
        while True:
            for batch in self.loader:
                longest = int(batch["item_length"].max())
                yield batch["item_id_list"][:, :longest], batch["next_item_id_list"][:, :longest]


def host() -> RecBoleModel:
    """SASRec's layers, without a table."""
    config = recbole_config("CpSASRec", "ml-100k", {"MAX_ITEM_LIST_LENGTH": LENGTH})

    class NoItems:
        iid_field = config["ITEM_ID_FIELD"]

        def num(self, field: str) -> int:
            return 1

    return CpSASRec.spec.build_inner(config, NoItems())


Objective = Callable[[Batch], Tensor]


def contender(name: str, counts: np.ndarray, table: BlockEmbedding) -> tuple[nn.Module, Objective]:
    """A model, and its mean loss of a batch."""
    n_items, layers = len(counts), host()
    if name in (OURS_PLAIN, TREE, FULL, DEFAULT, *IN_SAMPLES):
        options = CompressionConfig(
            ranks=table.ranks,
            cutoffs=table.partition.cutoffs,
            sharing="none",
            softmax="tree" if name in (TREE, DEFAULT) else "full",
            negatives=min(NEGATIVES, n_items // 2) if name in IN_SAMPLES else 0,
        )
        parts = Parts(layers, table, table, options, reads_last_column=False, item_counts=counts)
        model = CpSASRec(parts=parts)

        def ours(batch: Batch) -> Tensor:
            items, targets = batch
            hidden = CpSASRec.spec.hidden_states(layers, items)
            return model.position_loss(hidden.flatten(0, 1), targets.flatten())

        return model, ours
    if name in UNCOMPRESSED:
        layers.item_embedding = nn.Embedding(n_items, DIM, padding_idx=0)
        nn.init.normal_(layers.item_embedding.weight, std=0.02)

        def plain(batch: Batch) -> Tensor:
            hidden, target = states(layers, batch)
            return F.cross_entropy(hidden @ layers.item_embedding.weight.T, target)

        def in_pieces(batch: Batch) -> Tensor:
            options = nn.LinearCrossEntropyOptions()
            rows = layers.item_embedding.weight
            hidden, target = states(layers, batch)
            return F.linear_cross_entropy(hidden, rows, target, options=options)

        return layers, plain if name == PLAIN else in_pieces
    layers.item_embedding = table
    inner = [cutoff - 1 for cutoff in table.partition.cutoffs[:-1]]  # no padding
    step = float(table.ranks[0] // table.ranks[1])
    softmax = nn.AdaptiveLogSoftmaxWithLoss(DIM, n_items - 1, inner, div_value=step)

    def adaptive(batch: Batch) -> Tensor:
        hidden, target = states(layers, batch)
        return softmax(hidden, table.partition.positions(target) - 1).loss

    return nn.ModuleList([layers, softmax]), adaptive


def states(layers: RecBoleModel, batch: Batch) -> Batch:
    """Hidden states where a target follows, and those targets, `[N, d]` and `[N]`."""
    items, targets = batch
    real = targets != 0
    return CpSASRec.spec.hidden_states(layers, items)[real], targets[real]


def pieces_of(batch: Batch, n: int) -> list[Batch]:
    """A batch in so many parts, for contenders that cannot hold it at once."""
    items, targets = batch
    return [pair for pair in zip(items.chunk(n), targets.chunk(n)) if int((pair[1] != 0).sum())]


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def measure(name: str, counts: np.ndarray, batches: Iterator[Batch], device: str) -> dict[str, Any]:
    """Steps of a contender in this process."""
    n_items = len(counts)
    build_optimizer(nn.Linear(1, 1), "adam", 1e-3, 0.0)  # what PyTorch imports for it takes 60 MiB
    memory = Memory(device)
    ranks, cutoffs = blocks_of(name, counts)
    partition = Partition.from_counts(counts, cutoffs)
    table = BlockEmbedding(partition, ranks, DIM)
    table.reset_parameters(std=0.02)  # SASRec's
    model, objective = contender(name, counts, table)
    model.to(device)
    learner = "adam"
    if name in (PLAIN_SPARSE, SPARSE):
        learner = "sparse_adam"
        table.look_up_sparsely()
    optimizer = build_optimizer(model, learner, 1e-3, 0.0)
    parts = 1
    if name == PLAIN:  # logits, their softmax and their gradient, [N, n_items] each
        available = memory.available() - 16 * n_items * DIM
        while 12 * TARGETS / parts * n_items > 0.8 * available:
            parts *= 2
    clock = process_time if device == "cpu" else perf_counter
    times, losses, total, found = [], [], 0.0, Operations()
    while len(times) < 1 + FEWEST_STEPS or sum(times[1:]) < STEADY_SECONDS[device]:
        items, targets = next(batches)
        batch = items.to(device), targets.to(device)
        n_targets = int((targets != 0).sum())
        memory.wait()
        begin = clock()
        optimizer.zero_grad()
        total = 0.0
        for part in pieces_of(batch, parts):
            share = int((part[1] != 0).sum()) / n_targets
            with nullcontext() if times else found:
                loss = objective(part) * share
                loss.backward()
            total += float(loss.detach())
        optimizer.step()
        memory.wait()
        times.append((clock() - begin) * TARGETS / n_targets)
        losses.append(total)
    return {
        "contender": name,
        "items": n_items,
        "ms": 1e3 * median(times[1:]),
        "mib": memory.peak_mib(),
        "operations": found.count,
        "parts": parts,
        "steps": len(times) - 1,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": losses[0],
        "cutoffs": list(cutoffs),
        "ranks": list(ranks),
    }


class Memory:
    """The memory of a device from now on; what waits for the device's work."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        if self.is_cuda:
            gc.collect()  # what the one before left
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.at_first = 0.0 if self.is_cuda else status_mib("VmRSS")

    def wait(self) -> None:
        """Wait until all that was asked for is done."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def available(self) -> int:
        """Bytes that are free."""
        return torch.cuda.mem_get_info()[0] if self.is_cuda else status_of_memory("MemAvailable")

    def peak_mib(self) -> float:
        """The most that was taken, in MiB."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        return status_mib("VmHWM") - self.at_first


def status_mib(field: str) -> float:
    """A size from the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def status_of_memory(field: str) -> int:
    """Bytes of memory of the machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.manual_seed(2020)
    if arguments.dataset:
        real = Real(arguments.data_path, arguments.dataset)
        row = measure(arguments.contender, real.counts, real.batches(), arguments.device)
        return {**row, "dataset": arguments.dataset, "epoch_targets": real.n_targets}
    counts = zipf_counts(arguments.size)
    batches = zipf_batches(arguments.size, counts)
    row = measure(arguments.contender, counts, batches, arguments.device)
    return {**row, "dataset": "made up", "epoch_targets": 1e6}


def one(arguments: argparse.Namespace, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """One measurement; None for what is not made."""
    if name == PIECES and not hasattr(F, "linear_cross_entropy"):
        return None
    given = {"contender": name, "data-path": arguments.data_path, **options}
    if arguments.device == "cuda":
        own = {key.replace("-", "_"): value for key, value in given.items()}
        return child(argparse.Namespace(**{**vars(arguments), **own}))
    if name in (*UNCOMPRESSED, FULL) and name != PLAIN_SAMPLED and options.get("size", 0) > 10**6:
        return None  # 10 GB before the first logit, or minutes a step
    if name == PIECES and options.get("size", 0) > 10**5:
        return None  # half a minute a step at that size, and more than linear
    flags = [f"--{key}={value}" for key, value in given.items()]
    command = [sys.executable, __file__, "--child", *flags]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        raise SystemExit(output.stderr)
    found: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return found


def rounds(arguments: argparse.Namespace, **options: Any) -> list[dict[str, Any]]:
    """All contenders in turns, each time in a process of its own; medians over the rounds."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name in CONTENDERS:
            row = one(arguments, name, options)
            if row is None:
                continue
            found[name].append(row)
            print(f"{row['items']:>10,} {name:<28}{row['ms']:10.1f} ms {row['mib']:8.0f} MiB")
            sys.stdout.flush()
    merged = []
    for rows in filter(None, found.values()):
        times = [row["ms"] for row in rows]
        spread = {"ms": median(times), "least_ms": min(times), "most_ms": max(times)}
        merged.append({**rows[0], **spread, "mib": max(row["mib"] for row in rows)})
    return merged


def command_of(results: dict[str, Any]) -> str:
    """What repeats all rows, also where they came from several calls."""
    rows = results["rows"]
    sizes = dict.fromkeys(str(row["items"]) for row in rows if row["dataset"] == "made up")
    names = dict.fromkeys(row["dataset"] for row in rows if row["dataset"] != "made up")
    real = ["--datasets", *names, "--data-path", "DATA"] if names else []
    command = ["python", "benchmarks/training.py", "--rounds", str(results["rounds"])]
    if results["device"] == "cuda":
        command += ["--device", "cuda"]
    return shlex.join([*command, "--items", *sizes, *real])


def report(results: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in results["environment"].items() if v)
    on_gpu = results["device"] == "cuda"
    digits = 1 if on_gpu else 0
    lines = [
        "# A training step against the size of the catalogue",
        "",
        f"`{results['command']}`",
        "",
        versions,
        "",
        f"SASRec, d {DIM}, windows of {LENGTH}, {TARGETS:,} targets a step, fused Adam. Median of "
        f"{results['rounds']} round(s){'' if on_gpu else ' of processes of their own'}, "
        f"{'by the clock' if on_gpu else 'processor time'}, in brackets the least and the most. "
        f"*MiB*: "
        f"{'the most taken of the GPU' if on_gpu else 'peak of the process beyond the imports'}: "
        "parameters, gradients, moments and loss. *Operations*: PyTorch's, forward and backward, "
        "as they are dispatched, views too, without the optimizer's. *Parts*: a batch that does "
        "not fit the memory goes in so many, with one step of the optimizer. Made up: items by "
        "Zipf's law, exponent 1; an epoch of them is a million targets.",
    ]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["dataset"], row["items"]), []).append(row)
    for (dataset, n_items), rows in groups.items():
        base = next((row for row in rows if row["contender"] == PLAIN), None)
        tree = next(row for row in rows if row["contender"] == TREE)
        default = next(row for row in rows if row["contender"] == DEFAULT)
        lines += [
            "",
            f"## {n_items:,} items, {dataset}",
            "",
            f"{_blocks(tree)} Default blocks: {_blocks(default).lower()}",
            "",
            "| | parameters | ms a step | times faster | targets a second | seconds an epoch "
            "| MiB | times less | operations | parts |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in rows:
            rate = 1e3 * TARGETS / row["ms"]
            faster = f"{base['ms'] / row['ms']:.1f}" if base else "-"
            less = f"{base['mib'] / row['mib']:.1f}" if base else "-"
            ms, least, most = (f"{row[k]:,.{digits}f}" for k in ("ms", "least_ms", "most_ms"))
            lines.append(
                f"| {row['contender']} | {row['parameters']:,} | {ms} "
                f"({least} to {most}) | {faster} | {rate:,.0f} "
                f"| {row['epoch_targets'] / rate:,.1f} | {row['mib']:,.0f} | {less} "
                f"| {row['operations']:,} | {row['parts']} |"
            )
    return "\n".join(lines) + "\n"


def _blocks(row: dict[str, Any]) -> str:
    ends = ", ".join(map(str, row["cutoffs"]))
    return f"Ranks {'/'.join(map(str, row['ranks']))}, blocks up to {ends}."


def plot(results: dict[str, Any], target: Path) -> None:
    """Time and memory of a step against the size of the catalogue."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "training"
    from matplotlib import pyplot

    # Okabe and Ito's palette, which colour-blind readers can tell apart
    styles = {
        PLAIN: ("#000000", "o-"),
        PIECES: ("#999999", "x-"),
        OURS_PLAIN: ("#56B4E9", "o--"),
        PLAIN_SAMPLED: ("#E69F00", "o:"),
        ADAPTIVE: ("#CC79A7", "v-"),
        FULL: ("#0072B2", "s-"),
        PLAIN_SPARSE: ("#E69F00", "x:"),
        SAMPLED: ("#F0E442", "s:"),
        SPARSE: ("#F0E442", "x:"),
        TREE: ("#009E73", "D-"),
        DEFAULT: ("#D55E00", "^--"),
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2))
    for name, (colour, style) in styles.items():
        rows = [
            row
            for row in results["rows"]
            if row["contender"] == name and row["dataset"] == "made up"
        ]
        rows.sort(key=lambda row: int(row["items"]))
        sizes = [row["items"] for row in rows]
        axes[0].plot(sizes, [r["ms"] / 1e3 for r in rows], style, color=colour, label=name)
        axes[1].plot(sizes, [r["mib"] / 1024 for r in rows], style, color=colour)
    axes[0].set(ylabel="seconds a step of 2,048 targets")
    axes[1].set(ylabel="peak memory, GiB")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="items")
        axis.grid(alpha=0.3)
    about = results["environment"]
    place = about["gpu"] or f"threads: {about['torch_threads']}"
    figure.suptitle(f"A training step of SASRec, d {DIM}, {place}")
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.legend(loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--datasets", nargs="*", default=[])
    parser.add_argument("--data-path", default="data")
    parser.add_argument("--device", choices=list(STEADY_SECONDS), default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    for hidden in ("--contender", "--dataset"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    suffix = "" if arguments.device == "cpu" else f"-{arguments.device}"
    file = arguments.out / f"training{suffix}.json"
    results = json.loads(file.read_text()) if file.exists() else {"rows": []}
    wanted = [("made up", {"size": size}) for size in arguments.items]
    wanted += [(name, {"dataset": name}) for name in arguments.datasets]
    for dataset, options in wanted:
        done = {(row["dataset"], row["items"]) for row in results["rows"]}
        known = {name for name, _ in done}
        if (dataset, options.get("size")) in done or (dataset != "made up" and dataset in known):
            continue
        results["rows"] += rounds(arguments, **options)
        results["environment"] = environment(torch.device(arguments.device))
        results["rounds"] = arguments.rounds
        results["device"] = arguments.device
        results["command"] = command_of(results)
        write_text(file, json.dumps(results, indent=1))
        write_text(file.with_suffix(".md"), report(results))
        plot(results, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
