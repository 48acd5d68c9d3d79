"""Optimizers of an open run step without what torch wraps around a step.

Why: `Optimizer.step` and `zero_grad` open a range for profilers and look for hooks, each time, whether or not there are
any. On a small model that is a sixth of a training step, and more than all that a run adds.

Policy: what computes is torch's own function, called with the same arguments, so the bits are the same; or, for the
usual optimizers on the CPU, torch's own operations, called for all parameters together (`multi_tensor`). Either happens
only while nobody is there who could tell the difference: no profiler, and no hook but the run's own. Else
what was there before is called. An optimizer whose `step` is anything but torch's wrapper around that of its class is
left alone. On closing, each gets back what it had. Nothing of this is pickled or copied with an optimizer.
"""

from __future__ import annotations

import contextlib
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch.compiler import is_compiling
from torch.optim import Optimizer

from resumable_trainer.loop.late_compiler import is_wrapped_by, without_graph_breaks
from resumable_trainer.loop.multi_tensor import MultiTensorStep
from resumable_trainer.state.modes import heard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from resumable_trainer.state.modes import StepWatch

try:
    from torch._C._autograd import _profiler_enabled as is_profiled
    from torch._C._dynamo.eval_frame import get_eval_frame_callback as compiler_of_frames
    from torch.optim.optimizer import _global_optimizer_post_hooks as global_post_hooks
    from torch.optim.optimizer import _global_optimizer_pre_hooks as global_pre_hooks
except ImportError:  # no public parts of torch: where they are not what they were, one does without
    _is_known = False
else:
    _is_known = True

_LEAN = "_steps_for_a_run"


class LeanOptimizers:
    """Makes the optimizers among some parts lean until it is closed.

    Args:
        state: Parts by name.
        watch: Has hooks on the optimizers; is told of each lean step in their place.
    """

    def __init__(self, state: Mapping[str, object], watch: StepWatch) -> None:
        self._is_open = True
        self._undo = contextlib.ExitStack()
        for optimizer in heard(state) if _is_known else ():
            self._make_lean(optimizer, watch)

    def close(self) -> None:
        """Give each optimizer back what it had, unless somebody has put something else there since."""
        self._is_open = False
        self._undo.close()

    def _make_lean(self, optimizer: Optimizer, watch: StepWatch) -> None:
        own = vars(optimizer)
        if is_wrapped_by(Optimizer.profile_hook_step, type(optimizer).step) and (
            "step" not in own or is_schedulers(optimizer)
        ):
            self._put(optimizer, "step", self._step(optimizer, watch.stepped))
        if type(optimizer).zero_grad is Optimizer.zero_grad and "zero_grad" not in own:
            self._put(optimizer, "zero_grad", self._zero_grad(optimizer))

    def _put(self, optimizer: Optimizer, name: str, function: Callable[..., Any]) -> None:
        before, method = vars(optimizer).get(name), MethodType(function, optimizer)
        setattr(optimizer, name, method)

        def take_back() -> None:
            if vars(optimizer).get(name) is not method:
                return
            if before is None:
                delattr(optimizer, name)
            else:
                setattr(optimizer, name, before)

        self._undo.callback(take_back)

    def _step(self, optimizer: Optimizer, stepped: set[int]) -> Callable[..., Any]:
        hooked: Any = type(optimizer).step
        computes, before, number = without_graph_breaks(hooked.__wrapped__), optimizer.step, id(optimizer)
        is_noted = _is_noted(optimizer)
        at_once = MultiTensorStep(optimizer) if MultiTensorStep.serves(optimizer) else None
        is_told = not is_schedulers(optimizer)  # a scheduler notes the first step

        @wraps(hooked)
        def step(self_: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal is_told
            if not is_told and is_noted:
                self_._opt_called = is_told = True
            if (
                not is_told
                or self_._optimizer_step_pre_hooks
                or len(self_._optimizer_step_post_hooks) != 1  # that of the watch
                or self._is_watched()
            ):
                is_told = True
                return before(*args, **kwargs)
            # What is called by compiled code is compiled, too, frame by frame: all of torch's, or all of it anew.
            is_done = at_once is not None and not args and not kwargs and compiler_of_frames() is None and at_once()
            result = None if is_done else computes(self_, *args, **kwargs)
            stepped.add(number)
            return result

        setattr(step, _LEAN, True)
        if not is_told:
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        return step

    def _zero_grad(self, optimizer: Optimizer) -> Callable[..., None]:
        before = optimizer.zero_grad

        @wraps(Optimizer.zero_grad)
        def zero_grad(self_: Any, set_to_none: bool = True) -> None:
            if not set_to_none or self._is_watched():
                before(set_to_none)
                return
            for group in self_.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

        return zero_grad

    def _is_watched(self) -> bool:
        """Whether somebody could tell the difference: asked first is whether it is torch's compiler that reads this.

        That of torch 2.8 cannot compile the question for a profiler.
        """
        return bool(is_compiling() or not self._is_open or is_profiled() or global_pre_hooks or global_post_hooks)


def has_step_of_its_own(optimizer: Optimizer) -> bool:
    """Whether the script has put another `step` on the optimizer."""
    return "step" in vars(optimizer) and not is_schedulers(optimizer) and not hasattr(optimizer.step, _LEAN)


def is_schedulers(optimizer: Optimizer) -> bool:
    """Whether its `step` is what a learning-rate scheduler has made of its class's, so as to see it called."""
    step: Any = vars(optimizer).get("step")
    return bool(getattr(step, "_wrapped_by_lr_sched", False)) and step.__wrapped__ is type(optimizer).step


def _is_noted(optimizer: Optimizer) -> bool:
    """Whether all that a scheduler does with a step is to note that there was one, where torch does that now."""
    return is_schedulers(optimizer) and "_opt_called" in optimizer.step.__code__.co_names
