"""A training that compiles nothing does not load torch's compiler; one that does finds all as torch has made it.

In processes of their own: in that of the tests it has been loaded by something.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import _use_grad_for_differentiable

from resumable_trainer.loop import late_compiler

if TYPE_CHECKING:
    import pytest

TRAINING = """
import copy, json, sys, tempfile
import torch
from torch import nn
from torch.optim import lr_scheduler
if sys.argv[1] == "loaded":
    import torch._dynamo
from resumable_trainer import Run

MAKE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, foreach=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
found, inputs = {}, torch.linspace(-1, 1, 24).reshape(6, 4)

def train(run, model, optimizer, scheduler, epochs):
    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss.detach()
    for _ in run.epochs(epochs):
        for _ in run.batches([0, 1]):
            with torch.set_grad_enabled(True):
                run.log(loss=optimizer.step(closure))
                assert torch.is_grad_enabled(), "as it was"
        scheduler.step()

for name, make in MAKE.items():
    with tempfile.TemporaryDirectory() as directory:
        for epochs in (1, 3):  # begun, and resumed
            torch.manual_seed(0)
            model = nn.Linear(4, 3)
            optimizer = make(list(model.parameters()))
            scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            with Run(directory, state=parts, progress=False) as run:
                train(run, model, optimizer, scheduler, epochs)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
    found[name] = [parameter.detach().numpy().tobytes().hex() for parameter in model.parameters()]
print(json.dumps({"bits": found, "loaded": "torch._dynamo" in sys.modules}))
"""

COMPILING = """
import json, sys
import torch
from torch import nn
from torch.optim import Optimizer
if sys.argv[1] == "late":
    from resumable_trainer import Run
model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
late = "torch._dynamo" not in sys.modules
asked = []

class Next:
    def find_spec(self, name, path, target=None):
        asked.append(name)

sys.meta_path.insert(int(sys.argv[1] == "late"), Next())

def step(inputs):
    optimizer.zero_grad()
    loss = model(inputs * 2).sum()
    return loss + 1

compiled = torch.compile(step, backend="eager")
compiled(torch.ones(2)).backward()
compiled(torch.ones(2)).backward()
from torch._dynamo.utils import counters
print(json.dumps({
    "late": late,
    "breaks": sum(counters["graph_break"].values()),
    "frames": dict(counters["frames"]),
    "grad": model.weight.grad.tolist(),
    "meant": [vars(each.__wrapped__)["__dynamo_disable"].__module__ for each in [Optimizer.zero_grad]],
    "next is asked": late == ("torch._dynamo" in asked),
}))
"""


def said(script: str, *args: str) -> Any:
    line = [sys.executable, "-W", "error::UserWarning", "-c", script, *args]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_training_does_not_load_it_and_has_the_same_bits() -> None:
    late, loaded = said(TRAINING, "late"), said(TRAINING, "loaded")
    assert (late["loaded"], loaded["loaded"]) == (False, True)
    assert late["bits"] == loaded["bits"]
    assert len({str(bits) for bits in late["bits"].values()}) == len(late["bits"]), "each trains as it does"


def test_what_is_compiled_afterwards_is_compiled_as_ever() -> None:
    late, plain = said(COMPILING, "late"), said(COMPILING, "plain")
    assert (late.pop("late"), plain.pop("late")) == (True, False)
    assert late == plain
    assert late["meant"] == ["torch._dynamo.eval_frame"]
    assert late["breaks"] > 0


def test_where_torch_is_not_what_it_was_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(optimizer: object) -> None: ...

    torchs = _use_grad_for_differentiable(plain)
    assert late_compiler.without_graph_breaks(torchs) is not torchs
    assert late_compiler.without_graph_breaks(plain) is plain
    assert late_compiler.without_graph_breaks(torch.no_grad()(plain)) is not torchs
    for name in ("_marking", "_keeping_grad_mode"):
        monkeypatch.setattr(late_compiler, name, None)
    assert late_compiler.without_graph_breaks(torchs) is torchs
    monkeypatch.setattr(late_compiler, "is_loaded", lambda: False)
    before = sys.meta_path.copy()
    late_compiler.put_off()
    assert sys.meta_path == before
