"""`loss.backward()` without what torch looks at before it asks its engine.

Why: three functions in Python sort out what may be asked for (several losses, gradients given, inputs named, tensor
subclasses, modes). A trainer asks for one thing, each time the same; on a small model that is a twentieth of a step.

Policy: the engine is torch's, it is given what torch would give it, and the gradients are the same to the bit. This is
tried out on something small, once: where the engine is called in another way than is known here, `backward()` is.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class Backward:
    """Gradients of a loss.

    Args:
        model: Whose; one with compiled modules in it goes the ordinary way.
    """

    def __init__(self, model: nn.Module) -> None:
        is_plain = not any(map(_is_compiled, model.modules()))
        is_plain = is_plain and logging.getLogger("torch.autograd.graph").getEffectiveLevel() > logging.DEBUG
        self._run: Callable[..., object] | None = _engine() if is_plain and _is_as_expected() else None

    def __call__(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those of the parameters; errors are those of `Tensor.backward`."""
        if (
            self._run is None
            or type(loss) is not torch.Tensor
            or loss.ndim
            or not loss.is_cpu
            or not loss.requires_grad
            or torch._C._len_torch_function_stack()
        ):
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            _ask(self._run, loss)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_torchdynamo_orig_callable") or getattr(module, "_compiled_call_impl", None) is not None


def _ask(run: Callable[..., object], loss: torch.Tensor) -> None:
    # A new one each time: it may become a parameter's gradient, which others write into.
    one = torch.ones_like(loss, memory_format=torch.preserve_format)
    run((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _engine() -> Any:
    return torch.autograd.Variable._execution_engine.run_backward


@lru_cache(maxsize=1)
def _is_as_expected() -> bool:
    """Whether the engine gives the gradients of `backward()` when it is asked like this."""
    values = torch.linspace(-1, 1, 5)
    try:
        with torch.enable_grad():
            mine, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
            for _ in range(2):  # the second is added to the first
                _ask(_engine(), mine.exp().mul(mine).sum())
                theirs.exp().mul(theirs).sum().backward()  # type: ignore[no-untyped-call]
        return mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)
    except Exception:  # noqa: BLE001 - whatever it is, it is slower without
        return False
