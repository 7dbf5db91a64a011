"""From a fresh process to its first answer: an int8 folder against RecBole's own checkpoint.

    pip install onnx onnxscript onnxruntime
    python benchmarks/ready.py [--items N] [--rounds N] [--folder FOLDER] [--out FOLDER]

SASRec with RecBole's defaults (d 64) and made-up weights. The checkpoint is written as RecBole's
trainer writes it, with Adam's state, and once without. Every measurement is a process of its own
that loads, answers one history of 20 items with the 20 best of all items, and ends; contenders take
turns. Seconds count from before the process starts until its answer is read; memory is its
largest resident set.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

DIM, K, LENGTH = 64, 20, 20
HISTORY = list(range(1000, 1000 + LENGTH))
OURS, GRAPH = "int8 folder", "the same as ONNX, with onnxruntime"
WITH, WITHOUT = "RecBole's checkpoint", "RecBole's checkpoint without Adam's state"
CHILD = "--child"


class Catalogue:
    """As much of a RecBole dataset as a model's constructor asks for."""

    iid_field = "item_id"

    def __init__(self, n_items: int) -> None:
        self._n_items = n_items

    def num(self, field: str) -> int:
        """Items, padding included."""
        return self._n_items


def prepare(folder: Path, n_items: int) -> None:
    """Write what is loaded: two checkpoints and a folder."""
    import numpy as np
    import torch
    from recbole.model.sequential_recommender import SASRec

    import cprec_recbole
    from cprec_recbole.host.library import recbole_config

    torch.manual_seed(0)
    config = recbole_config("SASRec", "ml-100k", {"use_gpu": False})
    model = SASRec(config, Catalogue(n_items))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = {
        "config": config,
        "epoch": 0,
        "cur_step": 0,
        "best_valid_score": 0.0,
        "state_dict": model.state_dict(),
        "other_parameter": model.other_parameter(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, folder / "with.pth", pickle_protocol=4)
    torch.save({**state, "optimizer": {}}, folder / "without.pth", pickle_protocol=4)
    del state, optimizer
    counts = 1e7 / np.arange(1, n_items + 1)  # Zipf's law
    small = cprec_recbole.compress(
        model, ranks=[64, 16, 4], item_counts=counts, dtype="int8", softmax="full"
    )
    tokens = [f"B{item:09d}" for item in range(1, n_items)]  # as long as Amazon's
    small.save_pretrained(folder / "small", tokens)
    del model
    named = cprec_recbole.load_pretrained(folder / "small")  # which knows the tokens
    cprec_recbole.export(named, folder / "small.onnx", k=K)


def answer(kind: str, folder: Path) -> None:
    """Load, answer, print what it took; in a process of its own."""
    started = process_time()
    parts = {}
    if kind == OURS:
        from cprec_recbole import load_pretrained

        parts["import"] = process_time() - started
        model = load_pretrained(folder / "small")
        parts["load"] = process_time() - started - parts["import"]
        best = model.recommend_tokens([[f"B{item:09d}" for item in HISTORY]], k=K)
        found = best.tokens[0]
    elif kind == GRAPH:
        import numpy as np
        import onnxruntime

        parts["import"] = process_time() - started
        session = onnxruntime.InferenceSession(str(folder / "small.onnx"))
        length = int(session.get_modelmeta().custom_metadata_map["max_length"])
        tokens = json.loads((folder / "small.items.json").read_text())
        ids = {token: item for item, token in enumerate(tokens, start=1)}
        parts["load"] = process_time() - started - parts["import"]
        history = np.zeros((1, length), dtype=np.int64)
        history[0, :LENGTH] = [ids[f"B{item:09d}"] for item in HISTORY]
        inputs = {"history": history, "exclude": np.zeros((1, 1), dtype=np.int64)}
        found = [tokens[item - 1] for item in session.run(None, inputs)[0][0]]
    else:
        import torch
        from recbole.data.interaction import Interaction
        from recbole.model.sequential_recommender import SASRec

        import cprec_recbole  # noqa: F401  (without it RecBole does not import here)

        parts["import"] = process_time() - started
        name = "with.pth" if kind == WITH else "without.pth"
        checkpoint = torch.load(folder / name, weights_only=False)
        n_items = len(checkpoint["state_dict"]["item_embedding.weight"])
        host = SASRec(checkpoint["config"], Catalogue(n_items))
        host.load_state_dict(checkpoint["state_dict"])
        host.eval()
        parts["load"] = process_time() - started - parts["import"]
        item_seq = torch.zeros(1, host.max_seq_length, dtype=torch.int64)
        item_seq[0, :LENGTH] = torch.tensor(HISTORY)
        fields = {host.ITEM_SEQ: item_seq, host.ITEM_SEQ_LEN: torch.tensor([LENGTH])}
        with torch.no_grad():
            scores = host.full_sort_predict(Interaction(fields))
        found = scores.topk(K).indices[0].tolist()
    parts["answer"] = process_time() - started - parts["import"] - parts["load"]
    facts = {"MiB": largest_mib(), "cpu": process_time(), "n": len(found)}
    print(json.dumps({**facts, "parts": parts}), flush=True)


def largest_mib() -> float:
    """The largest resident set of this process; getrusage's counts what started it too."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")) / 1024


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """One process, from before it starts until its answer is read."""
    command = [sys.executable, __file__, CHILD, kind, str(folder)]
    start = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = perf_counter() - start
    if process.returncode or not line:
        raise SystemExit(f"{kind}: the process ended with {process.returncode}")
    return {**json.loads(line), "seconds": seconds}


def report(found: dict[str, list[dict[str, Any]]], folder: Path, n_items: int) -> list[str]:
    """The table, and what was asked for."""
    small = sum(path.stat().st_size for path in (folder / "small").iterdir())
    tokens = sum(path.stat().st_size for path in (folder / "small").glob("items-*"))
    graph = [folder / "small.onnx", folder / "small.items.json"]
    sizes = {OURS: small, GRAPH: sum(path.stat().st_size for path in graph)}
    sizes |= {WITH: (folder / "with.pth").stat().st_size}
    sizes |= {WITHOUT: (folder / "without.pth").stat().st_size}
    lines = [
        "| | bytes | seconds: median | least | processor seconds | of which import / load / answer "
        "| peak MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    middle = {}
    for kind, runs in found.items():
        best = min(runs, key=lambda run: run["cpu"])
        parts = " / ".join(f"{best['parts'][part]:.2f}" for part in ("import", "load", "answer"))
        middle[kind] = {key: median(r[key] for r in runs) for key in ("seconds", "cpu", "MiB")}
        lines.append(
            f"| {kind} | {sizes[kind]:,} | {middle[kind]['seconds']:.2f} | "
            f"{min(run['seconds'] for run in runs):.2f} | "
            f"{middle[kind]['cpu']:.2f} | {parts} | {middle[kind]['MiB']:,.0f} |"
        )
    lines += [
        "",
        f"The folder is {sizes[WITH] / small:.1f} times smaller than the checkpoint, "
        f"{sizes[WITHOUT] / small:.1f} times smaller than one without Adam's state; "
        f"{tokens:,} bytes of it are tokens of ten characters, which the checkpoint does not hold: "
        f"without them {sizes[WITH] / (small - tokens):.1f} and "
        f"{sizes[WITHOUT] / (small - tokens):.1f} times. Its process needs "
        f"{middle[OURS]['MiB'] / middle[WITH]['MiB']:.0%} of the memory of the checkpoint's, and "
        f"{middle[OURS]['MiB'] / middle[WITHOUT]['MiB']:.0%} of that without Adam's state; with "
        f"onnxruntime {middle[GRAPH]['MiB'] / middle[WITH]['MiB']:.0%} and "
        f"{middle[GRAPH]['MiB'] / middle[WITHOUT]['MiB']:.0%}.",
    ]
    return lines


def main() -> None:
    from cprec_recbole.environment import environment
    from cprec_recbole.files import write_text

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where what was prepared is kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "small" / "config.json").exists():
            prepare(folder, arguments.items + 1)
        found: dict[str, list[dict[str, Any]]] = {OURS: [], GRAPH: [], WITH: [], WITHOUT: []}
        for _ in range(arguments.rounds):
            for kind, runs in found.items():
                runs.append(measure(kind, folder))
                print(kind, runs[-1], flush=True)
        table = report(found, folder, arguments.items + 1)
    sizes = ["--items", str(arguments.items), "--rounds", str(arguments.rounds)]
    command = shlex.join(["python", "benchmarks/ready.py", *sizes])
    about = ", ".join(f"{name} {value}" for name, value in environment().items() if value)
    title = f"# Ready to answer: SASRec, {arguments.items:,} items, {arguments.rounds} rounds"
    lines = [title, "", f"`{command}`", "", about, "", *table, ""]
    write_text(arguments.out / "ready.md", "\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        answer(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
