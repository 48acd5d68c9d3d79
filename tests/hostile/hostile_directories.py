"""Hostile things in place of a run's files: links, devices, FIFOs, sockets, directories, giants, endless lines."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from typing import TYPE_CHECKING

from forge import MANIFEST, STATE, TENSORS, Case, manifest_fields, put_manifest, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OUTSIDE = "outside"  # beside the run directory: what nobody may touch
_TERABYTE = 1 << 40
_LINE = b'{"row":"step","step":1,"epoch":0,"batch":1,"loss":0.5}\n'


def _outside(path: Path) -> Path:
    """The directory outside, wherever below the run directory `path` lies."""
    return next(parent for parent in path.parents if (parent / OUTSIDE).exists()) / OUTSIDE


def _link_to_copy(path: Path) -> None:
    target = _outside(path) / "copy"
    if path.is_dir():
        shutil.copytree(path, target)
        shutil.rmtree(path)
    else:
        path.rename(target)
    path.symlink_to(target)


def _hard_link(path: Path) -> None:
    target = _outside(path) / "copy"
    path.rename(target)
    os.link(target, path)


def _socket(path: Path) -> None:
    """Bound by a relative name: a socket's path is at most 108 bytes."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def _replaced_by(put: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        put(path)

    return replace


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(_TERABYTE)


_THINGS: dict[str, Callable[[Path], object]] = {
    "a link to a copy outside": _link_to_copy,
    "a link to /etc/passwd": _replaced_by(lambda path: path.symlink_to("/etc/passwd")),
    "a link to /dev/zero": _replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "a link to a file outside that is not there": _replaced_by(lambda p: p.symlink_to(_outside(p) / "new")),
    "a link to itself": _replaced_by(lambda path: path.symlink_to(path.name)),
    "a directory": _replaced_by(lambda path: path.mkdir()),
    "a FIFO": _replaced_by(lambda path: os.mkfifo(path)),
    "a socket": _replaced_by(_socket),
    "endless zeros, a device": _replaced_by(lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))),
    "a device that takes all": _replaced_by(lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))),
    "a block device": _replaced_by(lambda path: os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 250))),
    "a terabyte of nothing": _replaced_by(_sparse),
    "empty": _replaced_by(lambda path: path.touch()),
}
_FILE_THINGS = {**_THINGS, "a second name of a file outside": _hard_link}
_CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "a line of 100 MB": lambda data: data + b'{"event":"' + b"x" * 100_000_000 + b'"}\n',
    "100 MB without an end": lambda data: data + b"x" * 100_000_000,
    "100,000 levels": lambda data: data + b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "bytes that are no text": lambda data: data + bytes(range(256)) * 100 + b"\n",
    "only zeros": lambda data: bytes(len(data) or 100),
    "a number of 100,000 digits": lambda data: data + b'{"step":' + b"9" * 100_000 + b"}\n",
    "a million empty lines": lambda data: data + b"\n" * 1_000_000,
    "a million rows": lambda data: data + _LINE * 1_000_000,
    "lists for rows": lambda data: data + b"[]\nnull\n1\n",
}
_EVENTS = (
    {"event": "committed"},
    {"event": "committed", "snapshot": ["x"]},
    {"event": "launched", "command": {"python": "/bin/sh", "script": None, "module": None, "args": [], "cwd": "/"}},
    {"event": "launched", "command": {"evil": 1}},
    {"event": "launched", "command": "rm -rf /"},
    {"event": "launched", "command": None, "directory": 5},
    {"event": "finished"},
    {"event": "finished", "outcome": {"a": 1}},
    {"event": "failed", "error": "\x1b[2J"},
    {"event": "exited"},
    {"event": "exited", "generation": 1, "code": 0, "sources": {"/etc/passwd": "0" * 32, "/dev/zero": ""}},
    {"event": ["x"], "time": {"a": 1}},
)
_OWNER = {"host": "h", "pid": 1, "boot_id": "b", "process_start": "1", "since": "now", "generation": 1}
_OWNERS = (
    {"generation": 10**1500},
    {"generation": -(10**1500)},
    {"generation": True},
    {"generation": "1"},
    {"pid": -1},
    {"pid": 0},
    {"pid": 10**1000},
    {"pid": 2**31},
    {"pid": 10**30, "process_start": "", "host": "HERE", "boot_id": "HERE"},
    {"pid": 10**30, "process_start": ["x"], "host": "HERE", "boot_id": "HERE"},
    {"step": "x" * 800},
    {"step": {"a": 1}},
    {"command": ["x"]},
    {"since": None},
    {"host": "\x1b[2J" * 50},
    {"evil": 1},
)
_IDENTITIES = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b'{"run_id":null}',
    b'{"run_id":["x"]}',
    b'{"run_id":"../../etc"}',
    b'{"run_id":"x","run_id":"y"}',
    b'{"run_id":' + b"9" * 100_000 + b"}",
    b'{"run_id":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"run_id":"' + b"x" * 10_000_000 + b'"}',
    b'{"run_id":"' + b"x" * 200_000_000 + b'"}',
    b'{"run_id":"x","forked_from":5}',
    b'{"run_id":"x","forked_from":{"snapshot":[1],"directory":{}}}',
    b'{"run_id":"x","imported_from":{"file":[1]}}',
    bytes(range(256)),
)


def cases() -> Iterator[Case]:
    """All of them; those that take devices are left out where none can be made."""
    for name in (MANIFEST, STATE, TENSORS):
        for thing, put in _FILE_THINGS.items():
            is_sound = thing == "a second name of a file outside"
            yield Case(
                "file kinds", f"{name} is {thing}", lambda r, n=name, p=put: void(p(snapshot(r) / n)), not is_sound
            )
        yield Case("file kinds", f"{name} is a terabyte, and listed so", lambda r, n=name: _listed_giant(r, n))
    for thing, put in _THINGS.items():
        yield Case("file kinds", f"the snapshot is {thing}", lambda r, p=put: void(p(snapshot(r))))
    yield from _run_files()
    yield from _directories()
    yield from _contents()


def void(value: object) -> None:
    """Take a value and give none."""


def _listed_giant(run: Path, name: str) -> None:
    fields = manifest_fields(run)
    if name in fields["files"]:
        fields["files"][name]["num_bytes"] = _TERABYTE
        put_manifest(run, fields)
    _replaced_by(_sparse)(snapshot(run) / name)


def _case(name: str, make: Callable[[Path], object]) -> Case:
    return Case("run directories", name, lambda run: void(make(run)), refused=False, trained=True)


def _run_files() -> Iterator[Case]:
    for name in ("run.json", "run.lock", "events.jsonl", "metrics.jsonl"):
        for thing, put in _FILE_THINGS.items():
            yield _case(f"{name} is {thing}", lambda run, n=name, p=put: p(run / n))


def _directories() -> Iterator[Case]:
    for name in ("snapshots", "quarantine", "set-aside"):
        for thing, put in _THINGS.items():
            if thing in ("a link to a copy outside", "a directory") and name != "snapshots":
                continue
            yield _case(f"{name} is {thing}", lambda run, n=name, p=put: p(run / n))
    for name in (".tmp-evil", ".trash-evil", "snapshots/.tmp-evil", "snapshots/.trash-evil"):
        yield _case(f"{name} is a link outside", lambda run, n=name: (run / n).symlink_to(_outside(run / n)))
        yield _case(f"{name} is a FIFO", lambda run, n=name: os.mkfifo(run / n))
        yield _case(f"{name} holds links outside", lambda run, n=name: _links_below(run / n))
        yield _case(f"{name} is 3,000 levels deep", lambda run, n=name: _deep(run / n))
    yield _case("10,000 snapshots that are empty", _many_snapshots)


def _links_below(path: Path) -> None:
    path.mkdir()
    (path / "directory").symlink_to(_outside(path))
    (path / "file").symlink_to(_outside(path) / "precious")
    os.link(_outside(path) / "precious", path / "second-name")


def _deep(path: Path) -> None:
    path.mkdir()
    here = os.getcwd()
    os.chdir(path)
    try:
        for _ in range(3_000):
            os.mkdir("deeper")
            os.chdir("deeper")
    finally:
        os.chdir(here)


def _many_snapshots(run: Path) -> None:
    for number in range(10_000):
        (run / "snapshots" / f"step-{900 + number:09d}").mkdir()


def _contents() -> Iterator[Case]:
    for name in ("events.jsonl", "metrics.jsonl"):
        for what, change in _CONTENTS.items():
            yield _case(f"{name}: {what}", lambda run, n=name, c=change: _change(run / n, c))
    for number, event in enumerate(_EVENTS):
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        yield _case(
            f"event {number}: {line[:50]!r}", lambda run, line=line: _change(run / "events.jsonl", lambda d: d + line)
        )
    for number, fields in enumerate(_OWNERS):
        yield _case(f"owner {number}: {str(fields)[:50]}", lambda run, fields=fields: _sign_lock(run, fields))
    for what, data in {"deep": b"[" * 2000, "zeros": bytes(2048), "100 MB": b"x" * 100_000_000}.items():
        yield _case(f"run.lock: {what}", lambda run, data=data: (run / "run.lock").write_bytes(data))
    for number, data in enumerate(_IDENTITIES):
        yield _case(f"identity {number}: {data[:40]!r}", lambda run, data=data: (run / "run.json").write_bytes(data))


def _change(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _sign_lock(run: Path, fields: dict[str, object]) -> None:
    """A record in the lock file; HERE stands for what is true of this machine."""
    from resumable_trainer.durable import lock

    here = {"host": socket.gethostname(), "boot_id": lock._boot_id()}
    owner = {**_OWNER, **fields}
    owner.update({name: value for name, value in here.items() if owner[name] == "HERE"})
    (run / "run.lock").write_bytes(json.dumps(owner).encode().ljust(2047) + b"\n")
