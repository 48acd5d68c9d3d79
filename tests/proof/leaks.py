"""Jobs with one deliberate leak each: what a resume cannot bring back, planted where people plant it."""

from __future__ import annotations

from dataclasses import dataclass

JOB = """
import collections, datetime, hashlib, itertools, os, random, threading, time, uuid
from pathlib import Path

import numpy as np
import torch
from torch import nn

from resumable_trainer import Run

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
inputs = torch.arange(160.0).reshape(40, 4) / 160
targets = inputs.sum(1, keepdim=True)
data = (inputs, targets)
state = {"model": model, "optimizer": optimizer}


def changed(x):
    return x


def loss_of(outputs, y):
    return (outputs - y).square().mean()


def after_step(run, loss):
    pass


def after_epoch(run):
    pass

#SETUP#

with Run("runs/job", state=state, progress=False) as run:
    for epoch in run.epochs(4):
        for x, y in run.batches(data, **({"batch_size": 4, "shuffle": True} if type(data) is tuple else {})):
            optimizer.zero_grad()
            loss = loss_of(model(changed(x)), y)
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
            after_step(run, loss)
        after_epoch(run)
        with torch.no_grad():
            for x, y in run.evaluating((inputs, targets), batch_size=10):
                run.log_epoch(test_loss=loss_of(model(x), y))
"""


@dataclass(frozen=True)
class Leak:
    """A leak, and what must be said of it.

    Attributes:
        setup: What the job does besides; defined before the run is opened.
        kind: Of the cause that must be named; None: the job is exact all the same.
        named: What the words about it must name: a variable, a line, a column.
    """

    setup: str
    kind: str | None
    named: str = ""

    @property
    def script(self) -> str:
        return JOB.replace("#SETUP#", self.setup)


LEAKS = {
    "none": Leak("", None),
    "every generator handed over": Leak(
        """
rng = np.random.default_rng(0)
state["rng"] = rng
def changed(x):
    return x + float(rng.normal()) / 10
""",
        None,
    ),
    "parameters begin at random": Leak(
        """
with torch.no_grad():
    model[0].weight += torch.from_numpy(np.random.default_rng().normal(size=(8, 4))).float()
""",
        None,
        "two fresh starts are not the same",
    ),
    "an unseeded generator": Leak(
        """
noise = np.random.default_rng()
def changed(x):
    return x + float(noise.normal()) / 10
""",
        "unseeded_generator",
        "noise",
    ),
    "entropy with no generator": Leak(
        """
def changed(x):
    return x + uuid.uuid4().int % 97 / 970
""",
        "unseeded_generator",
        "os.urandom",
    ),
    "a seeded generator that is no part": Leak(
        """
class Jitter:
    def __init__(self):
        self.rng = random.Random(7)
    def __call__(self, x):
        return x + self.rng.random() / 10
changed = Jitter()
""",
        "state_not_handed_over",
        "changed.rng",
    ),
    "an average in a variable": Leak(
        """
ema = {"loss": torch.zeros(())}
def after_step(run, loss):
    ema["loss"] = 0.9 * ema["loss"] + 0.1 * loss.detach()
def loss_of(outputs, y):
    return (outputs - y).square().mean() * (1 + ema["loss"])
""",
        "state_not_handed_over",
        "ema",
    ),
    "a scheduler that is no part": Leak(
        """
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
def after_step(run, loss):
    scheduler.step()
""",
        "state_not_handed_over",
        "scheduler",
    ),
    "a curriculum in the data": Leak(
        """
class Curriculum(torch.utils.data.Dataset):
    level = 1.0
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return inputs[index] * self.level, targets[index]
curriculum = Curriculum()
data = torch.utils.data.DataLoader(curriculum, batch_size=4, shuffle=True)
def after_epoch(run):
    curriculum.level = curriculum.level * 0.5
""",
        "state_not_handed_over",
        "curriculum.level",
    ),
    "data shuffled before the run": Leak(
        """
order = list(range(40))
random.shuffle(order)
data = [(inputs[i : i + 1], targets[i : i + 1]) for i in order]
""",
        "data_order",
        "Python",
    ),
    "the order of a set": Leak(
        """
names = {f"sample-{i}" for i in range(40)}
data = [(inputs[i : i + 1], targets[i : i + 1]) for i in (int(n.split("-")[1]) for n in names)]
""",
        "data_order",
        "sort",
    ),
    "a tree of directories as it is walked": Leak(
        """
for i in range(40):
    Path(f"samples/{i}.txt").parent.mkdir(exist_ok=True)
    Path(f"samples/{i}.txt").write_text(str(i))
found = [name for _, _, names in os.walk("samples") for name in names]
data = [(inputs[i : i + 1], targets[i : i + 1]) for i in (int(name.split(".")[0]) for name in found)]
""",
        "data_order",
        "os.scandir",
    ),
    "a directory as it is listed": Leak(
        """
folder = Path("samples")
folder.mkdir(exist_ok=True)
for i in range(40):
    (folder / f"{i}.txt").write_text(str(i))
data = [(inputs[i : i + 1], targets[i : i + 1]) for i in (int(p.stem) for p in folder.iterdir())]
""",
        "data_order",
        "os.listdir",
    ),
    "a permutation drawn before the run": Leak(
        """
torch.seed()
data = [(inputs[i : i + 1], targets[i : i + 1]) for i in torch.randperm(40).tolist()]
""",
        "unseeded_generator",
        "nothing",
    ),
    "an iterator begun outside the epochs": Leak(
        """
def forever():
    while True:
        yield from torch.arange(7.0) / 70
stream = forever()
def changed(x):
    return x + next(stream)
""",
        "data_order",
        "stream",
    ),
    "an average that is used after the run": Leak(
        """
average = torch.optim.swa_utils.AveragedModel(model)
def after_step(run, loss):
    average.update_parameters(model)
""",
        "state_not_handed_over",
        "average",
    ),
    "a loss that only the batches set": Leak(
        """
def after_epoch(run):
    run.log_epoch(last_loss=loss)
""",
        "state_not_handed_over",
        "loss",
    ),
    "a temperature beside the model's state": Leak(
        """
class Cooling(nn.Linear):
    heat = 1.0
    def forward(self, x):
        self.heat = self.heat * 0.9
        return super().forward(x) / self.heat
model = Cooling(4, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
state = {"model": model, "optimizer": optimizer}
""",
        "state_not_handed_over",
        "model.heat",
    ),
    "a stream that goes on by itself": Leak(
        """
class Stream:
    def __init__(self):
        self.endless = itertools.cycle([(inputs[i : i + 3], targets[i : i + 3]) for i in range(0, 39, 3)])
    def __iter__(self):
        return itertools.islice(self.endless, 10)
data = Stream()
""",
        "data_order",
        "state_dict",
    ),
    "the clock in a sample": Leak(
        """
class Timed(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return inputs[index] + time.time() % 1, targets[index]
data = torch.utils.data.DataLoader(Timed(), batch_size=4)
""",
        "clock",
        "time.time",
    ),
    "the day in a seed": Leak(
        """
from datetime import datetime
torch.manual_seed(1)
shift = datetime.now().toordinal() % 11 / 110
def changed(x):
    return x + shift
""",
        "clock",
        "datetime.now",
    ),
    "the time in a metric": Leak(
        """
began = time.perf_counter()
def after_step(run, loss):
    run.log(seconds=time.perf_counter() - began)
""",
        "clock",
        "perf_counter",
    ),
    "a kernel that has a deterministic form": Leak(
        """
def changed(x):
    if torch.are_deterministic_algorithms_enabled():
        return x
    return x + id(object()) % 9973 / 99730  # as if added up in whatever order the threads come
""",
        "nondeterministic_kernel",
        "use_deterministic_algorithms",
    ),
    "addresses in memory": Leak(
        """
def changed(x):
    return x + id(object()) % 9973 / 99730
""",
        "nondeterministic_kernel",
    ),
}
