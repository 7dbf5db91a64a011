"""Start several processes on this machine that end together. The caller gets the error that came
first: a process that loses its partner fails too, and may be noticed before it."""

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
    """Run `task(*arguments)`, which pickle takes, in `nproc` processes, each with a `group.place`;
    returns what the first one returns. A CompressionError where a process raised one or was killed;
    a RuntimeError with the traceback of any other error."""
    with tempfile.TemporaryDirectory(prefix="cprec-") as name:
        folder = Path(name)
        work = (nproc, folder, task, arguments)
        context = start_processes(_process, work, nproc, join=False, start_method=START_METHOD)
        try:
            while not context.join():
                pass
        except ProcessException:
            codes = [process.exitcode or 0 for process in context.processes]
            raise _first_error(codes, folder) from None
        finally:
            for process in context.processes:  # where the caller was interrupted
                if process.is_alive():
                    process.kill()
                process.join()
        return pickle.loads((folder / "result").read_bytes())


def _process(
    number: int, nproc: int, folder: Path, task: Callable[..., Any], arguments: tuple
) -> None:
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
            (folder / "result").write_bytes(pickle.dumps(result))
        group.leave()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        failure: Exception = CompressionError(str(error))
        if not isinstance(error, CompressionError):
            trace = traceback.format_exc()
            failure = RuntimeError(f"Process {number} of {nproc} ended with an error:\n{trace}")
        failed = time.monotonic_ns(), failure
        (folder / f"failure-{number}").write_bytes(pickle.dumps(failed))
        sys.exit(1)


def end_with_parent() -> None:
    """Have this process killed when its parent is gone, for it writes where a run may resume."""

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _first_error(codes: Sequence[int], folder: Path) -> Exception:
    """The error for processes with these exit codes: a kill, or else the first exception."""
    wanted = f"Expected all {len(codes)} processes to work to the end, but process"
    for number, code in enumerate(codes):
        if code < 0 and code != -signal.SIGTERM:  # with which torch ends the others
            name = signal.Signals(-code).name
            reason = ", as a system does that runs out of memory" if name == "SIGKILL" else ""
            return CompressionError(f"{wanted} {number} was ended by {name}{reason}.")
        if code > 0 and not (folder / f"failure-{number}").exists():
            return CompressionError(f"{wanted} {number} left with exit code {code}.")
    failures = [pickle.loads(path.read_bytes()) for path in folder.glob("failure-*")]
    return min(failures, key=lambda failed: failed[0])[1]
