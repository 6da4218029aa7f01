"""The service under load: queries a second and latency with 1, 8 and 64 clients, with and without micro-batches.

    python benchmarks/bench_serve.py --bundle work/ViT-B-32 [--rows 100000] [--rounds 3] [--requests 20000]

A gallery of random unit embeddings, every query a text that was never asked before, the server on one core and the
clients on another. Three servers take turns, A B C, C B A: `clipret-search serve`, the same with --limit batch=1, and
the plain server that one writes first: a FastAPI handler that encodes and ranks its one query with an open Searcher.
Rates are medians over rounds, percentiles those of the latencies of all rounds together. Both are wall time, which
others on the machine disturb (`load` says how many there were); what the server's CPU spent on a query is not
disturbed. Then memory: the server remembers 16,384 texts, so it is first asked for more than those, 64 a request; what
counts is its resident size after each quarter of --requests single searches that follow. Loopback only. Some eight
minutes.
"""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench_query import TINY, make_gallery, texts
from machine import keep

from clipret import Bundle, Encoder, EncoderConfig, Gallery, Searcher

CLIENTS = {1: 200, 8: 480, 64: 960}  # and requests of each round
REMEMBERED = 17_000  # texts: more than a searcher keeps
SERVERS = ("batched", "one at a time", "plain")


def plain(gallery: Path, bundle: Path) -> None:
    """The peer: as the tutorials have it, with a lock because an engine is not for many threads at once."""
    import uvicorn
    from fastapi import FastAPI

    opened = Gallery.open(gallery)
    searcher = Searcher(opened, Encoder(Bundle.open(bundle), EncoderConfig(device="cpu", threads=1)), resident=True)
    searcher.search(["warm up"], 10)
    lock = threading.Lock()
    app = FastAPI()

    @app.get("/search")
    def search(q: str, k: int = 10) -> list[dict[str, Any]]:
        with lock:
            [hits] = searcher.search([q], k)
            metadata = opened.metadata([hit.id for hit in hits])
        return [
            {"rank": hit.rank, "id": hit.id, "score": hit.score, "path": hit.path, "metadata": more}
            for hit, more in zip(hits, metadata, strict=True)
        ]

    from clipret.server.run import listen

    listening = listen("127.0.0.1", 0)
    print(f"serving plain at http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
    config = uvicorn.Config(app, http="h11", ws="none", log_level="warning", access_log=False)
    uvicorn.Server(config).run([listening])


@contextlib.contextmanager
def server(kind: str, gallery: Path, bundle: Path, core: int) -> Iterator[tuple[int, int]]:
    """Port and process id of a server on one core."""
    if kind == "plain":
        command = [sys.executable, __file__, "--plain", str(gallery), "--bundle", str(bundle)]
    else:
        batch = "64" if kind == "batched" else "1"
        command = [sys.executable, "-m", "clipret.cli", "serve", str(gallery), "--bundle", str(bundle), "--port", "0"]
        command += ["--encoder", "threads=1", "--limit", f"batch={batch}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as it:
        try:
            os.sched_setaffinity(it.pid, {core})
            assert it.stdout is not None
            address = re.search(r":(\d+)/", it.stdout.readline())
            assert address, f"{kind} did not start"
            for thread in Path(f"/proc/{it.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {core})
            yield int(address[1]), it.pid
        finally:
            it.terminate()


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


async def load(port: int, clients: int, asked: list[str]) -> tuple[float, list[float]]:
    """Seconds for all of the texts, and the latency of each in milliseconds; every client asks again when answered."""
    rest = iter(asked)
    times = list[float]()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for text in rest:
            began = time.perf_counter()
            writer.write(f"GET /search?k=10&q={quote(text)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            assert head.startswith(b"HTTP/1.1 200"), head
            assert length
            await reader.readexactly(int(length[1]))
            times.append(1000 * (time.perf_counter() - began))
        writer.close()
        await writer.wait_closed()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, times


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(port: int, process: int, clients: int, asked: list[str]) -> tuple[dict[str, float], list[float]]:
    """Rate and CPU time, and each request's latency in milliseconds."""
    before = cpu_seconds(process)
    seconds, times = asyncio.run(load(port, clients, asked))
    spent = 1000 * (cpu_seconds(process) - before) / len(asked)
    return {"queries_a_second": len(asked) / seconds, "server_cpu_ms_a_query": spent}, times


def compare(gallery: Path, bundle: Path, rounds: int, cores: list[int], fresh: Iterator[str]) -> dict[str, Any]:
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    latencies: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        running = {kind: stack.enter_context(server(kind, gallery, bundle, cores[0])) for kind in SERVERS}
        for kind in SERVERS:
            asyncio.run(load(running[kind][0], 8, list(itertools.islice(fresh, 64))))
        for number in range(rounds):
            for clients, count in CLIENTS.items():
                for kind in SERVERS if number % 2 == 0 else reversed(SERVERS):
                    asked = list(itertools.islice(fresh, count))
                    found, times = measure(*running[kind], clients, asked)
                    samples.setdefault((kind, clients), []).append(found)
                    latencies.setdefault((kind, clients), []).extend(times)
                    print(f"{number} {kind} {clients}: {json.dumps(found)}", file=sys.stderr)
    result: dict[str, Any] = {}
    for (kind, clients), found in samples.items():
        values = {name: statistics.median(one[name] for one in found) for name in found[0]}
        times = latencies[kind, clients]
        values |= {f"p{share}_ms": percentile(times, share / 100) for share in (50, 95, 99)} | {"requests": len(times)}
        rounded = {name: round(value, 2) for name, value in values.items()}
        result.setdefault(kind, {})[f"{clients} clients"] = rounded
    for clients in CLIENTS:
        pairs = zip(samples["batched", clients], samples["plain", clients], strict=True)
        ratio = statistics.median(ours["queries_a_second"] / peer["queries_a_second"] for ours, peer in pairs)
        result.setdefault("rate_over_plain", {})[f"{clients} clients"] = round(ratio, 2)
    return result


def memory(gallery: Path, bundle: Path, requests: int, core: int, fresh: Iterator[str]) -> dict[str, float]:
    with server("batched", gallery, bundle, core) as (port, process):
        sizes = {"MiB_at_start": resident_mib(process)}
        fill(port, fresh)
        asyncio.run(load(port, 64, list(itertools.islice(fresh, 640))))  # connections and metrics come into being
        sizes["MiB_after_0"] = resident_mib(process)
        for quarter in range(1, 5):
            asyncio.run(load(port, 64, list(itertools.islice(fresh, requests // 4))))
            sizes[f"MiB_after_{quarter * requests // 4}"] = resident_mib(process)
            print(f"memory: {sizes}", file=sys.stderr)
    return {name: round(size, 1) for name, size in sizes.items()}


def fill(port: int, fresh: Iterator[str]) -> None:
    """Have the server remember as many texts as it ever does."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        for _ in range(0, REMEMBERED, 64):
            body = json.dumps({"queries": list(itertools.islice(fresh, 64)), "k": 1})
            connection.request("POST", "/search", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=TINY)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        plain(arguments.plain, arguments.bundle)
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    fresh = (f"{text} {number}" for number in itertools.count() for text in texts())
    bundle = Bundle.open(arguments.bundle)
    with tempfile.TemporaryDirectory() as folder:
        gallery = Path(folder, "gallery")
        make_gallery(gallery, bundle, arguments.rows)
        result = {
            "model": f"{bundle.manifest.model} {bundle.manifest.precision}",
            "rows": arguments.rows,
            "dim": bundle.manifest.embedding_dim,
            "load": round(os.getloadavg()[0], 1),
            **compare(gallery, arguments.bundle, arguments.rounds, cores, fresh),
            "memory": memory(gallery, arguments.bundle, arguments.requests, cores[0], fresh),
        }
    keep("serve", result)


if __name__ == "__main__":
    main()
