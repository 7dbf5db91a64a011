"""Load on loopback: the uncompressed model's service against the compressed one's.

    python -m examples.serve.prepare --out serving
    python -m examples.serve.load --films serving [--items 200000] [--requests 10000]

Two services, a process each with one thread for the model, take turns. For MovieLens-100K the
models are those of `prepare`; for the larger catalogue SASRec (d 64) has made-up weights. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
K, LONGEST, SEED = 20, 50, 2020
ROUNDS = 4  # of requests to each service
WARM_UP = 500  # requests before memory is read for the first time
ALONE = 200  # requests of a single client, a round
STARTED = 60  # seconds a service may take to start


class Catalogue:
    """As much of a RecBole dataset as a model's constructor asks for."""

    iid_field = "item_id"

    def __init__(self, n_items: int) -> None:
        self._n_items = n_items

    def num(self, field: str) -> int:
        """Items, padding included."""
        return self._n_items


def make_up(out: Path, n_items: int) -> None:
    """Folders of a SASRec with made-up weights, uncompressed and compressed."""
    import numpy as np
    import torch
    from recbole.model.sequential_recommender import SASRec

    from cprec_recbole import CompressionConfig, compress
    from cprec_recbole.host.library import recbole_config

    torch.manual_seed(SEED)
    model = SASRec(recbole_config("SASRec", "ml-100k", {"use_gpu": False}), Catalogue(n_items + 1))
    counts = 1e7 / np.arange(1, n_items + 2)  # Zipf's law
    tokens = [f"B{item:09d}" for item in range(1, n_items + 1)]
    whole = compress(model, CompressionConfig.uncompressed(), item_counts=counts)
    whole.save_pretrained(out / "uncompressed", tokens)
    small = compress(model, ranks=[64, 16, 4], item_counts=counts, dtype="int8")
    small.save_pretrained(out / "compressed", tokens)


class Server:
    """A service in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "examples.serve", str(folder), "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )
        self.latencies: list[float] = []
        self.alone: list[float] = []
        self.memory: list[float] = []
        self.seconds, self.errors = 0.0, 0

    def wait(self) -> None:
        """Until it answers."""
        give_up = perf_counter() + STARTED
        while perf_counter() < give_up and self._process.poll() is None:
            try:
                urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                sleep(0.1)
        raise SystemExit(f"the service of {self.folder} did not start")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()

    def mib(self) -> float:
        """Its resident set now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def cpu_seconds(self) -> float:
        """What it has used of the processor."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(server: Server, bodies: list[bytes], clients: int) -> list[float]:
    """Send requests over so many connections, each the next one after its answer; the milliseconds
    of those that were answered rightly. Others are counted as errors."""
    waiting, took = iter(bodies), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for body in waiting:
            head = (
                "POST /recommend HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            started = perf_counter()
            writer.write(head.encode() + body)
            status, found = await answer(reader)
            if status == 200 and len(json.loads(found)["tokens"]) == K:
                took.append((perf_counter() - started) * 1e3)
        writer.close()

    done = await asyncio.gather(*(client() for _ in range(clients)), return_exceptions=True)
    for each in done:
        if isinstance(each, BaseException):
            print(f"a client ended: {each!r}", file=sys.stderr)
    server.errors += len(bodies) - len(took)
    return took


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length:")[2].partition("\r\n")[0])
    return int(head.split(" ", 2)[1]), await reader.readexactly(length)


def requests(folder: Path, n: int) -> list[bytes]:
    """Bodies with random histories of 1 to 50 of the catalogue's tokens."""
    tokens = json.loads(next(folder.glob("items-*.json")).read_text(encoding="utf-8"))
    draw = random.Random(SEED)
    return [
        json.dumps(
            {"history": draw.sample(tokens, draw.randint(1, LONGEST)), "k": K, "exclude_seen": True}
        ).encode()
        for _ in range(n)
    ]


@contextmanager
def running(folders: list[Path]) -> Iterator[list[Server]]:
    """Services, ready; ended afterwards."""
    with ExitStack() as stack:
        servers = []
        for folder in folders:
            servers.append(Server(folder))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait()
        yield servers


def measure(where: Path, n: int, clients: int) -> list[dict[str, Any]]:
    """Figures of both services: one dictionary each."""
    with running([where / "uncompressed", where / "compressed"]) as servers:
        bodies = requests(servers[0].folder, n)
        for server in servers:
            asyncio.run(ask(server, bodies[:WARM_UP], clients))
            server.memory.append(server.mib())
        before = [server.cpu_seconds() for server in servers]
        for start in range(0, n, -(-n // ROUNDS)):
            for server in servers:
                part = bodies[start : start + -(-n // ROUNDS)]
                started = perf_counter()
                server.latencies += asyncio.run(ask(server, part, clients))
                server.seconds += perf_counter() - started
                server.memory.append(server.mib())
        after = [server.cpu_seconds() for server in servers]
        for start in range(0, ALONE * ROUNDS, ALONE):
            for server in servers:
                server.alone += asyncio.run(ask(server, bodies[start : start + ALONE], 1))
    return [
        {
            "a second": f"{len(server.latencies) / server.seconds:,.0f}",
            "50th": f"{percentile(server.latencies, 50):.1f}",
            "95th": f"{percentile(server.latencies, 95):.1f}",
            "99th": f"{percentile(server.latencies, 99):.1f}",
            "errors": f"{server.errors}",
            "processor": f"{(end - start) / n * 1e3:.2f}",
            "alone, 50th": f"{percentile(server.alone, 50):.1f}",
            "99th alone": f"{percentile(server.alone, 99):.1f}",
            "MiB": ", ".join(f"{each:.0f}" for each in server.memory),
        }
        for server, start, end in zip(servers, before, after)
    ]


def percentile(values: list[float], share: int) -> float:
    """The least value that so many percent are not above; NaN of none."""
    place = -(-share * len(values) // 100) - 1
    return sorted(values)[place] if values else float("nan")


def weights(folder: Path) -> int:
    """Bytes of the weights' file."""
    return next(folder.glob("weights-*")).stat().st_size


def table(name: str, where: Path, found: list[dict[str, Any]]) -> str:
    """Markdown."""
    kinds = ("uncompressed", "compressed")
    lines = [f"| {name} | {' | '.join(kinds)} |", "|---|--:|--:|"]
    lines.append(f"| weights, bytes | {' | '.join(f'{weights(where / k):,}' for k in kinds)} |")
    for row, label in ROWS.items():
        lines.append(f"| {label} | {' | '.join(each[row] for each in found)} |")
    return "\n".join(lines)


ROWS = {
    "a second": "requests a second",
    "50th": "ms, 50th percentile",
    "95th": "ms, 95th percentile",
    "99th": "ms, 99th percentile",
    "errors": "errors",
    "processor": "processor ms of the service a request",
    "alone, 50th": "one client: ms, 50th percentile",
    "99th alone": "one client: ms, 99th percentile",
    "MiB": "memory of the service, MiB, before and after each quarter",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--films", type=Path, help="a folder of `prepare`")
    parser.add_argument("--items", type=int, default=200_000, help="0: no larger catalogue")
    parser.add_argument("--requests", type=int, default=10_000, help="to each service")
    parser.add_argument("--clients", type=int, default=16, help="at a time")
    options = parser.parse_args(arguments)
    if options.films:
        found = measure(options.films.resolve(), options.requests, options.clients)
        print(table("MovieLens-100K", options.films, found), flush=True)
    if options.items:
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            make_up(where, options.items)
            found = measure(where, options.requests, options.clients)
            print("\n" + table(f"{options.items:,} items", where, found), flush=True)


if __name__ == "__main__":
    main()
