"""A traced step as one CUDA graph: a launch per step instead of hundreds.

Policy: the graph's operations are torch's own kernels, captured as they are; nothing is generated, so nothing is
kept on disk. Addresses are part of a capture: parameters and optimizer state that were replaced (by a
restore) mean capturing anew. Warming up and capturing leave no trace: what the warm-up changed, the device's
generator included, is put back. Draws happen within the graph, from the device's global generator,
which torch moves on at each replay as far as the eager operations would.

Optimizers that keep their `step` on the host go on doing so: the graph counts in a copy on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.fx import GraphModule

_WARM_UPS = 3  # as torch's notes on CUDA graphs advise: libraries choose and allocate in the first calls


class CannotCaptureError(Exception):
    """Why a step is no CUDA graph; ends up as a line on the screen."""


class CudaGraphStep:
    """A step captured for fixed addresses; called with all inputs of the graph, in its order.

    Args:
        graph: The traced step.
        inputs: Its inputs; the batch among them is only an example.
        batch: Where in `inputs` the batch is.
        counters: Where in it the optimizer's `step` tensors are, and whether the graph moves each one on.

    Raises:
        CannotCaptureError: The graph does something that a CUDA graph cannot; nothing has changed.
    """

    def __init__(
        self, graph: GraphModule, inputs: Sequence[Tensor], *, batch: slice, counters: Mapping[int, bool]
    ) -> None:
        self._batch = batch
        self._device = inputs[batch][0].device
        self._addresses = _addresses(inputs, batch)
        self._static = list(inputs)
        self._static[batch] = [tensor.clone() for tensor in inputs[batch]]
        on_host = [index for index in counters if inputs[index].device.type == "cpu"]
        self._hosts = [inputs[index] for index in on_host]
        self._moved_on = [inputs[index] for index in on_host if counters[index]]
        self._copies = [host.to(self._device) for host in self._hosts]
        for index, copy in zip(on_host, self._copies, strict=True):
            self._static[index] = copy
        if any(tensor.device != self._device for tensor in self._static):
            raise CannotCaptureError("a tensor of the step is not on the model's device")
        self._captured = torch.cuda.CUDAGraph()
        self._outputs = self._capture(graph)

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that were captured, the batch aside."""
        return self._addresses == _addresses(inputs, self._batch)

    def synchronize_counters(self) -> None:
        """Take the host's counters over: another step than this may have moved them."""
        for host, copy in zip(self._hosts, self._copies, strict=True):
            copy.copy_(host)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One step; the outputs are overwritten by the next."""
        for static, given in zip(self._static[self._batch], inputs[self._batch], strict=True):
            static.copy_(given, non_blocking=True)
        self._captured.replay()
        if self._moved_on:
            torch._foreach_add_(self._moved_on, 1)
        return self._outputs

    def _capture(self, graph: GraphModule) -> list[Tensor]:
        kept = {index: self._static[index].clone() for index in _written(graph)}
        generator = torch.cuda.get_rng_state(self._device)
        try:
            return self._warmed_up_and_captured(graph)
        except RuntimeError as error:
            raise CannotCaptureError(str(error).strip().partition("\n")[0][:200]) from error
        finally:
            with torch.no_grad():
                for index, before in kept.items():
                    self._static[index].copy_(before)
            torch.cuda.set_rng_state(generator, self._device)

    def _warmed_up_and_captured(self, graph: GraphModule) -> list[Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(_WARM_UPS):
                graph(*self._static)
        torch.cuda.current_stream().wait_stream(stream)
        # A snapshot's thread may be waiting for the device meanwhile, which a "global" capture forbids to all threads.
        with torch.cuda.graph(self._captured, capture_error_mode="thread_local"), torch.no_grad():
            outputs: list[Tensor] = graph(*self._static)
        return outputs


def _written(graph: GraphModule) -> list[int]:
    """Numbers of the inputs that the graph changes."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    copies = [node for node in graph.graph.nodes if node.target is torch.ops.aten.copy_.default]
    return [index for index, node in enumerate(inputs) if any(copy.args[0] is node for copy in copies)]


def _addresses(inputs: Sequence[Tensor], batch: slice) -> list[int]:
    fixed = [*inputs[: batch.start], *inputs[batch.stop :]]
    return [tensor.data_ptr() for tensor in fixed]
