"""Traced graphs made fit for a compiler: no changes in place but of inputs, no constants, no random draws.

Randomness stays torch's own and outside of the compiled code: each operation that draws (dropout's
`bernoulli`, `randn_like`, ...) becomes an input, and is run before each step, in the order of the
graph. So the global generator moves exactly as it does in eager steps, and a snapshot that
holds the generator holds all that the next step needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.fx import GraphModule, Node

_ONLY_SHAPE_COUNTS = frozenset(
    {"bernoulli.p", "rand_like", "randn_like", "randint_like", "uniform", "normal_functional"}
    | {"exponential", "log_normal", "geometric", "cauchy"}
)
"""Operations that draw and whose tensor argument says only how much is drawn."""
BY_VALUES = "it decides by the values of tensors"


class CannotTraceError(Exception):
    """Why a step is no graph of tensor operations; ends up as a line on the screen."""


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


def refuse_decisions(graph: GraphModule) -> None:
    """Refuse a graph in which values become sizes or Python numbers.

    Raises:
        CannotTraceError: There is such an operation.
    """
    tags = {tag for node in graph.graph.nodes for tag in getattr(node.target, "tags", ())}
    if tags & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}:
        raise CannotTraceError(BY_VALUES)


def functional(eager: GraphModule, flat: Sequence[Tensor]) -> tuple[GraphModule, list[Tensor]]:
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


def take_draws_out(graph: GraphModule) -> list[Draw]:
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
