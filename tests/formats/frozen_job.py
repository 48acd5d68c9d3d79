"""The training whose snapshots are frozen: every kind of value that the format knows, and arithmetic that is exact.

Nothing here may change once a format is released: the files were made with it, and are read with it.
"""

from __future__ import annotations

import collections
import datetime
import http
import pathlib
import random
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from resumable_trainer import EarlyStopping, Run, SnapshotPolicy

if TYPE_CHECKING:
    from pathlib import Path

SEED = 7
EPOCHS = 3
DATA = (torch.arange(8),)
ACCURACY = [0.5, 0.25, 0.75]
ODD_NAN = struct.unpack(">d", bytes.fromhex("fff8000000000001"))[0]
BYTES = [0x01, 0x40, 0x7E, 0x81]
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


def from_bits(bits: list[int], integers: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of these very bits."""
    return torch.tensor(bits, dtype=integers).view(dtype)


class Model(nn.Module):
    """Tied weights, another memory format, every dtype, NaNs with payloads, odd shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.convolution = nn.Conv2d(2, 2, 2, bias=False).to(memory_format=torch.channels_last)
        self.low = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
        with torch.no_grad():
            self.embedding.weight.copy_(torch.arange(6.0).reshape(3, 2))
            self.convolution.weight.copy_(torch.arange(16.0).reshape(2, 2, 2, 2))
        for code, dtype in DTYPES.items():
            self.register_buffer(f"of_{code}", torch.tensor(BYTES * 4, dtype=torch.uint8).view(dtype))
        self.register_buffer("of_BOOL", torch.tensor([True, False]))
        self.register_buffer("wide_complex", torch.tensor([1 + 2j, complex(0.0, -0.0)], dtype=torch.complex128))
        self.register_buffer("nan32", from_bits([0x7FC00001, -0x3FFFFE, 0x7F800001], torch.int32, torch.float32))
        self.register_buffer("nan16", from_bits([0x7FC1, -0x3F], torch.int16, torch.bfloat16))
        self.register_buffer("none_at_all", torch.zeros(0, 3))
        self.register_buffer("steps", torch.tensor(0))


class Values:
    """A part that holds a value for each tag of FORMAT.md."""

    def __init__(self) -> None:
        self.values = values()

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


def values() -> dict[str, Any]:
    """One of each kind, and some of each that are hard to tell apart."""
    tied = torch.tensor([1.0, 2.0])
    return {
        "plain": [None, True, False, 0, -(2**63), 2**64 - 1, 0.1, -0.0, 1e-320, "é\n\0☃", {}, []],
        "tuple": (1, (2.5, "x")),
        "set": {3, 1, 2},
        "frozenset": frozenset({"b", "a"}),
        "dict": {1: "one", "$odd": 2, (1, 2): None, None: 0.5},
        "ordered": collections.OrderedDict([("z", 1), ("a", 2)]),
        "counter": collections.Counter({"x": 3, 7: 1}),
        "deque": collections.deque([1, 2], maxlen=5),
        "defaultdict": collections.defaultdict(list, {"k": [1]}),
        "bytes": b"\0\xff",
        "bytearray": bytearray(b"ab"),
        "int": [2**64, -(2**63) - 1, 2**200],
        "float": [float("inf"), -float("inf"), float("nan"), ODD_NAN],
        "complex": complex(1.5, -0.0),
        "range": range(1, 10, 3),
        "slice": slice(None, 5, 2),
        "path": pathlib.Path("/a/b c"),
        "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
        "timedelta": datetime.timedelta(days=-1, seconds=2, microseconds=3),
        "small array": np.array([[1, -2]], dtype=np.int16),
        "large array": np.arange(300, dtype=np.float64) / 4,
        "array of words": np.array(["ab", "é"]),
        "array of days": np.array(["2026-01-02"], dtype="datetime64[D]"),
        "npscalar": [np.float64(0.1), np.int8(-3), np.bool_(True)],
        "npdtype": np.dtype("<f4"),
        "torchdtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "size": torch.Size([2, 3]),
        "enum": http.HTTPStatus.IM_A_TEAPOT,
        "tied": [tied, tied],
        "parameter": nn.Parameter(torch.tensor([0.5]), requires_grad=False),
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
    }


class Job:
    """All parts, as a new process builds them."""

    def __init__(self, *, filled: bool = True) -> None:
        self.model = Model()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.5)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.5, patience=0)
        self.generator = torch.Generator()
        self.generator.manual_seed(5)
        self.values = Values()
        if not filled:
            self.values.values = {}
        self.seen: list[list[int]] = []
        self.drawn: list[list[float]] = []

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "generator": self.generator,
            "values": self.values,
        }

    def step(self, indices: torch.Tensor) -> None:
        """Halve the weights and set the moments: nothing that another machine would round otherwise."""
        self.seen.append(indices.tolist())
        self.drawn.append([torch.rand((), generator=self.generator).item(), torch.rand(()).item(), random.random()])
        self.model.head.eval()
        self.model.convolution.weight.requires_grad_(False)
        with torch.no_grad():
            self.model.embedding.weight.mul_(0.5)
            self.model.steps += 1
        count = float(self.model.steps)
        self.model.low.grad = torch.full((2,), count, dtype=torch.bfloat16)
        for parameter in self.model.parameters():
            moments = torch.full_like(parameter, count / 4, dtype=torch.float32)
            self.optimizer.state[parameter] = {
                "step": torch.tensor(count), "exp_avg": moments, "exp_avg_sq": moments / 2,
            }  # fmt: skip

    def train(self, directory: Path, *, die_at: int | None = None) -> Run:
        """Three epochs of four batches; a snapshot within each."""
        with Run(
            directory,
            state=self.state,
            seed=SEED,
            snapshots=SnapshotPolicy(every_steps=3, keep_last=2, background=False),
            early_stopping=EarlyStopping("accuracy", patience=9),
            progress=False,
        ) as run:
            for epoch in run.epochs(EPOCHS):
                for (indices,) in run.batches(DATA, batch_size=2, shuffle=True):
                    self.step(indices)
                    if run.step == die_at:
                        _ = run.history  # its rows are in the file, one more than the newest snapshot counts
                        raise Died
                    run.log(loss=self.model.embedding.weight.sum(), odd=float("inf"))
                self.scheduler.step(5.0 - ACCURACY[epoch])
                run.log_epoch(accuracy=ACCURACY[epoch], never=float("nan"))
        return run


class Died(BaseException):
    """Stands for a kill."""
