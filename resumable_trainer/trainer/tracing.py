"""A training step as one flat graph of tensor operations: forward, loss, backward, update, metrics.

Policy: the model's Python runs once, on fake tensors; nothing is computed, and whatever it changed
beside tensors is put back. What a graph cannot say is refused (`CannotTraceError`), never guessed: Python
or NumPy randomness, attributes that the forward pass changes, decisions by tensors' values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from resumable_trainer.trainer import updates
from resumable_trainer.trainer.graphs import (
    BY_VALUES,
    CannotTraceError,
    Draw,
    functional,
    refuse_decisions,
    take_draws_out,
)
from resumable_trainer.trainer.untouched import untouched

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from torch.fx import GraphModule


class _MetricError(Exception):
    """A metric is no operation on tensors."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Pair(nn.Module):
    """Model and loss as one module, so that the tensors of both have names; the two stay whose they are."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, inputs: Any, targets: Any) -> tuple[Any, Tensor]:
        """Outputs and loss."""
        outputs = self.model(inputs)
        return outputs, self.loss_fn(outputs, targets)


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the optimizer: which parameter's, under which name."""

    parameter: str
    name: str


@dataclass
class Inputs:
    """The tensors that a step reads and changes, in the order in which the graph takes them.

    Attributes:
        rates: A 0-dim float64 learning rate per group.
        tensors: Parameters and buffers by name, without gradients recorded.
        trained: Names of the parameters that the optimizer updates, each with its group's number.
        state: The optimizer's tensors.
    """

    rates: list[Tensor]
    tensors: dict[str, Tensor]
    trained: dict[str, int]
    state: dict[StateTensor, Tensor]

    @property
    def device(self) -> torch.device:
        """Where all but the optimizer's counters are."""
        return next(iter(self.tensors.values())).device

    def flat(self) -> list[Tensor]:
        """All of them."""
        return [*self.rates, *self.tensors.values(), *self.state.values()]

    def among(self, flat: Sequence[Tensor]) -> Self:
        """The same places with other tensors; further ones at the end are of no account."""
        values = iter(flat)
        return type(self)(
            [next(values) for _ in self.rates],
            {name: next(values) for name in self.tensors},
            self.trained,
            {place: next(values) for place in self.state},
        )


@dataclass(frozen=True)
class Traced:
    """A step as a graph: (inputs, batch, constants, drawn) to (loss, metrics, outputs).

    Attributes:
        graph: The flat graph; changes its inputs in place.
        constants: Tensors that the model's or the loss's code refers to beside parameters and buffers.
        draws: What is drawn before each step, in this order.
        in_graph: Names of the metrics that the graph computes, in their order behind the loss.
        outputs: How the outputs behind the metrics are put together; None if nobody asks for them.
        with_gradient: Names of the parameters that get a gradient, and are updated.
    """

    graph: GraphModule
    constants: list[Tensor]
    draws: list[Draw]
    in_graph: list[str]
    outputs: pytree.TreeSpec | None
    with_gradient: frozenset[str]


@dataclass(frozen=True)
class Recipe:
    """What a step does.

    Attributes:
        pair: Model and loss.
        optimizer: One of `updates.OPTIMIZERS`.
        metrics: Functions of (outputs, targets) to be tried in the graph.
        clip: Largest norm of the model's gradients.
        keep_outputs: Whether the outputs are asked for in any case.
    """

    pair: Pair
    optimizer: torch.optim.Optimizer
    metrics: Mapping[str, Callable[..., Any]]
    clip: float | None
    keep_outputs: bool


def trace(recipe: Recipe, inputs: Inputs, batch: Sequence[Tensor], spec: pytree.TreeSpec) -> Traced:
    """Trace one step; the model, the optimizer and all generators are afterwards as they were.

    Args:
        recipe: What the step does.
        inputs: Tensors of the step; only their shapes, dtypes and devices count.
        batch: Leaves of a batch.
        spec: How they are put together to (inputs, targets).

    Raises:
        CannotTraceError: The step is no graph of tensor operations.
    """
    with untouched(recipe.pair):
        try:
            return _Tracer(recipe, inputs, spec).trace(batch)
        except CannotTraceError:
            raise
        except Exception as error:
            if "DataDependent" in type(error).__name__:
                raise CannotTraceError(BY_VALUES) from error
            raise CannotTraceError(f"it cannot be traced ({_first_line(error)})") from error


class _Tracer:
    def __init__(self, recipe: Recipe, inputs: Inputs, spec: pytree.TreeSpec) -> None:
        self._recipe, self._inputs, self._spec = recipe, inputs, spec
        self._metrics = dict(recipe.metrics)
        self._outputs: pytree.TreeSpec | None = None
        self._with_gradient: frozenset[str] = frozenset()

    def trace(self, batch: Sequence[Tensor]) -> Traced:
        from torch.fx.experimental.proxy_tensor import make_fx

        flat = [*self._inputs.flat(), *batch]
        while True:
            try:
                eager = make_fx(self._step, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
                break
            except _MetricError as error:
                del self._metrics[error.name]  # it is computed from the outputs, as in an eager step
        graph, constants = functional(eager, flat)
        refuse_decisions(graph)
        draws = take_draws_out(graph) if self._inputs.device.type == "cpu" else []
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return Traced(graph, constants, draws, list(self._metrics), self._outputs, self._with_gradient)

    def _step(self, *flat: Tensor) -> list[Tensor]:
        step = self._inputs.among(flat)
        num_fixed = len(self._inputs.flat())
        inputs, targets = pytree.tree_unflatten(list(flat[num_fixed:]), self._spec)
        leaves = {name: step.tensors[name].detach().requires_grad_() for name in step.trained}
        given = {**step.tensors, **leaves}
        with torch.enable_grad():
            after = dict(given)
            outputs, loss = torch.func.functional_call(self._recipe.pair, after, (inputs, targets))
            if loss.dim() != 0:
                raise CannotTraceError(f"the loss has shape {list(loss.shape)}, it must be one number")
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        grads = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
        self._with_gradient = frozenset(grads)
        outputs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, outputs)
        with torch.no_grad():
            _write_back(step.tensors, given, after)
            self._update(step, grads)
            values = [self._metric(name, outputs, targets) for name in self._metrics]
        kept: list[Tensor] = []
        self._outputs = None
        if self._recipe.keep_outputs or len(self._metrics) < len(self._recipe.metrics):
            kept, self._outputs = pytree.tree_flatten(outputs)
            if not all(isinstance(leaf, torch.Tensor) for leaf in kept):
                raise CannotTraceError("the model's outputs hold things that are no tensors, and a metric needs them")
        return [loss.detach(), *values, *kept]

    def _update(self, step: Inputs, grads: dict[str, Tensor]) -> None:
        recipe = self._recipe
        if recipe.clip is not None and (names := [name for name in grads if name.startswith("model.")]):
            grads.update(zip(names, updates.clip_by_norm([grads[n] for n in names], recipe.clip), strict=True))
        for name, grad in grads.items():
            number = step.trained[name]
            updates.update(
                recipe.optimizer,
                recipe.optimizer.param_groups[number],
                parameter=step.tensors[name],
                grad=grad,
                state={place.name: tensor for place, tensor in step.state.items() if place.parameter == name},
                lr=step.rates[number],
            )

    def _metric(self, name: str, outputs: Any, targets: Any) -> Tensor:
        try:
            value = self._metrics[name](outputs, targets)
        except Exception as error:
            raise _MetricError(name) from error
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise _MetricError(name)
        return value.detach()


def _write_back(tensors: Mapping[str, Tensor], given: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """A forward pass that gives a buffer a new tensor (`self.mean = ...`) has changed the old one's values."""
    for name, tensor in after.items():
        if tensor is not given[name]:
            if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                raise CannotTraceError(f"the forward pass changes the shape or dtype of {name}")
            tensors[name].copy_(tensor)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:200] if text else type(error).__name__
