"""A training step as one flat graph of tensor operations: forward, loss, backward, update, metrics.

Policy: the model's Python runs once, on fake tensors; nothing is computed, and whatever it changed
beside tensors is put back. What a graph cannot say is refused (`CannotTraceError`), never guessed: Python
or NumPy randomness, attributes that the forward pass changes, decisions by tensors' values.

Randomness stays torch's own and outside of the compiled code: each operation that draws (dropout's
`bernoulli`, `randn_like`, ...) becomes an input, and is run before each step, in the order of the
graph. So the global generator moves exactly as it does in eager steps, and a snapshot that
holds the generator holds all that the next step needs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from resumable_trainer.state import generators
from resumable_trainer.state.compare import differences
from resumable_trainer.trainer import updates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.fx import GraphModule, Node

_ONLY_SHAPE_COUNTS = frozenset(
    {"bernoulli.p", "rand_like", "randn_like", "randint_like", "uniform", "normal_functional"}
    | {"exponential", "log_normal", "geometric", "cauchy"}
)
"""Operations that draw and whose tensor argument says only how much is drawn."""
_OF_RECURRENT_LAYERS = frozenset({"_flat_weights", "_flat_weight_refs"})
"""Lists of their parameters, which those layers follow up themselves whenever one is exchanged, as tracing does."""
_BY_VALUES = "it decides by the values of tensors"


class CannotTraceError(Exception):
    """Why a step is no graph of tensor operations; ends up as a line on the screen."""


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
class Draw:
    """An operation that draws from the global generator before each step; `example` is of the result's form."""

    operation: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    example: Tensor

    def __call__(self) -> Tensor:
        """Draw."""
        result: Tensor = self.operation(*self.arguments, **self.keywords)
        return result


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
    with _untouched(recipe.pair):
        try:
            return _Tracer(recipe, inputs, spec).trace(batch)
        except CannotTraceError:
            raise
        except Exception as error:
            if "DataDependent" in type(error).__name__:
                raise CannotTraceError(_BY_VALUES) from error
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
        graph, constants = _functional(eager, flat)
        tags = {tag for node in graph.graph.nodes for tag in getattr(node.target, "tags", ())}
        if tags & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}:
            raise CannotTraceError(_BY_VALUES)
        draws = _take_draws_out(graph) if self._inputs.device.type == "cpu" else []
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


def _functional(eager: GraphModule, flat: Sequence[Tensor]) -> tuple[GraphModule, list[Tensor]]:
    """The graph without changes in place but of its inputs, at its end; constants become inputs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    aten = torch.ops.aten
    for node in list(eager.graph.nodes):
        if node.op == "call_function" and node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])  # gradients are in the graph already
            eager.graph.erase_node(node)
    constants = _lift_constants(eager)
    eager.recompile()
    function = torch.func.functionalize(eager, remove="mutations")
    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat, *constants)
    if any(node.op == "get_attr" for node in graph.graph.nodes):
        raise CannotTraceError("it cannot be traced (a tensor is made from Python values in it)")
    return graph, constants


def _lift_constants(graph: GraphModule) -> list[Tensor]:
    """Make a placeholder, behind the others, of each tensor that the graph refers to by name."""
    constants: list[Tensor] = []
    placeholders: dict[str, Node] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        if node.target not in placeholders:
            value = getattr(graph, node.target)
            if not isinstance(value, torch.Tensor) or value.requires_grad:
                raise CannotTraceError("it refers to something trained that is no parameter of the model or the loss")
            with graph.graph.inserting_after(last):
                last = placeholders[node.target] = graph.graph.placeholder(f"constant_{len(constants)}")
            constants.append(value)
        node.replace_all_uses_with(placeholders[node.target])
        graph.graph.erase_node(node)
    return constants


def _take_draws_out(graph: GraphModule) -> list[Draw]:
    """Make a placeholder, behind the others, of each operation that draws random numbers."""
    draws = []
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        draws.append(_draw(node))
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"drawn_{len(draws)}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
    return draws


def _draw(node: Node) -> Draw:
    target: Any = node.target
    name = target._opname if target._opname in _ONLY_SHAPE_COUNTS else f"{target._opname}.{target._overloadname}"
    if node.all_input_nodes and name not in _ONLY_SHAPE_COUNTS:
        raise CannotTraceError(f"it draws random numbers with {name}")
    if "generator" in node.kwargs and node.kwargs["generator"] is not None:
        raise CannotTraceError("it draws from a generator of its own")
    both: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda inner: _template(inner.meta["val"]))
    arguments, keywords = both
    return Draw(target, arguments, keywords, example=_template(node.meta["val"]))


def _template(value: Tensor) -> Tensor:
    """A real tensor of the form of a fake one."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).zero_()


@contextlib.contextmanager
def _untouched(pair: nn.Module) -> Iterator[None]:
    """Puts back what running a module's Python has changed, and refuses what a graph would leave out."""
    before = generators.capture_global()
    kept = [_Attributes(module) for module in pair.modules()]
    changed: list[str] = []
    try:
        yield
    finally:
        after = generators.capture_global()
        generators.restore_global(before)
        for attributes in kept:
            changed += attributes.put_back()
    if changed:
        raise CannotTraceError(f"its forward pass changes {changed[0]!r}, an attribute that a graph would leave out")
    for name in ("python", "numpy"):
        if differences(before[name], after[name], place=name):
            raise CannotTraceError(f"its forward pass draws from {name}'s generator, which a graph would leave out")


class _Attributes:
    """A module's attributes, and what its own dicts, lists and sets hold; not deeper."""

    def __init__(self, module: nn.Module) -> None:
        self._live = vars(module)
        self._copy = dict(self._live)
        self._containers = [(n, v, type(v)(v)) for n, v in self._live.items() if type(v) in (dict, list, set)]

    def put_back(self) -> list[str]:
        """Names of what was another object, or held another."""
        live, copy = self._live, self._copy
        others = [name for name in copy.keys() | live.keys() if live.get(name, self) is not copy.get(name, self)]
        changed = [name for name in others if not _same_objects(live.get(name), copy.get(name))]
        if others:
            live.clear()
            live.update(copy)
        for name, container, before in self._containers:
            if not _same_objects(container, before):
                changed.append(name)
                container.clear()
                (container.extend if type(container) is list else container.update)(before)
        return [name for name in changed if name not in _OF_RECURRENT_LAYERS]


def _same_objects(a: Any, b: Any) -> bool:
    """Whether two things are containers of a kind that hold the same objects."""
    if type(a) is not type(b) or type(a) not in (dict, list, set):
        return False
    if type(a) is dict and not _same_objects(list(a.values()), list(b.values())):
        return False
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:200] if text else type(error).__name__
