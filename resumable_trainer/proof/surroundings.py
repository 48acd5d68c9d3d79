"""A trial's surroundings: sources of chance taken away one by one, or shown as on another day and machine.

What the user's code asks is answered by us: the clock, the order of a directory's entries, entropy from the
system, deterministic kernels. Libraries and the package itself still see the real clock and directories: a
frozen one would stop what waits with a deadline. Sources, by name:

- `clock`: `time` and `datetime` as the user's code reads them.
- `entropy`: what seeds a generator that nobody seeds (`os.urandom` and all that goes through it).
- `globals`: Python's, NumPy's and torch's global generators, which nothing seeds before the run is opened.
- `listing`: the order in which a directory's entries are listed.
- `kernels`: torch's deterministic algorithms, one thread.
- `hash`: the order of sets of texts (PYTHONHASHSEED; set by whoever starts the process).
"""

from __future__ import annotations

import builtins
import datetime as datetime_module
import functools
import hashlib
import os
import random
import sys
import threading
import time
import types
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from resumable_trainer.loop import launch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCES = ("globals", "entropy", "clock", "listing", "kernels", "hash")
_FROZEN_AT = 1_700_000_000.0  # seconds since 1970
_TICK = 0.001  # a frozen clock still goes on by this at each look, so that loops that wait for it end
_UNTOUCHED = (623, 624)  # places in the words of a Mersenne twister that was just seeded
_A_MONTH = 30 * 86400.0
_CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")
_BETWEEN = (
    *("/pathlib.py", "/glob.py", "/os.py", "/datetime.py", "/_local.py", "/_abc.py", "/tempfile.py"),
    *("<frozen os>", "/uuid.py", "/secrets.py", "/random.py", "/contextlib.py", "/functools.py"),
)
_TALK = "/multiprocessing/"  # its processes draw to greet each other, when the scheduler wills it


class Surroundings:
    """Puts itself between the user's code and the system; for the rest of the process.

    Args:
        steady: Sources to take away.
        perturb: 0: the others as they are; N: as N starts later, on another machine.
        tell: Called with a function's name and "file:line" the first time that the user's code calls it there.
    """

    def __init__(self, steady: tuple[str, ...], perturb: int, tell: Callable[[str, str], None]) -> None:
        self.real_clock, self._real_time = time.monotonic, time.time
        self.started = time.monotonic()
        self._steady, self._perturb, self._tell = steady, perturb, tell
        self._python_at_start: object = None
        self._torch_at_start: Any = None
        self._looks = 0
        self._drawn = {True: 0, False: 0}  # by whether it was the main thread
        self._told: set[tuple[str, str]] = set()

    def install(self) -> None:
        """Before the user's script is loaded."""
        import torch

        self._install_clock()
        self._install_listing()
        self._install_entropy()
        for name in ("getpid", "getppid"):  # told, and answered as ever: somebody may send a signal there
            setattr(os, name, self._told_of(getattr(os, name), f"os.{name}"))
        if "globals" in self._steady:
            import numpy as np

            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
        self._python_at_start = random.getstate()
        self._torch_at_start = torch.get_rng_state(), torch.initial_seed()

    def drawn_from(self) -> list[str]:
        """Global generators that have moved since the process started, with nothing that seeded them."""
        import torch

        moved = ["Python"] if random.getstate() != self._python_at_start else []
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None and numpy_random.get_state(legacy=False)["state"]["pos"] not in _UNTOUCHED:
            moved.append("NumPy")
        state, seed = self._torch_at_start
        if torch.initial_seed() == seed and not torch.equal(torch.get_rng_state(), state):
            moved.append("torch")
        return moved

    def torch_is_here(self) -> None:
        """What needs torch and NumPy, once the user's script has imported them."""
        import torch

        if "kernels" in self._steady:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.set_num_threads(1)

    # -- the clock ----------------------------------------------------------------------------------

    def _install_clock(self) -> None:
        for name in _CLOCKS:
            setattr(time, name, self._clock(getattr(time, name), f"time.{name}", 1))
            setattr(time, f"{name}_ns", self._clock(getattr(time, f"{name}_ns"), f"time.{name}_ns", 10**9))
        for name in ("localtime", "gmtime", "ctime"):
            setattr(time, name, self._calendar(getattr(time, name), f"time.{name}"))
        for name in ("strftime", "asctime"):
            setattr(time, name, self._formatted(getattr(time, name), f"time.{name}", int(name == "strftime")))
        uuid._generate_time_safe = None  # type: ignore[attr-defined] # a time-based one then asks `time`
        users = _users_datetime(self)
        real_import = builtins.__import__

        def import_(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
            is_users = name == "datetime" and launch.is_users(str((globals or {}).get("__file__")))
            return users if is_users else real_import(name, globals, *rest, **named)

        builtins.__import__ = import_

    def _clock(self, real: Callable[[], Any], name: str, per_second: int) -> Callable[[], Any]:
        @functools.wraps(real)
        def clock() -> Any:
            if not self._is_asked(name, sys._getframe(1)):
                return real()
            if "clock" in self._steady:
                return (int if per_second > 1 else float)(self._frozen() * per_second)
            return real() + type(real())(self._perturb * _A_MONTH * per_second)

        return clock

    def _calendar(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(real)
        def calendar(seconds: float | None = None) -> Any:
            if seconds is None and self._is_asked(name, sys._getframe(1)):
                seconds = self.now()
            return real(seconds)

        return calendar

    def _formatted(self, real: Callable[..., str], name: str, place: int) -> Callable[..., str]:
        """For functions that take the time of now where their argument number `place` is left out."""
        localtime = time.localtime

        @functools.wraps(real)
        def formatted(*args: Any) -> str:
            if len(args) <= place and self._is_asked(name, sys._getframe(1)):
                args = (*args, localtime(self.now()))
            return real(*args)

        return formatted

    def _frozen(self) -> float:
        self._looks += 1
        return _FROZEN_AT + self._looks * _TICK

    def now(self) -> float:
        """The time that the user's code is told, in seconds since 1970."""
        return self._frozen() if "clock" in self._steady else self._real_time() + self._perturb * _A_MONTH

    # -- directories --------------------------------------------------------------------------------

    def _install_listing(self) -> None:
        listdir, scandir = os.listdir, os.scandir

        @functools.wraps(listdir)
        def listed(*args: Any, **kwargs: Any) -> Any:
            found = listdir(*args, **kwargs)
            return self._ordered(found, lambda name: name) if self._is_asked("os.listdir", sys._getframe(1)) else found

        @functools.wraps(scandir)
        def scanned(*args: Any, **kwargs: Any) -> Any:
            found = scandir(*args, **kwargs)
            if not self._is_asked("os.scandir", sys._getframe(1)):
                return found
            with found:
                return _Entries(self._ordered(list(found), lambda entry: entry.name))

        os.listdir, os.scandir = listed, scanned

    def _ordered(self, found: list[Any], key: Callable[[Any], Any]) -> list[Any]:
        if "listing" in self._steady:
            return sorted(found, key=key)
        return found[::-1] if self._perturb % 2 else found

    # -- entropy ------------------------------------------------------------------------------------

    def _install_entropy(self) -> None:
        """Tell who draws; answer by ourselves where entropy is taken away."""
        urandom, seed = os.urandom, random.Random.seed
        is_steady = "entropy" in self._steady

        @functools.wraps(urandom)
        def drawn(count: int, /) -> bytes:
            frame = sys._getframe(1)
            self._is_asked("os.urandom", frame)
            is_talk = _TALK in frame.f_code.co_filename
            return self._bytes(count) if is_steady and not is_talk else urandom(count)

        @functools.wraps(seed)
        def seeded(generator: random.Random, a: Any = None, version: int = 2) -> None:
            if a is None:
                self._is_asked("random.seed", sys._getframe(1))
                a = int.from_bytes(self._bytes(8)) if is_steady else None
            seed(generator, a, version)

        if is_steady:
            import torch

            torch.seed = torch.random.seed = self._torch_seed
        os.urandom = random._urandom = drawn  # type: ignore[attr-defined] # what `secrets` and NumPy draw from
        random.Random.seed = seeded  # type: ignore[method-assign, assignment]
        # The module's own functions are methods that were bound before.
        random.seed = functools.partial(seeded, random._inst)

    def _told_of(self, real: Callable[[], int], name: str) -> Callable[[], int]:
        @functools.wraps(real)
        def asked() -> int:
            frame = sys._getframe(1)
            self._is_asked("tempfile" if frame.f_code.co_filename.endswith("/tempfile.py") else name, frame)
            return real()

        return asked

    def _torch_seed(self) -> int:
        import torch

        number = int.from_bytes(self._bytes(8)) >> 1
        torch.manual_seed(number)
        return number

    def _bytes(self, count: int) -> bytes:
        """The same in every process that draws as often; threads beside the main one do not come between."""
        is_main = threading.get_ident() == threading.main_thread().ident
        data = b""
        while len(data) < count:
            self._drawn[is_main] += 1
            data += hashlib.sha256(f"{is_main} {self._drawn[is_main]}".encode()).digest()
        return data[:count]

    # -- who asks -----------------------------------------------------------------------------------

    def _is_asked(self, function: str, frame: types.FrameType | None) -> bool:
        """Whether the user's code asks, by itself or through the standard library's own Python."""
        while frame is not None and frame.f_code.co_filename.endswith(_BETWEEN):
            frame = frame.f_back
        if frame is None or not launch.is_users(frame.f_code.co_filename):
            return False
        self.note(function, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return True

    def note(self, function: str, where: str) -> None:
        """Tell of a call, once."""
        if (function, where) not in self._told:
            self._told.add((function, where))
            self._tell(function, where)

    def asked_from(self, function: str) -> None:
        """Tell that the user's code has called, from wherever it did; for classes that stand in for others."""
        self._is_asked(function, sys._getframe(2))


class _Entries:
    """Entries of a directory, as `os.scandir` gives them."""

    def __init__(self, entries: list[os.DirEntry[Any]]) -> None:
        self._entries: Iterator[os.DirEntry[Any]] = iter(entries)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> os.DirEntry[Any]:
        return next(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""


def _users_datetime(surroundings: Surroundings) -> types.ModuleType:
    """The module `datetime` as the user's code sees it; what it makes are ordinary datetimes."""
    real = datetime_module.datetime
    real_date = datetime_module.date

    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, real if issubclass(cls, real) else real_date)

    class Datetime(real, metaclass=Kind):  # type: ignore[misc, valid-type]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return real(*args, **kwargs)

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            surroundings.asked_from("datetime.now")
            return real.fromtimestamp(surroundings.now(), tz)

        @classmethod
        def today(cls) -> Any:
            surroundings.asked_from("datetime.today")
            return real.fromtimestamp(surroundings.now())

        @classmethod
        def utcnow(cls) -> Any:
            surroundings.asked_from("datetime.utcnow")
            return real.fromtimestamp(surroundings.now(), datetime_module.UTC).replace(tzinfo=None)

    class Date(real_date, metaclass=Kind):  # type: ignore[misc, valid-type]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return real_date(*args, **kwargs)

        @classmethod
        def today(cls) -> Any:
            surroundings.asked_from("date.today")
            return real_date.fromtimestamp(surroundings.now())

    module = types.ModuleType("datetime", datetime_module.__doc__)
    vars(module).update(vars(datetime_module))
    vars(module).update(datetime=Datetime, date=Date)
    return module
