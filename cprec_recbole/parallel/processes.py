"""Several processes on this machine, started by torch.multiprocessing and ended together.

A process that dies, with an error or killed, ends them all, and its error is the caller's: also
while the others wait for it in a collective.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as torch_processes

from cprec_recbole.config import CompressionError
from cprec_recbole.parallel import group
from cprec_recbole.parallel.group import Place

START_METHOD = "spawn"  # a forked process can use no GPU that its parent has used
_SECONDS_TO_END = 5  # between being asked to end and being ended


@dataclass(frozen=True)
class _Failure:
    """What a process leaves that ends with an error."""

    at: int  # on a clock that all processes share
    message: str | None  # of a CompressionError
    trace: str


def launch(nproc: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work(*arguments)` in `nproc` processes; returns what the first one returns.

    In each, `group.expected()` is its place. Functions and arguments have to be ones that pickle
    takes, and a script that calls this needs its `if __name__ == "__main__":`.

    Raises:
        CompressionError: that of a process; or a process was killed.
        RuntimeError: any other error of a process, with its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="cprec-") as folder:
        processes = torch_processes.start_processes(
            _process,
            (nproc, folder, work, arguments),
            nprocs=nproc,
            join=False,
            start_method=START_METHOD,
        ).processes
        try:
            failed = _first_to_fail(processes)
        finally:
            _end(processes)
        if failed is not None:
            raise _cause(failed, processes, Path(folder))
        return pickle.loads((Path(folder) / "result").read_bytes())


def _process(
    number: int, nproc: int, folder: str, work: Callable[..., Any], arguments: tuple
) -> None:
    """One of the processes, from its first line to its last."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // nproc))
    if sys.platform == "linux":  # they are on one machine, whatever its name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # a spawned process spawns: its loaders' workers are to start as they do in any other process
    multiprocessing.set_start_method(None, force=True)
    end_with_parent()
    group.expect(Place(number, nproc, number, nproc, f"file://{folder}/meeting"))
    try:
        result = work(*arguments)
        if number == 0:
            (Path(folder) / "result").write_bytes(pickle.dumps(result))
        group.leave()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = str(error) if isinstance(error, CompressionError) else None
        failure = _Failure(time.monotonic_ns(), message, traceback.format_exc())
        (Path(folder) / f"failure-{number}").write_bytes(pickle.dumps(failure))
        sys.exit(1)


def end_with_parent() -> None:
    """Have this process killed when the one that started it is gone: nobody would end it, and it
    would write into the folder of a run that may be resumed."""
    parent = multiprocessing.parent_process()

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    if parent is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _first_to_fail(processes: Sequence[BaseProcess]) -> int | None:
    """Wait for the first process that ends with an error; None where none does."""
    running: dict[Any, int] = {process.sentinel: n for n, process in enumerate(processes)}
    while running:
        for sentinel in connection.wait(list(running)):
            number = running.pop(sentinel)
            processes[number].join()
            if processes[number].exitcode != 0:
                return number
    return None


def _end(processes: Sequence[BaseProcess]) -> None:
    """End what still runs: after an error, and where the caller was interrupted."""
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.terminate()
    for process in alive:
        process.join(_SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()


def _cause(failed: int, processes: Sequence[BaseProcess], folder: Path) -> Exception:
    """What began it: processes that lose a partner fail too, and may be noticed before it."""
    n = len(processes)
    codes = [process.exitcode or 0 for process in processes]
    own_signals = (-signal.SIGTERM, -signal.SIGKILL)  # with which `_end` ends the others
    killed = [number for number, code in enumerate(codes) if code < 0 and code not in own_signals]
    for number in [failed, *killed]:
        if codes[number] < 0:
            return _killed(number, n, -codes[number])
    failures = {
        number: pickle.loads(path.read_bytes())
        for number in range(n)
        if (path := folder / f"failure-{number}").is_file()
    }
    if failed not in failures:
        return CompressionError(
            f"Expected all {n} processes to work to the end, but process {failed} left with exit "
            f"code {codes[failed]}."
        )
    number, first = min(failures.items(), key=lambda entry: entry[1].at)
    if first.message is not None:
        return CompressionError(first.message)
    return RuntimeError(f"Process {number} of {n} ended with an error:\n{first.trace}")


def _killed(number: int, n: int, code: int) -> CompressionError:
    name = signal.Signals(code).name
    reason = ", as a system does that runs out of memory" if code == signal.SIGKILL else ""
    return CompressionError(
        f"Expected all {n} processes to work to the end, but process {number} was ended by "
        f"{name}{reason}."
    )
