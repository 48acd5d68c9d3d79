"""Hostile manifests, each vouching for itself: names that climb out, lying entries, fields of every kind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from forge import MANIFEST, Case, manifest_fields, put_manifest, signed, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GROUP = "manifests"
_CLIMBING = (
    "../step-000000001/state.json",
    "../../run.json",
    "/etc/passwd",
    "/dev/zero",
    MANIFEST,
    "",
    ".",
    "..",
    "a/b",
    "state.json/",
    "./state.json",
    "a\0b",
    "\ud800",
    "\u202enosj.etats",
    "state.json\n",
    "x" * 256,
    "x" * 300,
    "x" * 100_000,
    "\U0001f4a3" * 70,
)
_LENGTHS = (-1, 2**63, 2**64, 10**400, 1.5, "12", True, None)
_DIGESTS = ("", "0" * 31, "0" * 33, "F" * 32, "0" * 32, None, 0, "\uff10" * 32)
_KINDS: tuple[Any, ...] = (None, [], {}, -1, 2**70, "x", 1e308, True)
# Fields in which any word, or nothing, is as good as another: they say where a snapshot comes from.
_FREE = {
    "run_id": ("x",),
    "parent": (None, "x"),
    "parent_digest": (None, "x"),
    "created": ("x",),
    "journal": (None,),
    "outcome": (None,),
    "best": (None,),
    "metrics": ({},),
    "settings": ({},),
    "depends_on": ({},),
    "saved_by": ({},),
}
_BODIES = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "an open brace": b"{",
    "bytes that are no text": bytes(range(256)),
    "100,000 levels": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of 100,000 digits": b'{"format":' + b"9" * 100_000 + b"}",
    "17 MiB": b'{"a":"' + b"x" * (17 << 20) + b'"}',
}
_BEST = {"metric": "a", "value": 1.0, "epoch": 0, "step": 2}


def cases() -> Iterator[Case]:
    """All of them."""
    for name in _CLIMBING:
        entry = {"num_bytes": 0, "digest": "99aa06d3014798d86001c324468d497f"}
        yield _case(f"lists {name[:40]!r} ({len(name)})", lambda f, name=name, e=entry: f["files"].update({name: e}))
    for length in _LENGTHS:
        yield _case(f"length {str(length)[:40]!r}", lambda f, n=length: f["files"]["state.json"].update(num_bytes=n))
    for digest in _DIGESTS:
        yield _case(f"digest {digest!r}", lambda f, d=digest: f["files"]["state.json"].update(digest=d))
    yield _case("lists no state", lambda f: f["files"].pop("state.json"))
    yield _case("lists nothing", lambda f: f["files"].clear())
    yield _case("an entry with a field of its own", lambda f: f["files"]["state.json"].update(evil=1))
    yield _case("100,000 files that are not there", _many_files)
    yield from _fields()
    yield from _lies()
    yield from _raw()


def _case(name: str, change: Callable[[dict[str, Any]], object], *, refused: bool = True) -> Case:
    def make(run: Path) -> None:
        fields = manifest_fields(run)
        change(fields)
        put_manifest(run, fields)

    return Case(GROUP, name, make, refused)


def _many_files(fields: dict[str, Any]) -> None:
    fields["files"].update({f"{n}": {"num_bytes": 1, "digest": "0" * 32} for n in range(100_000)})


def _fields() -> Iterator[Case]:
    """Each field with a value of each kind."""
    names = ("format", "run_id", "generation", "name", "position", "epoch_complete", "parent", "parent_digest")
    for name in (*names, "created", "files", "journal", "outcome", "best", "metrics", "settings", "depends_on"):
        for value in _KINDS:
            yield _case(
                f"{name} is {value!r}",
                lambda f, name=name, value=value: f.update({name: value}),
                refused=value not in _FREE.get(name, ()) or (value is True),
            )
        if name not in _FREE:
            yield _case(f"no {name}", lambda f, name=name: f.pop(name), refused=name != "format")


def _lies() -> Iterator[Case]:
    yield _case("a later format", lambda f: f.update(format=2))
    yield _case("format 1.0", lambda f: f.update(format=1.0))
    yield _case("another snapshot's name", lambda f: f.update(name="step-000000001"))
    yield _case("a name that climbs out", lambda f: f.update(name="../step-000000002"))
    for name, number in {"10^3000": 10**3000, "2^64": 2**64, "-1": -1}.items():
        yield _case(f"generation {name}", lambda f, n=number: f.update(generation=n))
        yield _case(f"step {name}", lambda f, n=number: f["position"].update(step=n))
        yield _case(f"epoch {name}", lambda f, n=number: f["position"].update(epoch=n))
        yield _case(
            f"journal of {name} bytes",
            lambda f, n=number: f.update(journal={"num_bytes": n, "digest": "0" * 32, "rows": n}),
            refused=number < 0 or number > 2**64,
        )
    yield _case("another position than its name says", lambda f: f["position"].update(step=7))
    yield _case("an epoch complete that its name does not say", lambda f: f.update(epoch_complete=True))
    yield _case("a metric that is a word", lambda f: f.update(metrics={"a": "evil"}, best=_BEST))
    yield _case("a parent elsewhere", lambda f: f.update(parent="../../../etc"), refused=False)
    yield _case("words that move the cursor", lambda f: f.update(created="\x1b[2J\x1b]0;x\a"), refused=False)
    for depth in (150, 250, 900):
        nested: Any = 1
        for _ in range(depth):
            nested = [nested]
        yield _case(f"settings {depth} deep", lambda f, n=nested: f.update(settings={"a": n}), refused=depth > 200)


def _raw() -> Iterator[Case]:
    for name, body in _BODIES.items():
        yield _written(f"{name}, signed", lambda fields, body=body: signed(body))
        yield _written(f"{name}, as it is", lambda fields, body=body: body)
    yield _written("a field twice", lambda f: signed(f'{{"format": 1, {json.dumps(f)[1:]}'.encode()))
    yield _written("NaN", lambda f: signed(json.dumps({**f, "settings": {"a": float("nan")}}).encode()))
    yield _written("a byte order mark", lambda f: signed(b"\xef\xbb\xbf" + json.dumps(f).encode()))
    yield _written("UTF-16", lambda f: signed(json.dumps(f).encode("utf-16")))
    yield _written("a second digest", lambda f: signed(json.dumps({**f, "digest": "0" * 32}).encode()))
    yield _written("signed twice", lambda f: signed(signed(json.dumps(f).encode())))
    yield _written("a line behind the digest", lambda f: signed(json.dumps(f).encode()) + b"\n")


def _written(name: str, data: Callable[[dict[str, Any]], bytes]) -> Case:
    def make(run: Path) -> None:
        (snapshot(run) / MANIFEST).write_bytes(data(manifest_fields(run)))

    return Case(GROUP, name, make)
