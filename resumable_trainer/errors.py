"""Every error a user can meet, and the exit code each stands for.

```
ResumableTrainerError                        70  internal error, or the training code raised
|-- UsageError            (ValueError)        2  the library or the command line was called wrongly
|-- SettingsError         (ValueError)       78  illegal settings; all problems at once
|-- StateMismatchError    (ValueError)       78  saved state and the script's parts do not fit
|-- UnsafeValueError      (TypeError)        78  a value of the state has no safe form on disk
|-- DriftError            (RuntimeError)     78  something the run depends on changed, and strict=True
|-- DamagedSnapshotError  (ValueError)       65  one snapshot does not verify
|-- NoValidSnapshotError  (LookupError)      65  there are snapshots, and none verifies
|-- NotFoundError         (FileNotFoundError) 66 no such run or snapshot
|   `-- SnapshotGoneError                     66 it was there, and was deleted while it was read
|-- RunHeldError          (BlockingIOError)  69  another process holds the run
|-- SnapshotWriteError    (OSError)          74  state could not be made durable
|-- DivergedError         (ArithmeticError)  79  the loss is no number any more, and no recovery was allowed
Stopped (SystemExit)                             the run was asked to leave and saved its state
|-- Preempted                                75  SIGTERM or a notice: run me again
|-- Interrupted                             130  SIGINT
```

Each message says what failed, where, what was found and expected, and what to do next;
each error is also the builtin that it resembles, so plain `except OSError` still works.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What a process of a run tells its starter (CONTRACT: "Endings")."""

    DONE = 0
    USAGE = 2
    NO_VALID_SNAPSHOT = 65
    NOT_FOUND = 66
    HELD = 69
    FAILED = 70
    NOT_SAVED = 74
    PREEMPTED = 75
    SETTINGS = 78
    DIVERGED = 79
    INTERRUPTED = 130


class ResumableTrainerError(Exception):
    """Root of all errors raised on purpose.

    Args:
        message: What failed, where, found against expected.
        path: The file or directory concerned.
        step: The training step concerned.
        found: What was there.
        expected: What should have been there.
        hint: What to do next; printed after the message.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        step: int | None = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.step = step
        self.found = found
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} - {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(kind: type[ResumableTrainerError], fields: dict[str, object]) -> ResumableTrainerError:
    error = kind(str(fields["message"]))
    error.__dict__.update(fields)
    return error


class UsageError(ResumableTrainerError, ValueError):
    """The library or the command line was called in a way that cannot work."""

    exit_code = ExitCode.USAGE


class SettingsError(ResumableTrainerError, ValueError):
    """Illegal settings; the message lists every problem."""

    exit_code = ExitCode.SETTINGS


class StateMismatchError(ResumableTrainerError, ValueError):
    """The saved state does not fit the script's parts; the message lists every mismatch."""

    exit_code = ExitCode.SETTINGS


class UnsafeValueError(ResumableTrainerError, TypeError):
    """A value of the state has no safe form on disk; the message names its place."""

    exit_code = ExitCode.SETTINGS


class DriftError(ResumableTrainerError, RuntimeError):
    """What the run depends on has changed since the snapshot, and strictness was asked for."""

    exit_code = ExitCode.SETTINGS


class DamagedSnapshotError(ResumableTrainerError, ValueError):
    """One snapshot does not verify; `reason` says why in a few words."""

    exit_code = ExitCode.NO_VALID_SNAPSHOT


class NoValidSnapshotError(ResumableTrainerError, LookupError):
    """There are snapshots, and none verifies; nothing was started over."""

    exit_code = ExitCode.NO_VALID_SNAPSHOT


class NotFoundError(ResumableTrainerError, FileNotFoundError):
    """No such run or snapshot."""

    exit_code = ExitCode.NOT_FOUND


class SnapshotGoneError(NotFoundError):
    """A snapshot was deleted while it was read: the run that it belongs to is training, and retention went on."""


class RunHeldError(ResumableTrainerError, BlockingIOError):
    """Another process holds the run directory."""

    exit_code = ExitCode.HELD


class SnapshotWriteError(ResumableTrainerError, OSError):
    """State could not be made durable (disk full, I/O error); what was durable still is."""

    exit_code = ExitCode.NOT_SAVED


class DivergedError(ResumableTrainerError, ArithmeticError):
    """The training has diverged: the loss is not finite, or has leapt, and it may not (or cannot) go back."""

    exit_code = ExitCode.DIVERGED


class Stopped(SystemExit):
    """The run was asked to leave, saved its state, and leaves with its exit code.

    A `SystemExit`, so that `except Exception` in a training script cannot swallow it.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.PREEMPTED

    def __init__(self, message: str) -> None:
        super().__init__(int(self.exit_code))
        self.message = message


class Preempted(Stopped):
    """SIGTERM or a notice: state saved, run me again."""

    exit_code = ExitCode.PREEMPTED


class Interrupted(Stopped):
    """SIGINT: state saved."""

    exit_code = ExitCode.INTERRUPTED
