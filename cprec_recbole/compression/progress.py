"""How a recovery shows how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cprec_recbole.outcome import Recovery


class Show:
    """A progress bar; on what is no terminal, a line an epoch; or nothing."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.print: Callable[[str], None] = lambda text: None
        if progress is not None:
            self.print = progress.console.print
            self.task = progress.add_task("recover", total=None, loss="-")

    def begin(self, epochs: int, n_batches: int, result: Recovery) -> None:
        """Before the first step; says what quality it starts from."""
        if self.progress is not None:
            self.progress.update(self.task, total=epochs * n_batches)
        if result.metric:
            found = {"original": result.original, "compressed": result.start}
            shown = [f"{name} {x[result.metric]:.4f}" for name, x in found.items() if x]
            self.print(f"recover: {result.metric} {', '.join(shown)}")

    def step(self, loss: float) -> None:
        """After each step."""
        if self.progress is not None:
            self.progress.update(self.task, advance=1, loss=f"{loss:.4f}")

    def epoch(self, epoch: int, result: Recovery) -> None:
        """After each epoch."""
        score = f", {result.metric} {result.epochs[-1][result.metric]:.4f}" if result.metric else ""
        self.print(f"recover: epoch {epoch}, loss {result.losses[-1]:.4f}{score}")


@contextmanager
def shown(progress: bool) -> Iterator[Show]:
    """Within: something to report to; silent where no progress is wanted."""
    if not progress:
        yield Show(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield Show(bar)
