"""Python's garbage collector rests where much is made that is kept: it would walk all of it again and again.

What is no longer referred to goes at once all the same; only cycles wait. Free of torch.
"""

from __future__ import annotations

import gc


class WithoutCollections:
    """No collection within; afterwards it is as it was."""

    def __enter__(self) -> None:
        self._was_on = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was_on:
            gc.enable()
