"""What a stranger can do to a run directory: any bytes, with digests that fit, as anybody can compute them."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from damage import NEWER

from resumable_trainer.durable.digest import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Fields = dict[str, Any]

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "part.safetensors"


@dataclass(frozen=True)
class Case:
    """One hostile run directory.

    Attributes:
        group: What kind of thing is hostile in it.
        name: What it is.
        make: Makes a sound run directory hostile.
        refused: Whether the snapshot that was made hostile must not be read; else it may do no harm.
        trained: Whether the directory is that of a killed `Run`, to be trained on.
    """

    group: str
    name: str
    make: Callable[[Path], None]
    refused: bool = True
    trained: bool = False


def snapshot(run: Path) -> Path:
    """The snapshot that is made hostile."""
    return run / "snapshots" / NEWER


def signed(body: bytes) -> bytes:
    """A manifest of these bytes, whatever they are, that vouches for itself."""
    body = body.rstrip().removesuffix(b"}").rstrip()
    return body + b',\n  "digest": "%s"\n}\n' % digest_bytes(body).encode()


def manifest_fields(run: Path) -> Fields:
    """What the manifest says, without its own digest."""
    fields: Fields = json.loads((snapshot(run) / MANIFEST).read_bytes())
    del fields["digest"]
    return fields


def put_manifest(run: Path, fields: object) -> None:
    """Another manifest, signed."""
    (snapshot(run) / MANIFEST).write_bytes(signed(json.dumps(fields, indent=2).encode()))


def put_file(run: Path, name: str, data: bytes) -> None:
    """Another content of a file, which the manifest lists with its true length and digest."""
    fields = manifest_fields(run)
    fields["files"][name] = {"num_bytes": len(data), "digest": digest_bytes(data)}
    (snapshot(run) / name).write_bytes(data)
    put_manifest(run, fields)


def state_fields(run: Path) -> Fields:
    """`state.json` as it is."""
    fields: Fields = json.loads((snapshot(run) / STATE).read_bytes())
    return fields


def tensor_file(run: Path) -> tuple[Fields, bytes]:
    """Header and data of the part's tensors."""
    data = (snapshot(run) / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A tensor file of this header; it may lie about the header's length."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data
