"""How long an answer takes: a history of items to the 20 best, ours against RecBole's and FAISS.

    pip install ".[fast,bench]"
    python benchmarks/answer.py [--models NAME ...] [--items N ...] [--threads N ...] [--out FOLDER]
    python benchmarks/answer.py --search [--items N ...]     # hidden states to the 20 best alone

All contenders of a catalogue are in one process and take turns; each has the same layers, and the
same table but for compression. Processor time and wall time, medians. Layers and small tables are
drawn at random, since their numbers do not change the time; tables of 300,000 items and more are
trained (made_up.py), since they change what a search skips. Each finished part is kept in
`answer.json` (`search.json`), and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from types import MappingProxyType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from made_up import Trained, trained
from recbole.data.interaction import Interaction
from recbole.utils import get_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cprec_recbole import CompressionConfig, compress, export, load_pretrained, quantize
from cprec_recbole.environment import environment
from cprec_recbole.files import write_text
from cprec_recbole.host.library import recbole_config
from cprec_recbole.models.recommender import CompressedRecommender

K = 20
MODELS = ("SASRec", "GRU4Rec", "NextItNet")
SIZES = (1_683, 12_102, 60_417, 300_000, 1_000_000)
SEARCH_SIZES = (1_000_000, 10_000_000)
BATCHES, LENGTHS, THREADS = (1, 32, 256), (20, 50), (1, 2)
TRAINED = 300_000  # items of the smallest trained table
RECALLS = (0.95, 0.99)
HNSW_ITEMS = 100_000  # of more the graph takes a quarter of an hour and longer to build
SECONDS, MOST, FEWEST = 0.3, 60, 3  # of a contender: time, and how often

Answer = Callable[[Tensor], Any]  # histories [B, L], or hidden states [B, d], to items [B, k]


class Contender(NamedTuple):
    """What is timed.

    Attributes:
        answer: what it does.
        facts: memory and time of its index, where it has one.
    """

    answer: Answer
    facts: Mapping[str, float] = MappingProxyType({})


class Catalogue:
    """A data set as RecBole's models see it."""

    iid_field = "item_id"

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items

    def num(self, field: str) -> int:
        """How many values a field has."""
        return self.n_items


# -- contenders ----------------------------------------------------------------------------------


def recbole_model(name: str, n_items: int) -> Any:
    """RecBole's own model; a large table is a trained one."""
    torch.manual_seed(2020)
    options = {"MAX_ITEM_LIST_LENGTH": max(LENGTHS), "train_neg_sample_args": None}
    config = recbole_config(name, "ml-100k", options)
    model = get_model(name)(config, Catalogue(n_items)).eval()
    if n_items >= TRAINED:
        model.item_embedding.weight.data = trained("full", n_items).softmax.table.dense().detach()
    return model


def compressed(model: Any, n_items: int) -> CompressedRecommender:
    """The same with our default blocks, or with those of the trained table."""
    counts = np.concatenate([[0.0], 1e9 / np.arange(1.0, n_items)])  # by Zipf's law
    if n_items < TRAINED:
        return compress(model, CompressionConfig(), item_counts=counts)
    table = trained("full", n_items).softmax.table
    options = CompressionConfig(ranks=table.ranks, cutoffs=table.partition.cutoffs)
    return compress(model, options, item_counts=counts)


def contenders(name: str, n_items: int, folder: Path) -> Iterator[tuple[str, Contender]]:
    """All contenders of a whole answer by name."""
    plain = recbole_model(name, n_items)

    def padded(histories: Tensor) -> tuple[Tensor, Tensor]:
        """As RecBole's data sets give them."""
        width = plain.max_seq_length - histories.shape[1]
        return torch.nn.functional.pad(histories, (0, width)), (histories != 0).sum(1)

    def recbole(histories: Tensor) -> Tensor:
        batch = dict(zip((plain.ITEM_SEQ, plain.ITEM_SEQ_LEN), padded(histories)))
        scores = plain.full_sort_predict(Interaction(batch))
        scores[:, 0] = -torch.inf
        return scores.topk(K).indices

    def state(histories: Tensor) -> Tensor:
        return plain.forward(*padded(histories))

    yield "RecBole", Contender(recbole)
    everything = compress(plain, CompressionConfig.uncompressed(), item_counts=np.ones(n_items))
    yield "RecBole's weights in onnxruntime", Contender(in_onnxruntime(everything, folder))
    if name == MODELS[0]:  # the layers of others change nothing in FAISS
        states = state(histories_of(512, max(LENGTHS), n_items))
        table = plain.item_embedding.weight.detach()
        for kind, (search, facts) in faiss_indexes(table, states).items():
            answer = partial(lambda search, histories: search(state(histories)), search)
            yield f"RecBole's layers, {kind}", Contender(answer, facts)
    small = compressed(plain, n_items)
    for kind, model in {"ours": small, "ours, int8": quantize(small)}.items():
        model.build_index()
        own = folder / kind
        model.save_pretrained(own, tokens=[str(i) for i in range(1, n_items)])
        for engine in ("torch", "onnx"):
            served = load_pretrained(own, engine=engine)
            served.build_index()
            answer = partial(lambda served, histories: served.recommend(histories, K), served)
            yield f"{kind}, {engine}", Contender(answer)


def in_onnxruntime(model: CompressedRecommender, folder: Path) -> Answer:
    """A whole model as one graph: scores of all items, and the best of them."""
    import onnxruntime

    file = export(model, folder / "whole.onnx", k=K)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])

    def answer(histories: Tensor) -> Any:
        missing = model.max_seq_length - histories.shape[1]
        history = np.pad(histories.numpy(), ((0, 0), (0, missing)))
        nothing = np.zeros((len(history), 1), dtype=np.int64)
        return session.run(None, {"history": history, "exclude": nothing})

    return answer


def faiss_indexes(table: Tensor, states: Tensor) -> dict[str, tuple[Answer, dict[str, float]]]:
    """FAISS's exact indexes, and its approximate ones at the least effort for each recall."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors, dim = table.numpy()[1:], table.shape[1]  # without padding
    exact = faiss.IndexFlatIP(dim)
    exact.add(vectors)
    right = exact.search(states.numpy(), K)[1]
    found = {"FAISS flat": (search_of(exact), {"mib": vectors.nbytes / 2**20, "seconds": 0.0})}
    makers = {
        "FAISS Panorama": lambda: faiss.IndexFlatIPPanorama(dim, 8),
        "FAISS HNSW": lambda: faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT),
        "FAISS IVF": lambda: faiss.index_factory(
            dim, f"IVF{max(16, int(4 * len(vectors) ** 0.5))},Flat", faiss.METRIC_INNER_PRODUCT
        ),
    }
    if len(vectors) > HNSW_ITEMS:
        del makers["FAISS HNSW"]
    for kind, make in makers.items():
        index, start = make(), perf_counter()
        index.train(vectors)
        index.add(vectors)
        seconds, mib = perf_counter() - start, len(faiss.serialize_index(index)) / 2**20
        facts = {"mib": mib, "seconds": seconds}
        if "Panorama" in kind:
            found[kind] = search_of(index), facts
            continue
        for recall in RECALLS:
            for effort in (2**i for i in range(14)):
                parameters = (
                    faiss.SearchParametersHNSW(efSearch=effort)
                    if "HNSW" in kind
                    else faiss.SearchParametersIVF(nprobe=effort)
                )
                near = index.search(states.numpy(), K, params=parameters)[1]
                reached = np.mean([len(set(a) & set(b)) / K for a, b in zip(near, right)])
                if reached >= recall:
                    found[f"{kind} at {recall}"] = (
                        search_of(index, parameters),
                        facts | {"effort": effort, "recall": float(reached)},
                    )
                    break
    return found


def search_of(index: Any, parameters: Any = None) -> Answer:
    """Hidden states to items by an index of FAISS."""
    return lambda hidden: index.search(hidden.numpy(), K, params=parameters)[1] + 1


def searches(n_items: int) -> Iterator[tuple[str, Contender]]:
    """All contenders of a search alone."""
    flat = trained("full", n_items)
    if n_items < 10**7:  # the dense table of ten million and its scores take more than there is
        table = flat.softmax.table.dense().detach()
        yield "dense", Contender(lambda hidden: (hidden @ table.T).topk(K).indices)
        for kind, (search, facts) in faiss_indexes(table, flat.hidden[-512:]).items():
            yield kind, Contender(search, facts)
    kinds = {"ours, flat": flat, "ours, tree": trained("tree", n_items)}
    for kind, found in kinds.items():
        start = perf_counter()
        found.softmax.build_index()
        seconds = perf_counter() - start
        answer = partial(lambda softmax, hidden: softmax.topk(hidden, K).items, found.softmax)
        yield kind, Contender(answer, {"seconds": seconds})


# -- measuring -----------------------------------------------------------------------------------


def histories_of(n: int, length: int, n_items: int) -> Tensor:
    """Histories of items drawn by Zipf's law, `[n, length]`."""
    generator = torch.Generator().manual_seed(2020)
    luck = torch.rand(n, length, dtype=torch.float64, generator=generator)
    return torch.exp(luck * np.log(n_items - 1)).long().clamp(1, n_items - 1)


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one, and do it."""
        self.n += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def measure(found: dict[str, Contender], inputs: Tensor, batch: int) -> list[dict[str, Any]]:
    """Medians of all contenders, which take turns, on batches of the inputs."""
    parts = inputs.split(batch)
    parts = [part for part in parts if len(part) == batch]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    rows = []
    for name, contender in found.items():
        contender.answer(parts[0])
        with Operations() as operations:
            contender.answer(parts[0])
        rows.append({"contender": name, "batch": batch, "operations": operations.n})
    left = set(found)
    for turn in range(MOST):
        for name in [name for name in found if name in left]:
            part = parts[turn % len(parts)]
            start = perf_counter(), process_time()
            found[name].answer(part)
            times[name].append((perf_counter() - start[0], process_time() - start[1]))
            if turn + 1 >= FEWEST and sum(wall for wall, _ in times[name]) > SECONDS:
                left.discard(name)
    for row in rows:
        pairs = times[row["contender"]]
        row["wall_ms"], row["cpu_ms"] = (1e3 * median(each) for each in zip(*pairs))
        row.update(times=len(pairs), **found[row["contender"]].facts)
    return rows


@torch.no_grad()
def measure_answers(name: str, n_items: int, threads: int) -> list[dict[str, Any]]:
    """All batches and lengths of a model and a catalogue."""
    with TemporaryDirectory() as folder:
        found = dict(contenders(name, n_items, Path(folder)))
        rows = []
        for length in LENGTHS:
            for batch in BATCHES:
                inputs = histories_of(max(batch * 4, 16), length, n_items)
                rows += [{"length": length, **row} for row in measure(found, inputs, batch)]
    same = {"model": name, "items": n_items, "threads": threads}
    return [{**same, **row} for row in rows]


@torch.no_grad()
def measure_searches(n_items: int, threads: int) -> list[dict[str, Any]]:
    """All batches of a search."""
    found = dict(searches(n_items))
    states: Trained = trained("full", n_items)
    rows = []
    for batch in BATCHES:
        rows += measure(found, states.hidden[: 8 * batch], batch)
    return [{"model": "search alone", "items": n_items, "threads": threads, **row} for row in rows]


# -- what is written -----------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    lines = [
        "# Time of an answer",
        "",
        f"`{results['command']}`",
        "",
        ", ".join(f"{name} {value}" for name, value in results["environment"].items() if value),
        "",
        "Processor milliseconds, median, and in brackets how many times faster than the first "
        "line; wall time after a slash where it differs by a tenth. Operations: of torch, at a "
        "batch of one.",
    ]
    rows = results["rows"]
    keys = dict.fromkeys((r["model"], r["items"], r["threads"], r.get("length")) for r in rows)
    for model, n_items, threads, length in keys:
        some = [
            r
            for r in rows
            if (r["model"], r["items"], r["threads"], r.get("length"))
            == (model, n_items, threads, length)
        ]
        of = f", histories of {length}" if length else ""
        lines += ["", f"## {model}, {n_items:,} items{of}, threads: {threads}", ""]
        lines += ["| | " + " | ".join(f"batch {b}" for b in BATCHES) + " | operations | index |"]
        lines += ["|---|" + "--:|" * (len(BATCHES) + 2)]
        by = {(r["contender"], r["batch"]): r for r in some}
        names = list(dict.fromkeys(r["contender"] for r in some))
        for name in names:
            cells = [cell(by[name, b], by[names[0], b]) for b in BATCHES]
            row = by[name, 1]
            index = f"{row['seconds']:.1f} s" if "seconds" in row else ""
            index += f", {row['mib']:,.0f} MiB" if "mib" in row else ""
            lines.append(f"| {name} | {' | '.join(cells)} | {row['operations']} | {index} |")
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any], base: dict[str, Any]) -> str:
    """One time, and how many times faster it is."""
    wall = row["wall_ms"]
    differs = abs(wall / row["cpu_ms"] - 1) > 0.1
    return (
        f"{row['cpu_ms']:.2f}{f' / {wall:.2f}' if differs else ''} "
        f"({base['cpu_ms'] / row['cpu_ms']:.1f})"
    )


def plot(results: dict[str, Any], target: Path) -> None:
    """Time of an answer against the size of the catalogue, one thread, the longest histories."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "answer"
    from matplotlib import pyplot

    # Okabe and Ito's palette, which colour-blind readers can tell apart
    styles = {
        "RecBole": ("#000000", "o-"),
        "RecBole's weights in onnxruntime": ("#999999", "s-"),
        "RecBole's layers, FAISS flat": ("#E69F00", "^-"),
        "RecBole's layers, FAISS HNSW at 0.99": ("#CC79A7", "v-"),
        "ours, torch": ("#56B4E9", "o--"),
        "ours, onnx": ("#0072B2", "o-"),
        "ours, int8, onnx": ("#009E73", "D-"),
    }
    models = list(dict.fromkeys(r["model"] for r in results["rows"]))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(4 * len(models), 4.6), sharex=True, sharey=True
    )
    for axis, model in zip(np.atleast_1d(axes), models):
        for name, (colour, style) in styles.items():
            rows = [
                r
                for r in results["rows"]
                if (r["model"], r["contender"], r["batch"], r["threads"]) == (model, name, 1, 1)
                and r.get("length") == max(LENGTHS)
            ]
            rows.sort(key=lambda row: row["items"])
            times = [r["cpu_ms"] for r in rows]
            axis.plot([r["items"] for r in rows], times, style, color=colour, label=name)
        axis.set(xscale="log", yscale="log", xlabel="items", title=model)
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("processor milliseconds an answer")
    figure.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--items", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    file = arguments.out / ("search.json" if arguments.search else "answer.json")
    results = json.loads(file.read_text()) if file.exists() else {"rows": []}
    models = ["search alone"] if arguments.search else arguments.models
    sizes = arguments.items or (SEARCH_SIZES if arguments.search else SIZES)
    for part in [(m, n, t) for n in sizes for t in arguments.threads for m in models]:
        if any((r["model"], r["items"], r["threads"]) == part for r in results["rows"]):
            continue
        torch.set_num_threads(part[2])
        if arguments.search:
            results["rows"] += measure_searches(part[1], part[2])
        else:
            results["rows"] += measure_answers(*part)
        print(*part, flush=True)
        command = f"python benchmarks/answer.py{' --search' if arguments.search else ''}"
        results.update(command=command, environment=environment())
        write_text(file, json.dumps(results, indent=1))
        write_text(file.with_suffix(".md"), report(results))
        if not arguments.search:
            plot(results, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
