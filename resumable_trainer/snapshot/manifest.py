"""The manifest: what is in a snapshot, where the run stood, and what it came from. Free of torch.

It vouches for itself: the last field of the file is the digest of every byte before it, checked
before anything is parsed, so that a single flipped bit anywhere in the file is found.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from resumable_trainer.durable.digest import digest_bytes
from resumable_trainer.errors import DamagedSnapshotError, SettingsError
from resumable_trainer.snapshot import strict_json
from resumable_trainer.snapshot.layout import epochs_in_words

FORMAT = 1
MAX_BYTES = 16 << 20
_TAIL = re.compile(rb',\n  "digest": "([0-9a-f]{32})"\n}\n')
_TAIL_BYTES = len(b',\n  "digest": ""\n}\n') + 32
_MAX_POSITION, _MAX_GENERATION, _MAX_LENGTH = 10**18 - 1, 2**62, 2**62
_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=True, ser_json_inf_nan="constants"
    )


class FileEntry(_Record):
    """One file of a snapshot: its length and xxh3-128 digest."""

    num_bytes: int = Field(ge=0)
    digest: str = Field(pattern="^[0-9a-f]{32}$")


class JournalMark(_Record):
    """Up to where the rows of the metric journal belong to a snapshot."""

    num_bytes: int = Field(ge=0, le=_MAX_LENGTH)
    digest: str = Field(pattern="^[0-9a-f]{32}$")
    rows: int = Field(ge=0, le=_MAX_LENGTH)


def _float_of(value: object) -> object:
    """Infinities stand in JSON as words."""
    return _SPECIAL_FLOATS.get(value, value) if isinstance(value, str) else value


class Best(_Record):
    """The best value so far of the early-stopping metric, and the epoch (from 0) and step of its row."""

    metric: str
    value: Annotated[float, BeforeValidator(_float_of)]
    epoch: int
    step: int


class PositionFields(_Record):
    """`layout.Position` as fields of the manifest."""

    epoch: int = Field(ge=0, le=_MAX_POSITION)
    batch: int = Field(ge=0, le=_MAX_POSITION)
    step: int = Field(ge=0, le=_MAX_POSITION)


class Manifest(_Record):
    """Everything a snapshot says beside the state itself; fields as in FORMAT.md."""

    format: int = Field(default=FORMAT, ge=1, le=FORMAT)
    run_id: str
    generation: int = Field(ge=0, le=_MAX_GENERATION)
    name: str
    position: PositionFields
    epoch_complete: bool
    parent: str | None
    parent_digest: str | None
    created: str
    files: dict[str, FileEntry]
    journal: JournalMark | None = None
    outcome: Literal["finished", "stopped_early"] | None = None
    best: Best | None = None
    metrics: dict[str, float | int | Literal["NaN", "Infinity", "-Infinity"]] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    depends_on: dict[str, Any] = Field(default_factory=dict)
    saved_by: dict[str, str] = Field(default_factory=dict)
    own_digest: str = Field(default="", exclude=True)

    @property
    def place(self) -> str:
        """Where the run stood, for people; they count from 1."""
        at = self.position
        return epochs_in_words(at.epoch) if self.epoch_complete else f"epoch {at.epoch + 1}, batch {at.batch}"

    @property
    def metric_values(self) -> dict[str, float]:
        """Values of the newest epoch row as numbers."""
        return {n: _SPECIAL_FLOATS[v] if isinstance(v, str) else v for n, v in self.metrics.items()}

    @property
    def total_bytes(self) -> int:
        """Length of all files but the manifest."""
        return sum(entry.num_bytes for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """The file's content, ending in the digest of what stands before."""
        fields = self.model_dump(mode="json")
        body = to_json(_plain(fields), indent=2)
        body = body.removesuffix(b"\n}")
        return body + b',\n  "digest": "%s"\n}\n' % digest_bytes(body).encode()


def from_bytes(data: bytes) -> Manifest:
    """Parse a manifest, its digest checked first.

    Raises:
        DamagedSnapshotError: It is not exactly what was written; the message says what is wrong.
    """
    if len(data) > MAX_BYTES:
        raise DamagedSnapshotError(f"manifest.json has {len(data)} bytes, at most {MAX_BYTES} are read")
    body, tail = data[:-_TAIL_BYTES], data[-_TAIL_BYTES:]
    match = _TAIL.fullmatch(tail)
    if match is None:
        raise DamagedSnapshotError("manifest.json does not end in its digest; it is cut or damaged")
    own_digest = digest_bytes(body)
    if own_digest != match[1].decode():
        raise DamagedSnapshotError(
            f"manifest.json has digest {own_digest[:8]}.., it says {match[1].decode()[:8]}..",
            found=own_digest,
            expected=match[1].decode(),
        )
    return _validated(body + b"\n}", own_digest)


def _validated(data: bytes, own_digest: str) -> Manifest:
    try:
        fields = strict_json.parse(data, max_bytes=MAX_BYTES)
        number = fields.get("format")
        if isinstance(number, int) and number > FORMAT:
            raise SettingsError(  # not damaged: nothing may move it to quarantine
                f"manifest.json is of format {number}, this version reads up to {FORMAT}",
                found=number,
                expected=FORMAT,
                hint="install a newer resumable-trainer",
            )
        return Manifest.model_validate({**fields, "own_digest": own_digest})
    except (ValidationError, ValueError, AttributeError) as error:
        if isinstance(error, DamagedSnapshotError | SettingsError):
            raise
        raise DamagedSnapshotError(f"manifest.json does not describe a snapshot: {error}") from error


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinities: as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value
