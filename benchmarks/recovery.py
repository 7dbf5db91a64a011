"""What a step of `recover` costs in its softmax: value and gradients, ours and PyTorch's, one run.

    python benchmarks/recovery.py [--items N ...] [--rounds N] [--out FOLDER]

128 predictions, d 64, ranks 64/16/8; the original's opinion of all items mixed with the targets by
half. PyTorch's is `cross_entropy` with probabilities, on all logits where four times as many fit
`loss_memory` (256 MiB), else in parts whose logits are made again for the gradient. Both take
turns; medians over the rounds, and the least and the most.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from rich import print
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cprec_recbole.compression.distillation import teacher_softmax
from cprec_recbole.config import LOSS_MEMORY
from cprec_recbole.environment import environment
from cprec_recbole.files import write_text
from cprec_recbole.losses import LogitBlock, Workspace, cross_entropy

PREDICTIONS, DIM, SHARE = 128, 64, 0.5
BLOCKS = ((0.1, 64), (0.2, 16), (0.7, 8))  # share of the items, rank


class Step:
    """Random factors, hidden states and targets."""

    def __init__(self, n_items: int) -> None:
        torch.manual_seed(0)
        self.vectors, self.wanted = torch.randn(n_items, DIM), torch.randn(PREDICTIONS, DIM)
        self.place = torch.randint(1, n_items, (PREDICTIONS,))
        sizes = [int(share * n_items) for share, _ in BLOCKS]
        sizes[-1] = n_items - sum(sizes[:-1])
        ranks = [rank for _, rank in BLOCKS]
        self.rows = [(0.1 * torch.randn(k, r)).requires_grad_() for k, r in zip(sizes, ranks)]
        self.codes = [torch.randn(PREDICTIONS, r).requires_grad_() for r in ranks]
        self.workspace = Workspace(LOSS_MEMORY)

    def ours(self) -> Tensor:
        """The loss as `recover` has it."""

        def mixed(group: slice, scratch: Tensor, out: Tensor) -> None:
            teacher_softmax(self.wanted[group], self.vectors, scratch, out, padded=True)
            out.mul_(SHARE)
            out[torch.arange(len(out)), self.place[group]] += 1 - SHARE

        blocks = [LogitBlock(*pair) for pair in zip(self.codes, self.rows)]
        return cross_entropy(blocks, mixed, self.workspace, padded=True)

    def plain(self) -> Tensor:
        """The same of PyTorch's own parts."""

        def loss(wanted: Tensor, place: Tensor, *codes: Tensor) -> Tensor:
            with torch.no_grad():
                mixed = (wanted @ self.vectors[1:].T).softmax(1).mul_(SHARE)
                mixed[torch.arange(len(place)), place - 1] += 1 - SHARE
            logits = torch.cat([own @ rows.T for own, rows in zip(codes, self.rows)], 1)
            return F.cross_entropy(logits[:, 1:], mixed, reduction="sum")

        size = max(1, LOSS_MEMORY // (4 * 4 * len(self.vectors)))
        given = (self.wanted, self.place, *self.codes)
        if size >= PREDICTIONS:
            return loss(*given)
        parts = zip(*(each.split(size) for each in given))
        return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()

    def time(self, loss: Callable[[], Tensor]) -> tuple[float, float]:
        """Milliseconds, and the loss."""
        start = perf_counter()
        found = loss()
        torch.autograd.grad(found, [*self.codes, *self.rows])
        return 1e3 * (perf_counter() - start), found.item()


def row(n_items: int, rounds: int) -> str:
    step = Step(n_items)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for turn in range(rounds + 1):  # the first warms up
        values = {}
        for name, own in times.items():
            spent, values[name] = step.time(getattr(step, name))
            if turn:
                own.append(spent)
        assert abs(values["ours"] / values["plain"] - 1) < 1e-5, values
    cells = [f"{median(own):,.0f} ({min(own):,.0f} to {max(own):,.0f})" for own in times.values()]
    faster = median(p / o for p, o in zip(times["plain"], times["ours"]))
    return f"| {n_items:,} | {' | '.join(cells)} | {faster:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 300_000, 10**6])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    command = f"python benchmarks/recovery.py --rounds {arguments.rounds}"
    lines = [
        "# The softmax of a step of recover()",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} {command}`",
        ", ".join(f"{k} {v}" for k, v in environment("cpu").items() if v is not None),
        __doc__.split("\n\n")[2].replace("\n", " ").strip(),
        "| items | PyTorch's, ms | ours, ms | times faster, median of pairs |\n|--:|--:|--:|--:|",
    ]
    for n_items in arguments.items:
        lines[-1] += "\n" + row(n_items, arguments.rounds)
        print(lines[-1].splitlines()[-1])
    write_text(arguments.out / "recovery.md", "\n\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
