#!/usr/bin/env python
"""Mutants of the commit, lock and journal code: each must be found by a test, or it is named.

    .venv/bin/python scripts/mutants.py [--only durable/lock.py] [--jobs 2]

One place at a time: a comparison flipped, a condition negated, `and` exchanged with `or`, a call or a raise left
out. The changed module lies in a copy of the package, which processes that the tests start import too. A mutant
that makes the tests hang is found. Takes an hour or so on two cores.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import pydantic  # noqa: F401 - loaded once here, for all the forks
import pytest
import torch  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "snapshot/committer.py": ["snapshot/test_committer.py", "manager/test_manager.py"],
    "durable/journal.py": ["durable/test_journal.py"],
    "durable/lock.py": ["durable/test_lock.py", "manager/test_manager.py"],
    "durable/files.py": ["durable/test_files.py", "snapshot/test_committer.py"],
    "snapshot/store.py": ["snapshot/test_choosing.py", "snapshot/test_snapshot.py", "snapshot/test_committer.py"],
    "durable/digest.py": ["durable/test_digest.py", "snapshot/test_choosing.py"],
    "durable/filesystem.py": ["durable/test_filesystem.py", "snapshot/test_committer.py", "snapshot/test_forking.py"],
}
LIMIT_SECONDS = 120
FLIPPED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def changes(node: Any) -> Iterator[tuple[int, str, Callable[[Any], None]]]:
    """What can be changed at one node: the line, a word for it, and the change in place."""
    if isinstance(node, ast.Compare):
        yield node.lineno, "comparison flipped", lambda n: n.ops.__setitem__(0, FLIPPED[type(n.ops[0])]())
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield node.lineno, "and/or exchanged", lambda n: setattr(n, "op", other())
    if isinstance(node, ast.If | ast.While | ast.IfExp) and ast.unparse(node.test) not in ("TYPE_CHECKING", "True"):
        yield node.lineno, "condition negated", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    for name in ("body", "orelse", "finalbody"):
        statements = getattr(node, name, None)
        for index, inner in enumerate(statements if isinstance(statements, list) else []):
            is_call = isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call)
            if is_call or isinstance(inner, ast.Raise):
                word = "call left out" if is_call else "raise left out"
                yield inner.lineno, word, lambda n, f=name, i=index: getattr(n, f).__setitem__(i, ast.Pass())


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, what was changed, and the source with that one change."""
    for number, node in enumerate(ast.walk(ast.parse(source))):
        for which, (line, word, _) in enumerate(changes(node)):
            tree = ast.parse(source)
            target = next(n for i, n in enumerate(ast.walk(tree)) if i == number)
            list(changes(target))[which][2](target)
            yield line, word, ast.unparse(ast.fix_missing_locations(tree))


def survives(package: Path, module: str, source: str) -> bool:
    """Whether the tests pass with this source in the place of the module's."""
    path = package / "resumable_trainer" / module
    path.write_text(source)
    pid = os.fork()
    if pid == 0:
        run_tests(package, module)
    deadline = time.monotonic() + LIMIT_SECONDS
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    end_what_is_left(package)
    if done == (0, 0):
        os.waitpid(pid, 0)
    shutil.copy(ROOT / "resumable_trainer" / module, path)
    return done[0] == pid and done[1] == 0


def end_what_is_left(package: Path) -> None:
    """Processes that the tests started in sessions of their own; a mutant may keep them from ending."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"PYTHONPATH={package}\0".encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)


def run_tests(package: Path, module: str) -> None:
    """In the child: the tests on the changed package, and the end of the process."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.path.insert(0, str(package))
    os.environ["PYTHONPATH"] = str(package)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    os.chdir(package)  # `python -c` imports from there before anything else
    options = ["-x", "-q", "-p", "no:cacheprovider", "-c", f"{ROOT}/pyproject.toml", f"--basetemp={package}/scratch"]
    os._exit(pytest.main([*options, *(f"{ROOT}/tests/{name}" for name in TESTS[module])]))


def work(package: Path, queue: SimpleQueue[Any], survivors: list[str], counts: dict[str, int]) -> None:
    """Take mutants from the queue until it is empty."""
    shutil.copytree(ROOT / "resumable_trainer", package / "resumable_trainer", ignore=shutil.ignore_patterns("*.pyc"))
    while (task := queue.get()) is not None:
        module, line, word, source = task
        if not word:
            assert survives(package, module, source), f"the tests of {module} fail without a change"
            continue
        counts[module] = counts.get(module, 0) + 1
        if survives(package, module, source):
            survivors.append(f"{module}:{line} {word}")
            print(f"SURVIVES {survivors[-1]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=TESTS, help="this module alone; may be repeated")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    queue: SimpleQueue[Any] = SimpleQueue()
    survivors: list[str] = []
    counts: dict[str, int] = {}
    for module in chosen.only or TESTS:
        unchanged = (ROOT / "resumable_trainer" / module).read_text()
        queue.put((module, 0, "", unchanged))
        for line, word, source in mutants(unchanged):
            queue.put((module, line, word, source))
    print(f"{queue.qsize()} mutants", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        threads = []
        for number in range(chosen.jobs):
            queue.put(None)
            threads.append(Thread(target=work, args=(Path(scratch, str(number)), queue, survivors, counts)))
            threads[-1].start()
        for thread in threads:
            thread.join()
    for module, number in counts.items():
        print(f"{module}: {number} mutants, {sum(s.startswith(module) for s in survivors)} survive")
    print(f"{sum(counts.values())} mutants, {len(survivors)} survive")
    return 0


if __name__ == "__main__":
    sys.exit(main())
