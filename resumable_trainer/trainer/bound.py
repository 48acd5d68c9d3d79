"""A compiled step bound to live tensors: what is called once per batch, with as little Python as there can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from resumable_trainer.trainer.tracing import Inputs, Traced

Shape = tuple[torch.Size, torch.dtype, torch.device]


def shape_of(tensor: Tensor) -> Shape:
    """What of a batch's tensor is fixed in compiled code."""
    return tensor.shape, tensor.dtype, tensor.device


class BoundStep:
    """One training step on the tensors that it is bound to.

    Invariant: the tensors are those of the model and the optimizer at the time of binding. Whoever replaces
    them (a restore does) must bind anew; it is done at each epoch's first batch, and after each resume.

    Args:
        traced: What the compiled code was made from.
        inputs: The live tensors.
        groups: The optimizer's groups: their learning rates are looked at before each step.
        batch: Leaves of a batch of the shape that the code is for.
        metrics: All metrics, in the order of a row; those that are not in the graph are called here.

    Attributes:
        call: The compiled code: all inputs of the graph, in its order, to its outputs.
    """

    call: Callable[[list[Tensor]], Sequence[Tensor]]

    def __init__(
        self,
        traced: Traced,
        *,
        inputs: Inputs,
        groups: Sequence[Mapping[str, Any]],
        batch: Sequence[Tensor],
        metrics: Mapping[str, Callable[..., Any]],
    ) -> None:
        fixed = inputs.flat()
        self._groups = groups
        self._rates, self._rates_set = inputs.rates, [float("nan")] * len(groups)
        self._shapes = [shape_of(leaf) for leaf in batch]
        self._batch = slice(len(fixed), len(fixed) + len(batch))
        self._live = [*fixed, *batch, *traced.constants, *([batch[0]] * len(traced.draws))]
        first_draw = len(self._live) - len(traced.draws)
        self._draws = [(first_draw + number, draw) for number, draw in enumerate(traced.draws)]
        self._in_graph = {"loss": 0, **{name: number + 1 for number, name in enumerate(traced.in_graph)}}
        self._by_hand = {name: metric for name, metric in metrics.items() if name not in self._in_graph}
        self._order = ["loss", *metrics]
        self._outputs = traced.outputs
        self._reads = inputs.device.type == "cpu"

    @property
    def live(self) -> list[Tensor]:
        """All inputs of the graph, in its order."""
        return self._live

    @property
    def batch(self) -> slice:
        """Where among them the batch is."""
        return self._batch

    def __call__(self, inputs: Any, targets: Any) -> dict[str, Any] | None:
        """Train on a batch; the values of its row, or None (and nothing done) if it has another shape."""
        if type(inputs) is torch.Tensor and type(targets) is torch.Tensor:
            leaves = [inputs, targets]
        else:
            leaves = pytree.tree_leaves((inputs, targets))
        if [(t.shape, t.dtype, t.device) for t in leaves] != self._shapes:
            return None
        live = self._live
        live[self._batch] = [t if t.is_contiguous() else t.contiguous() for t in leaves]
        for index, draw in self._draws:
            live[index] = draw()
        rates = [group["lr"] for group in self._groups]
        if rates != self._rates_set:
            self._set_rates(rates)
        found = self.call(live)
        if self._by_hand or not self._reads:
            return self._values(found, targets)
        return {name: found[index].item() for name, index in self._in_graph.items()}

    def _set_rates(self, rates: list[float]) -> None:
        for tensor, rate in zip(self._rates, rates, strict=True):
            tensor.fill_(rate)
        self._rates_set = rates

    def _values(self, found: Sequence[Tensor], targets: Any) -> dict[str, Any]:
        values: dict[str, Any] = {name: found[index] for name, index in self._in_graph.items()}
        if self._by_hand:
            assert self._outputs is not None
            outputs = pytree.tree_unflatten(list(found[len(self._in_graph) :]), self._outputs)
            with torch.no_grad():
                values |= {name: metric(outputs, targets) for name, metric in self._by_hand.items()}
        return {name: values[name] for name in self._order}
