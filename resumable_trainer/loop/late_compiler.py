"""torch's compiler is loaded when something is compiled, not when the first optimizer is made.

Why: torch marks some methods of optimizers as not to be compiled, and finds out what that means when one is called
first: then it imports `torch._dynamo`, and with that sympy and all of `torch.distributed`. That takes two thirds of
what importing torch takes, and 70 MB, at each start of a training, also of those that compile nothing.

Policy: as long as the compiler is not loaded, nothing is being compiled and such marks mean nothing: what is marked is
called as it is, so the bits are the same. Whoever asks for the compiler finds the marks as torch has made them: they
are given back before it is loaded. Where torch does not have them as it did (2.8 to 2.13), nothing is done.
"""

from __future__ import annotations

import sys
from functools import wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer, optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

# No public parts of torch: where they are not there, one does without.
_marking = getattr(torch, "_disable_dynamo", None)
_keeping_grad_mode = getattr(optimizer, "_use_grad_for_differentiable", None)
_COMPILER = "torch._dynamo"
_FOUND_OUT = "__dynamo_disable"  # where a mark keeps what it means


def is_loaded() -> bool:
    """Whether torch's compiler is, or is being loaded."""
    return _COMPILER in sys.modules


def put_off() -> None:
    """Let the methods that all optimizers have be called without it, from now on and until it is asked for."""
    if is_loaded():
        return
    functions = [method.__wrapped__ for method in vars(Optimizer).values() if is_wrapped_by(_marking, method)]
    for function in functions:
        setattr(function, _FOUND_OUT, function)
    if functions:
        sys.meta_path.insert(0, _GivingBack(functions))


class _GivingBack:
    """Is asked by Python for each module that is not loaded yet, has none, and waits for one name.

    It stays, and does nothing any more: a list of finders that shrinks while it is gone through has one left out.
    """

    def __init__(self, functions: list[Any]) -> None:
        self._functions = functions

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """If it is the compiler, all is as before from now on."""
        if name == _COMPILER:
            functions, self._functions = self._functions, []
            for function in functions:
                vars(function).pop(_FOUND_OUT, None)


def without_graph_breaks(step: Callable[..., Any]) -> Callable[..., Any]:
    """What computes an optimizer's step, without what torch says to its compiler before and after it."""
    if not is_wrapped_by(_keeping_grad_mode, step):
        return step
    computes: Callable[..., Any] = step.__wrapped__  # type: ignore[attr-defined]

    @wraps(step)
    def compute(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if is_loaded():
            return step(optimizer, *args, **kwargs)
        grad_mode = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(optimizer.defaults["differentiable"])
            return computes(optimizer, *args, **kwargs)
        finally:
            torch.set_grad_enabled(grad_mode)

    return compute


def is_wrapped_by(decorator: Callable[..., Any] | None, function: Any) -> bool:
    """Whether a function is what one of torch's decorators makes of another, and nothing that was put around that."""
    return (
        decorator is not None
        and isinstance(function, FunctionType)
        and function.__code__ is decorator(_nothing).__code__
        and isinstance(getattr(function, "__wrapped__", None), FunctionType)
    )


def _nothing() -> None: ...
