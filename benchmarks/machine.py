"""The machine's own limits, measured in the same run: what no saving can be faster than."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import peers
from benchmarks.table import Row, Side
from benchmarks.timing import ArmError, Bench, alternately, timed, with_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.worker import Laps

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BIG_BYTES, QUICK_BYTES = 1_100_000_000, 300_000_000
_CHUNK = 8 << 20
_BLOCK = 4096


def big_bytes(bench: Bench) -> int:
    """Size of the big state."""
    return bench.pick(BIG_BYTES, QUICK_BYTES)


def gigabytes(bench: Bench) -> str:
    """The same, in words."""
    return f"{big_bytes(bench) / 1e9:.1f} GB"


def facts(scratch: Path) -> dict[str, str]:
    """What a reader must know of the machine."""
    return {
        "machine": f"{_processor()}, {CORES} cores, {_memory()}, {_file_system(scratch)}",
        "versions": f"Python {platform.python_version()}, {peers.versions()}",
    }


def load() -> str:
    """Load averages, as this system counts them."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def limits(bench: Bench) -> Iterator[Row]:
    """Memory copy, raw write with sync, sync latency, import of torch, start of Python."""
    rounds, size = bench.pick(5, 3), gigabytes(bench)
    for threads in sorted({1, CORES}):
        found = bench.in_child("machine:copies", threads=threads, num_bytes=big_bytes(bench), rounds=rounds)
        yield Row("machine", f"memory copy of {size}, {threads} threads", Side("copy", tuple(found)))
    found = bench.in_child("machine:writes", threads=1, num_bytes=big_bytes(bench), rounds=rounds)
    yield Row("machine", f"raw write + sync of {size}", Side("write", tuple(found["big"]), durability="synced"))
    yield Row("machine", "sync latency: write + sync of 4 KiB", Side("sync", tuple(found["small"])))
    arms = [
        lambda: {"torch": starting(["-c", "import torch"])},
        lambda: {"nothing": starting(["-c", "pass"])},
    ]
    measured = alternately(arms, rounds=bench.pick(7, 3))
    yield Row("machine", "python -c 'import torch'", Side("start", measured["torch"]))
    yield Row("machine", "python -c pass", Side("start", measured["nothing"]))


def starting(arguments: list[str], *, cwd: str | None = None, threads: int = 1) -> float:
    """Seconds from starting an interpreter to its end.

    Raises:
        ArmError: It ended with another code than 0.
    """
    started = time.perf_counter()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=with_threads(threads), capture_output=True, check=False, text=True)
    taken = time.perf_counter() - started
    if done.returncode:
        raise ArmError(f"ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return taken


def copies(laps: Laps, *, num_bytes: int, rounds: int, directory: str) -> None:
    """For a child: copy between two buffers that are there already."""
    import torch

    source = torch.ones(num_bytes // 4)
    target = torch.zeros_like(source)
    laps.turn(alternately([lambda: {"copy": timed(lambda: target.copy_(source))}], rounds=rounds)["copy"])


def writes(laps: Laps, *, num_bytes: int, rounds: int, directory: str) -> None:
    """For a child: new files, as many bytes at once as the kernel takes."""
    data, path = memoryview(os.urandom(_CHUNK) * (num_bytes // _CHUNK + 1))[:num_bytes], Path(directory) / "raw"
    big = alternately([lambda: {"big": raw_write(path, data)}], rounds=rounds)["big"]
    small = alternately([lambda: {"small": raw_write(path, data[:_BLOCK])}], rounds=20 * rounds)["small"]
    laps.turn({"big": big, "small": small})


def raw_write(path: Path, data: Any) -> float:
    """Seconds to write a new file and make it durable; it is removed afterwards."""

    def act() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for start in range(0, len(data), _CHUNK):
                os.write(fd, data[start : start + _CHUNK])
            os.fsync(fd)
        finally:
            os.close(fd)

    taken = timed(act)
    path.unlink()
    return taken


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            return f"{int(line.split()[1]) / 2**20:.0f} GiB"
    return "unknown memory"


def _file_system(path: Path) -> str:
    """Type of the file system that a path lies on."""
    best, kind = "", "unknown file system"
    for line in _lines("/proc/mounts"):
        _, mount, found, *_ = line.split()
        inside = path.resolve().is_relative_to(mount)
        if inside and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
