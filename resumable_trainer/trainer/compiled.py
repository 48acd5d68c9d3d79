"""`Trainer(compile=True)`: forward, loss, backward and update of a batch as one compiled step.

Policy: exact or not at all. A compiled run that is killed and resumed ends in the bytes of the
compiled run that was not; its numbers differ from an eager run's in the last bits, so that going from one to the
other is said as drift. What cannot be compiled exactly is said in one line and runs eagerly: the whole job
(`conditions.py`, `tracing.py`), or a single batch.

Which batches are compiled must not depend on where a launch began, so it is a function of the run:

- The shape of the run's first batch is the compiled one, and is remembered in the snapshots. Batches of
  other shapes (a short last one) are trained eagerly.
- A batch for which the optimizer has no state yet is trained eagerly, so that torch itself makes the state. That is the
  first one of a run.

Live objects stay the truth: the step reads and changes the model's own tensors and the optimizer's own
state, and both are looked up anew at the first batch of each epoch and after a resume. If what the
graph depends on has changed (a layer was frozen, an attribute of a module has another plain value), it is
traced again. What cannot be seen so is what the loss function or the model take from variables around
them: such values are constants of the compiled step, tensors excepted.

Gradients are intermediate results of the graph: `.grad` is None at every boundary, as it is after an
eager step's `zero_grad`. A parameter that wants a gradient but is not the optimizer's never gets one here.

Cost: tracing 0.1 to 1 s at each start; compiling about 10 s, once (`artefacts.py`).
"""

from __future__ import annotations

import time
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from resumable_trainer.snapshot.layout import COMPILED
from resumable_trainer.trainer import artefacts, conditions, updates
from resumable_trainer.trainer.artefacts import Artefacts, CannotCompileError
from resumable_trainer.trainer.bound import BoundStep
from resumable_trainer.trainer.conditions import Members
from resumable_trainer.trainer.cuda_graph import CannotCaptureError, CudaGraphStep
from resumable_trainer.trainer.graphs import CannotTraceError
from resumable_trainer.trainer.tracing import Inputs, Pair, Recipe, StateTensor, Traced, trace

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from torch import Tensor

    from resumable_trainer.loop.run import Run

_CANNOT_KEEP = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, bool, int, float, str)
_TABLES = frozenset(vars(nn.Module())) - {"training"}


class _NotCompiledError(Exception):
    """Why this run's steps are not compiled."""


@dataclass
class _Code:
    """A traced step and what runs it: compiled code; on a CUDA device, a capture for certain addresses."""

    traced: Traced
    call: Callable[[list[Tensor]], Sequence[Tensor]] | None = None
    captured: CudaGraphStep | None = None


class CompiledSteps:
    """Trains batches by compiled code, as far as that can be exact.

    Args:
        run: Where lines are said and facts recorded; its directory keeps the compiled code.
        model: Called with the inputs.
        loss_fn: Called with (outputs, targets).
        optimizer: Over the model's parameters.
        metrics: Functions of (outputs, targets) by name.
        clip: Largest norm of the model's gradients.
        accumulate: Batches per step.
    """

    def __init__(
        self,
        run: Run,
        *,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        metrics: Mapping[str, Callable[..., Any]],
        clip: float | None,
        accumulate: int,
    ) -> None:
        plain = {name: metric for name, metric in metrics.items() if _is_plain(metric)}
        self._recipe = Recipe(Pair(model, loss_fn), optimizer, plain, clip, keep_outputs=len(plain) < len(metrics))
        self._run, self._metrics, self._accumulate = run, metrics, accumulate
        self._known: dict[Hashable, _Code] = {}
        self._failed: dict[Hashable, CannotTraceError | CannotCompileError] = {}
        self._rates: list[Tensor] = []
        self._artefacts = Artefacts(run.directory / COMPILED)
        self.begin_run()

    def begin_run(self) -> None:
        """The run has been entered: what is compiled is decided anew, code that is here already stays."""
        self._wanted: str | None = None
        self._said: set[str] = set()
        self._failed.clear()
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Code has run, or a snapshot was restored: look for the live tensors again."""
        self._bound: BoundStep | None = None
        self._given_up = False

    def train(self, inputs: Any, targets: Any) -> dict[str, Any] | None:
        """Train on a batch; the values of its row, or None (and nothing done) if it is to be trained eagerly."""
        if self._bound is not None:
            values = self._bound(inputs, targets)
            if values is not None:
                return values
            self._bound = None  # an eager step is next: what counts steps outside of the optimizer looks again
        elif self._given_up:
            return None
        return self._look(inputs, targets)

    def _look(self, inputs: Any, targets: Any) -> dict[str, Any] | None:
        try:
            self._bound = self._bind(inputs, targets)
        except (_NotCompiledError, CannotTraceError, CannotCompileError, CannotCaptureError) as reason:
            self._run.leave_if_asked("while the step was compiled; the last durable snapshot stands")
            self._given_up = True
            self._say(f"steps are not compiled, the job runs eagerly: {reason}")
            self._run.depend_on("steps", "eager")
            return None
        return None if self._bound is None else self._bound(inputs, targets)

    def _bind(self, inputs: Any, targets: Any) -> BoundStep | None:
        """The step for this batch; None if just this one is to be trained eagerly."""
        leaves, spec = pytree.tree_flatten((inputs, targets))
        if self._wanted is not None and not self._has_wanted_shape(leaves):
            return None
        members = Members.of(self._recipe.pair)
        reason = conditions.why_not(self._recipe, members, accumulate=self._accumulate)
        if reason is not None:
            raise _NotCompiledError(reason)
        if not all(isinstance(leaf, torch.Tensor) for leaf in leaves) or not leaves:
            raise _NotCompiledError("batches hold things that are no tensors")
        if not self._has_wanted_shape(leaves) or any(is_lazy(parameter) for parameter in members.parameters.values()):
            return None
        live, has_state = self._inputs(members)
        if conditions.overlapping(live.flat()):
            raise _NotCompiledError("tensors of the model or the optimizer share memory")
        code = self._code_for(live, members, leaves, spec)
        if {place.parameter for place in live.state if place not in has_state} & code.traced.with_gradient:
            return None
        self._recipe.optimizer._opt_called = True  # type: ignore[attr-defined] # what schedulers look for
        return self._bound_to(code, live, leaves)

    def _has_wanted_shape(self, leaves: Sequence[Any]) -> bool:
        shape = ", ".join(_described(leaf) for leaf in leaves)
        if self._wanted is None:
            self._wanted = self._run.remembered("compiled for") or shape
            self._run.depend_on("compiled for", self._wanted)
        if shape != self._wanted:
            self._say(f"batches of {shape} are trained eagerly, steps are compiled for {self._wanted}")
        return shape == self._wanted

    def _inputs(self, members: Members) -> tuple[Inputs, set[StateTensor]]:
        """The live tensors; and which of the optimizer's are there already, the others being blanks."""
        optimizer, tensors = self._recipe.optimizer, members.tensors
        names = {id(parameter): name for name, parameter in members.parameters.items()}
        device = next(iter(tensors.values())).device
        trained, state, has_state = {}, {}, set()
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                name = names[id(parameter)]
                trained[name] = number
                live = optimizer.state.get(parameter, {})
                for key in updates.state_names(optimizer, group):
                    place = StateTensor(name, key)
                    if live.get(key) is not None:
                        has_state.add(place)
                    state[place] = live[key] if place in has_state else updates.blank(group, parameter, key)
        if len(self._rates) != len(optimizer.param_groups):  # else the same ones: a capture knows their addresses
            self._rates = [torch.zeros((), dtype=torch.float64, device=device) for _ in optimizer.param_groups]
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        return Inputs(self._rates, detached, trained, state), has_state

    def _code_for(self, live: Inputs, members: Members, leaves: Sequence[Tensor], spec: pytree.TreeSpec) -> _Code:
        fingerprint = self._fingerprint(live, members)
        if fingerprint in self._failed:
            raise self._failed[fingerprint]
        if fingerprint not in self._known:
            try:
                self._known[fingerprint] = self._made(live, leaves, spec)
            except (CannotTraceError, CannotCompileError) as error:
                self._failed[fingerprint] = error  # not to be tried again at each epoch
                raise
        compiler = artefacts.cxx()
        how = "CUDA graph" if compiler is None or live.device.type == "cuda" else artefacts.toolchain(compiler)
        self._run.depend_on("steps", f"compiled ({how})")
        return self._known[fingerprint]

    def _made(self, live: Inputs, leaves: Sequence[Tensor], spec: pytree.TreeSpec) -> _Code:
        traced = trace(self._recipe, live, leaves, spec)
        if live.device.type == "cpu":
            return self._compiled(traced, live, leaves)
        self._say(f"steps are one CUDA graph for batches of {self._wanted}")
        return _Code(traced)

    def _compiled(self, traced: Traced, live: Inputs, leaves: Sequence[Tensor]) -> _Code:
        compiler = artefacts.cxx()
        assert compiler is not None
        example = [*live.flat(), *leaves, *traced.constants, *(draw.example for draw in traced.draws)]
        key = artefacts.key_of(traced.graph, example, compiler)
        call = self._artefacts.load(key)
        if call is None:
            started = time.monotonic()
            self._say(f"compiling the step for batches of {self._wanted} ...")
            call, made = self._artefacts.make(traced.graph, example, compiler)
            where = (
                f"kept in {COMPILED}/" if self._artefacts.keep(key, made) else "not kept: the next start compiles again"
            )
            self._say(f"steps are compiled ({time.monotonic() - started:.1f} s, {where})")
        else:
            self._say(f"steps are compiled for batches of {self._wanted} (found in {COMPILED}/)")
        return _Code(traced, call)

    def _bound_to(self, code: _Code, live: Inputs, leaves: Sequence[Tensor]) -> BoundStep:
        groups = self._recipe.optimizer.param_groups
        bound = BoundStep(code.traced, inputs=live, groups=groups, batch=leaves, metrics=self._metrics)
        bound.call = self._captured(code, bound, live) if code.call is None else code.call
        return bound

    def _captured(self, code: _Code, bound: BoundStep, live: Inputs) -> CudaGraphStep:
        if code.captured is None or not code.captured.fits(bound.live):
            first = len(live.flat()) - len(live.state)
            counters = {
                first + number: place.parameter in code.traced.with_gradient
                for number, place in enumerate(live.state)
                if place.name == "step"
            }
            code.captured = CudaGraphStep(code.traced.graph, bound.live, batch=bound.batch, counters=counters)
        code.captured.synchronize_counters()
        return code.captured

    def _fingerprint(self, live: Inputs, members: Members) -> Hashable:
        """What the graph depends on beside the code and what stays the same for the whole run."""
        return (
            tuple(_attributes(module) for module in members.modules.values()),
            tuple(repr(updates.settings_of(group)) for group in self._recipe.optimizer.param_groups),
            tuple(live.trained.items()),
            tuple((t.shape, t.stride(), t.dtype, t.device) for t in live.flat()),
            (torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._run.say(f"compile {text}")


def _described(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return type(leaf).__name__
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"


def _attributes(module: nn.Module) -> Hashable:
    """Plain values of a module's attributes; other objects by their identity."""
    return tuple((name, _plain(value)) for name, value in vars(module).items() if name not in _TABLES)


def _plain(value: Any) -> Hashable:
    if value is None or type(value) in (bool, int, float, str, torch.dtype, torch.device):
        return type(value), value
    if type(value) in (tuple, list):
        return type(value), tuple(_plain(inner) for inner in value)
    return type(value), id(value)


def _is_plain(metric: object) -> bool:
    """Whether a metric keeps nothing from call to call, as far as can be seen: then the graph may compute it."""
    if isinstance(metric, nn.Module):
        return type(metric).__module__.startswith("torch.nn.modules.loss")
    if not isinstance(metric, types.FunctionType) or metric.__closure__ is not None:
        return False
    around = [metric.__globals__[name] for name in metric.__code__.co_names if name in metric.__globals__]
    return all(value is None or isinstance(value, _CANNOT_KEEP) for value in around)
