"""Matrices in int8: what they cost in quality, and why PyTorch's own kernels do not compute rows.

    python benchmarks/int8.py [--epochs N] [--models NAME ...] [--out FOLDER]
    python benchmarks/int8.py --search  # by rows in float, int8 and int4

Quality: each model is trained on MovieLens-100K with its default options, then its matrices are in
int8; nothing is trained afterwards. Kernels: milliseconds for logits of some hidden states and for
look-ups, the best of some rounds in one process and one thread, each over made-up rows of a rank
that blocks have.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from cprec_recbole import CompressedRecommender, quantize
from cprec_recbole.compression.quantize import quantized_block
from cprec_recbole.costs import saved_bytes
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.environment import environment
from cprec_recbole.files import write_text
from cprec_recbole.host.library import recbole_config
from cprec_recbole.integers import Int8Rows, quantized_rows
from cprec_recbole.partition import Partition
from cprec_recbole.softmax import build_softmax

MODELS = ("NextItNet", "SASRec", "GRU4Rec")
N_ROWS, RANKS, BATCHES, LOOK_UPS = 200_000, (4, 16, 64), (1, 32), (50, 3200)
PIECE = 2**15  # rows that are turned into float at a time
ROUNDS = 7
SEARCHED = (20_001, 62_066, 104_146, 146_225), (64, 16, 4, 4)


def quality(name: str, softmax: str, epochs: int) -> str:
    """A row: NDCG@20 in float and in int8, and bytes of the weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = recbole_config(
            f"Cp{name}",
            "ml-100k",
            {
                "epochs": epochs,
                "softmax": softmax,
                "eval_step": epochs,
                "topk": [20],
                "metrics": ["NDCG"],
                "valid_metric": "NDCG@20",
                "show_progress": False,
                "checkpoint_dir": folder,
                "use_gpu": False,
            },
        )
        init_seed(config["seed"], config["reproducibility"])
        train, valid, test = data_preparation(config, create_dataset(config))
        model = get_model(f"Cp{name}")(config, train._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], f"Cp{name}")(config, model)
        trainer.fit(train, valid, verbose=False, show_progress=False)
    small = quantize(model.eval())
    cells = [f"Cp{name}, {softmax}"]
    for data in (valid, test):
        before, after = (gains(each, data) for each in (model, small))
        mean, change = float(before.mean()), after - before
        error = float(change.std()) / len(change) ** 0.5 / mean
        cells += [f"{mean:.5f}", f"{float(after.mean()):.5f}"]
        cells += [f"{float(change.mean()) / mean:+.2%} ± {error:.2%}"]
    sizes = [saved_bytes(each) for each in (model, small)]
    rows = [
        sum(b.weight.numel() * b.weight.element_size() for b in each.table.blocks)
        for each in (model, small)
    ]
    cells += [f"{size:,}" for size in sizes]
    scales = 2 * small.n_items
    cells += [f"{sizes[0] / sizes[1]:.2f}x", f"{rows[0] / (rows[1] + scales):.2f}x"]
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def gains(model: CompressedRecommender, data: Any) -> torch.Tensor:
    """What each user adds to NDCG@20, `[n_users]`: of leave-one-out data one item is wanted."""
    found = []
    for interaction, _, _, wanted in data:
        best = model.softmax.topk(model.last_hidden(interaction), 20).items
        places = torch.arange(20) + 2
        found.append(((best == wanted.unsqueeze(1)) / places.log2()).sum(1))
    return torch.cat(found)


def milliseconds(action: Callable[[], object]) -> float:
    """The best of some rounds, after one to warm up."""
    action()
    times = []
    for _ in range(ROUNDS):
        start = perf_counter()
        action()
        times.append(perf_counter() - start)
    return 1000 * min(times)


def logits_row(rank: int, batch: int) -> str:
    """A row: one way beside another for the logits of some hidden states."""
    rows = torch.randn(N_ROWS, rank)
    values, scales = quantized_rows(rows)
    ours, query = Int8Rows(values, scales), torch.randn(batch, rank)
    columns = query.T.contiguous()
    whole = torch.randint(-127, 128, (max(batch, 17), rank), dtype=torch.int8)  # 17 at least
    starts = range(0, N_ROWS, PIECE)
    ways: list[Callable[[], object]] = [
        lambda: [torch.mm(rows[a : a + PIECE], columns) for a in starts],
        lambda: [torch.nn.functional.linear(query, ours[a : a + PIECE]) for a in starts],
        lambda: torch._weight_int8pack_mm(query, values, scales),
        lambda: torch._int_mm(whole, values.T),
    ]
    times = [milliseconds(way) for way in ways]
    ratios = [f"{time / times[0]:.1f}" for time in times[1:]]
    return f"| {rank} | {batch} | {times[0]:.2f} | {' | '.join(ratios)} |"


def look_up_row(rank: int, n: int) -> str:
    """A row: one way beside another for looking some rows up."""
    rows = torch.randn(N_ROWS, rank)
    values, scales = quantized_rows(rows)
    ours, items = Int8Rows(values, scales), torch.randint(N_ROWS, (n,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.nn.quantized import Embedding

        per_row = torch.quantize_per_channel(
            rows, scales.float(), torch.full((N_ROWS,), 128.0), 0, torch.quint8
        )
        theirs = Embedding(N_ROWS, rank, _weight=per_row)
    packed = theirs._packed_params._packed_weight
    ways: list[Callable[[], object]] = [
        lambda: rows[items],
        lambda: ours[items],
        lambda: torch.ops.quantized.embedding_byte(packed, items),
    ]
    times = [milliseconds(lambda way=way: [way() for _ in range(20)]) / 20 for way in ways]
    n_bytes = [4 * rank, rank + 2, torch.ops.quantized.embedding_bag_byte_prepack(rows).shape[1]]
    ratios = [f"{time / times[0]:.1f}" for time in times[1:]]
    sizes = " / ".join(map(str, n_bytes))
    return f"| {rank} | {n} | {times[0]:.4f} | {' | '.join(ratios)} | {sizes} |"


def search_rows() -> list[str]:
    """A row for each batch: the search by rows in float, int8 and int4, in turns, no index."""
    sizes, ranks = SEARCHED
    counts = torch.rand(sum(sizes)).numpy()  # the padding row comes first in any case
    partition = Partition.from_counts(counts, tuple(accumulate(sizes)))
    table = BlockEmbedding(partition, ranks, ranks[0])
    softmaxes = [build_softmax("full", table)]
    for dtype in ("int8", "int4"):
        other = copy.deepcopy(table)
        for j, block in enumerate(table.blocks):
            other.factors[j] = quantized_block(copy.deepcopy(block), dtype)
        softmaxes.append(build_softmax("full", other))
    lines = []
    for batch in BATCHES:
        hidden, times = torch.randn(batch, ranks[0]), [[] for _ in softmaxes]
        for _ in range(max(10, 200 // batch)):  # below the rows after which it makes an index
            for softmax, own in zip(softmaxes, times):
                start = process_time()
                softmax.topk(hidden, 20)
                own.append(1000 * (process_time() - start))
        medians = [median(own[2:]) for own in times]
        ratios = " | ".join(f"{each / medians[0]:.2f}" for each in medians[1:])
        lines.append(f"| {batch} | {medians[0]:.2f} | {ratios} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--search", action="store_true")
    arguments = parser.parse_args()
    if arguments.search:
        lines = [
            *("# The search by quantized rows", "", "`python benchmarks/int8.py --search`", ""),
            *(", ".join(f"{name} {value}" for name, value in environment().items() if value), ""),
            "The best 20 of 332,437 items, made up, in the default blocks of ranks 64, 16, 4 and "
            "4: milliseconds of the processor with rows in float, medians of turns, and times as "
            "long in int8 and int4.",
            *("", "| hidden states | float, ms | int8 | int4 |", "|--:|--:|--:|--:|"),
            *search_rows(),
        ]
        print("\n".join(lines))
        write_text(arguments.out / "quantized-search.md", "\n".join(lines) + "\n")
        return
    lines = [
        "# Matrices in int8",
        "",
        f"`python benchmarks/int8.py --epochs {arguments.epochs}`",
        "",
    ]
    lines += [", ".join(f"{name} {value}" for name, value in environment().items() if value), ""]
    lines += [
        f"## Kernels: {N_ROWS:,} rows, one thread",
        "",
        "Logits, milliseconds of float rows, and times as long for: whole numbers turned into "
        "float a piece at a time (what is done); `torch._weight_int8pack_mm`; "
        "`torch._int_mm`, which needs the hidden states in int8 too.",
        "",
        "| rank | hidden states | float, ms | pieces | _weight_int8pack_mm | _int_mm |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [logits_row(rank, batch) for rank in RANKS for batch in BATCHES]
    lines += [
        "",
        "Look-ups, milliseconds of float rows, and times as long for: rows picked, then turned "
        "into float (what is done); `quantized::embedding_byte` (FBGEMM).",
        "",
        "| rank | rows | float, ms | picked | embedding_byte | bytes a row: float / ours / "
        "FBGEMM |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [look_up_row(rank, n) for rank in RANKS for n in LOOK_UPS]
    print("\n".join(lines), flush=True)
    lines += [
        "",
        f"## Quality: MovieLens-100K, {arguments.epochs} epochs, seed 2020",
        "",
        "NDCG@20 in float, in int8, and the difference with its standard error over users; bytes "
        "of all weights, and how many times smaller they and the rows are.",
        "",
        "| model | valid | int8 | | test | int8 | | bytes | int8 | all | rows |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in arguments.models:
        for softmax in ("full", "tree"):
            lines.append(quality(name, softmax, arguments.epochs))
            print(lines[-1], flush=True)
    write_text(arguments.out / "int8.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
