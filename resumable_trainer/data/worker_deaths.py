"""Deaths of data-loader workers, not told in the middle of what must be done as a whole.

torch's handler of SIGCHLD raises a RuntimeError in the main thread, wherever that is, when a worker has died. Within
the reading of a snapshot that would look like damage, within `load_state_dict` like a state that does not fit.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

P = ParamSpec("P")
T = TypeVar("T")

# Without the wrapping that makes an enumeration of it; several calls of each snapshot come by here.
_handler_of: Callable[[int], object] = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_arrived: list[tuple[int, FrameType | None]] = []


def _postpone(number: int, frame: FrameType | None) -> None:
    _arrived.append((number, frame))


def told_afterwards(function: Callable[P, T]) -> Callable[P, T]:
    """A function that calls the handler of SIGCHLD when it is done, if it was due meanwhile.

    It raises what torch says of a worker that has died, unless it has failed by itself. Cost: less than 1 us, 7 us
    where torch has set its handler.
    """

    @wraps(function)
    def whole(*args: P.args, **kwargs: P.kwargs) -> T:
        before = _handler_of(signal.SIGCHLD)
        if not callable(before) or before is _postpone or threading.get_ident() != threading.main_thread().ident:
            return function(*args, **kwargs)
        signal.signal(signal.SIGCHLD, _postpone)
        try:
            result = function(*args, **kwargs)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loader finds its worker dead by itself
                _tell(before)
            raise
        _tell(before)
        return result

    return whole


def _tell(handler: Callable[[int, FrameType | None], object]) -> None:
    signal.signal(signal.SIGCHLD, handler)
    arrived = _arrived.copy()
    _arrived.clear()
    if arrived:
        handler(*arrived[-1])
