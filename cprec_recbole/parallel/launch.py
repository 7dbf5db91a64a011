"""Start several processes on this machine that end together.

torch.multiprocessing starts them and ends the others when one fails. The caller gets the error
that came first: a process that loses its partner fails too, and may be noticed before it.
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
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException, start_processes

from cprec_recbole.config import CompressionError
from cprec_recbole.parallel import group
from cprec_recbole.parallel.group import Place

START_METHOD = "spawn"  # a forked process can use no GPU that its parent has used


def launch(nproc: int, task: Callable[..., Any], *arguments: Any) -> Any:
    """Run `task(*arguments)` in `nproc` processes; returns what the first one returns.

    In each, `group.place` is its place. Functions and arguments have to be ones that pickle
    takes, and a script that calls this needs its `if __name__ == "__main__":`.

    Raises:
        CompressionError: a process raised one, or was killed.
        RuntimeError: a process raised any other error; the message has its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="cprec-") as folder:
        context = start_processes(
            _process,
            (nproc, folder, task, arguments),
            nprocs=nproc,
            join=False,
            start_method=START_METHOD,
        )
        try:
            while not context.join():
                pass
        except ProcessException:
            codes = [process.exitcode or 0 for process in context.processes]
            raise _first_error(codes, Path(folder)) from None
        finally:
            for process in context.processes:  # where the caller was interrupted
                if process.is_alive():
                    process.kill()
                process.join()
        return pickle.loads((Path(folder) / "result").read_bytes())


def _process(
    number: int, nproc: int, folder: str, task: Callable[..., Any], arguments: tuple
) -> None:
    """One of the processes, from its first line to its last."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // nproc))
    if sys.platform == "linux":  # they are on one machine, whatever its name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # a spawned process spawns; the workers of its loaders should start as in any other process
    multiprocessing.set_start_method(None, force=True)
    end_with_parent()
    group.place = Place(number, nproc, number, nproc, f"file://{folder}/meeting")
    try:
        result = task(*arguments)
        if number == 0:
            (Path(folder) / "result").write_bytes(pickle.dumps(result))
        group.leave()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = str(error) if isinstance(error, CompressionError) else None
        failure = (time.monotonic_ns(), number, message, traceback.format_exc())
        (Path(folder) / f"failure-{number}").write_bytes(pickle.dumps(failure))
        sys.exit(1)


def end_with_parent() -> None:
    """Have this process killed when its parent is gone.

    Nobody else would end it, and it would write into the folder of a run that may be resumed.
    """
    parent = multiprocessing.parent_process()

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    if parent is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _first_error(codes: Sequence[int], folder: Path) -> Exception:
    """The error for processes with these exit codes: a kill, or else the first exception."""
    n = len(codes)
    wanted = f"Expected all {n} processes to work to the end, but process"
    for number, code in enumerate(codes):
        if code < 0 and code != -signal.SIGTERM:  # with which torch ends the others
            name = signal.Signals(-code).name
            out_of_memory = code == -signal.SIGKILL
            reason = ", as a system does that runs out of memory" if out_of_memory else ""
            return CompressionError(f"{wanted} {number} was ended by {name}{reason}.")
    failures = [pickle.loads(path.read_bytes()) for path in folder.glob("failure-*")]
    raised = {number for _, number, _, _ in failures}
    for number, code in enumerate(codes):
        if code > 0 and number not in raised:
            return CompressionError(f"{wanted} {number} left with exit code {code}.")
    _, number, message, trace = min(failures)
    if message is not None:
        return CompressionError(message)
    return RuntimeError(f"Process {number} of {n} ended with an error:\n{trace}")
