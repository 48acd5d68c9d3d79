"""Interrupt a supervised training at random until it is through, and compare how it ends, byte for byte.

One training runs under `resumable-trainer run --restart`. At random instants it gets a SIGTERM or a SIGKILL, one of
its data-loader workers a SIGKILL, or it is told to hang: in a busy loop, in a lock, in a worker. Its data hold
samples that are no numbers, so it also diverges and goes back, as does the reference, which nobody
interrupts. Parameters, optimizer, generators and metrics.jsonl of both must be the same bytes. Prints counts; exits
with 1 if anything differs, if the supervisor gives up, or if a process is left behind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "resume")]

from resumable_trainer.metrics.account import Account
from resumable_trainer.metrics.goodput import in_words

KINDS = ("TERM", "KILL", "KILL worker", "hang busy", "hang lock", "hang worker")
SECONDS_PER_LAUNCH = 0.7
HANG_SECONDS = 2.0
LONGEST_RESTART_SECONDS = 15.0
LEFT = (-1, -1)  # in the place of an epoch and a batch: the loop is left


def job(directory: str, *, epochs: int, pause: float, batches: int) -> None:
    """The training. A file `hang-KIND` beside it tells it to hang; whoever hangs takes the file away first."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from resumable_trainer import OnDivergence, Run, SnapshotPolicy

    torch.set_num_threads(1)
    where = Path(directory).parent

    def hangs(kind: str) -> bool:
        try:
            (where / f"hang-{kind}").rename(where / f"hung-{kind}")
        except OSError:
            return False
        return True

    class Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
        def __len__(self) -> int:
            return batches * 8

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if hangs("worker"):
                time.sleep(3600)
            inputs = torch.arange(16.0).add(index).sin() + 0.1 * torch.randn(16)
            if index == 21:
                inputs[3] = torch.nan  # a batch with it spoils the weights, in every epoch
            return inputs, inputs.nan_to_num().sum().sign().clamp(0, 1).reshape(1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(Samples(), batch_size=8, shuffle=True, num_workers=1)
    policy = SnapshotPolicy(every_steps=5)
    settings = OnDivergence("rollback", max_rollbacks=10**6)
    state = {"model": model, "optimizer": optimizer}
    ticks = (where / f"{Path(directory).name}.ticks").open("a", buffering=1)
    with ticks, Run(directory, state=state, snapshots=policy, progress=False, on_divergence=settings) as run:
        try:
            for _ in run.epochs(epochs):
                model.train()
                for inputs, labels in run.batches(loader):
                    print(time.time(), os.getpid(), run.epoch, run.batch, file=ticks)
                    if hangs("busy"):
                        while True:
                            pass
                    if hangs("lock"):
                        import threading

                        lock = threading.Lock()
                        lock.acquire()
                        lock.acquire()
                    loss = nn.functional.binary_cross_entropy_with_logits(model(inputs), labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    run.log(loss=loss)
                    time.sleep(pause)
                run.log_epoch(weight=model[0].weight.sum())
        finally:
            # The last batch ends here: it may have waited for the next one, and been saved.
            print(time.time(), os.getpid(), *LEFT, file=ticks)


def start(directory: Path, args: argparse.Namespace, *, supervised: bool) -> subprocess.Popen[bytes]:
    options = ["--restart", "--hang-timeout", "30", "--backoff", "0.05", "--max-stuck", "50"] if supervised else []
    argv = [sys.executable, "-m", "resumable_trainer", "run", "--run-dir", str(directory), *options]
    argv += [__file__, "--one", str(directory), "--epochs", str(args.epochs), "--pause", str(args.pause)]
    argv += ["--batches", str(args.batches)]
    log = (directory.parent / f"{directory.name}.log").open("wb")
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "RESUMABLE_TRAINER_MIN_WATCHDOG_SECONDS": str(HANG_SECONDS),
    }
    with log:
        return subprocess.Popen(argv, stdout=log, stderr=log, env=environment, cwd=directory.parent)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_worker(pid: int, training: int) -> bool:
    """Whether it was forked for data, not started to write snapshots."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == Path(f"/proc/{training}/cmdline").read_bytes()
    except OSError:
        return False


def events(directory: Path) -> list[dict[str, Any]]:
    path = directory / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def trained(directory: Path) -> int:
    return sum(event["event"] == "training" for event in events(directory))


def seconds_forward(ticks: Path, skips: set[tuple[int, int]]) -> float:
    """By a clock of the job's own: how long the executions of batches took that counted in the end.

    Each batch is counted once, by its last execution, from its begin to that of the next in the same process, or to
    where that leaves its loop.
    """
    rows = [line.split() for line in ticks.read_text().splitlines() if len(line.split()) == 4]
    last: dict[tuple[int, int], float] = {}
    for (begun, pid, epoch, batch), (ended, next_pid, *_) in itertools.pairwise(rows):
        last[int(epoch), int(batch)] = float(ended) - float(begun) if pid == next_pid else 0.0
    return sum(seconds for place, seconds in last.items() if place not in {*skips, LEFT})


class Campaign:
    def __init__(self, root: Path, args: argparse.Namespace, seed: int) -> None:
        self.root, self.args, self.random = root, args, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self.seconds = 0.0  # by an outside clock, from the supervisor's start to its end

    def run(self) -> Path:
        directory = self.root / "interrupted"
        began = time.monotonic()
        supervisor = start(directory, self.args, supervised=True)
        launches = 0
        while supervisor.poll() is None and self.done.total() < self.args.interruptions:
            if not self.wait_for_training(supervisor, directory, launches):
                break
            launches = trained(directory)
            time.sleep(self.random.uniform(0, SECONDS_PER_LAUNCH))
            while not self.strike(supervisor.pid, KINDS[self.done.total() % len(KINDS)]):
                if supervisor.poll() is not None:
                    break
                time.sleep(0.01)
        code = supervisor.wait()
        self.seconds = time.monotonic() - began
        if code:
            log = (self.root / "interrupted.log").read_text()[-3000:]
            self.problems.append(f"the supervisor ended with {code}\n{log}")
        return directory

    def wait_for_training(self, supervisor: subprocess.Popen[bytes], directory: Path, launches: int) -> bool:
        """Until the next launch trains; a worker killed when it had nothing left to do leads to none."""
        deadline = time.monotonic() + LONGEST_RESTART_SECONDS
        while supervisor.poll() is None:
            if trained(directory) > launches or (launches and time.monotonic() > deadline):
                return True
            time.sleep(0.05)
        return False

    def strike(self, supervisor: int, kind: str) -> bool:
        child = next(iter(children(supervisor)), None)
        if child is None:
            return False
        if kind.startswith("hang"):
            (self.root / kind.replace(" ", "-")).touch()
        else:
            target = child
            if kind == "KILL worker":
                workers = [pid for pid in children(child) if is_worker(pid, child)]
                if not workers:
                    return False
                target = self.random.choice(workers)
            try:
                os.kill(target, signal.SIGTERM if kind == "TERM" else signal.SIGKILL)
            except ProcessLookupError:
                return False
        self.done[kind] += 1
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the instants; printed, to be given again")
    parser.add_argument("--epochs", type=int, default=None, help="of the training (default: as many as are needed)")
    parser.add_argument("--batches", type=int, default=30, help="of an epoch")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds that a batch takes besides")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.epochs = args.epochs or max(2, round(args.interruptions * 1.6))
    if args.one:
        job(args.one, epochs=args.epochs, pause=args.pause, batches=args.batches)
        return 0
    import endings

    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    root = Path(tempfile.mkdtemp(prefix="service-campaign-"))
    campaign = Campaign(root, args, seed)
    directory = campaign.run()
    outside = campaign.seconds
    args.pause = 0.0
    reference = root / "whole"
    if start(reference, args, supervised=False).wait():
        print((root / "whole.log").read_text()[-3000:])
        return 1
    if not campaign.problems:
        differing = endings.differing(endings.ending(reference), endings.ending(directory))
        campaign.problems += [f"differs in {', '.join(differing)}"] if differing else []
    if campaign.done.total() < args.interruptions:
        campaign.problems.append(f"only {campaign.done.total()} interruptions before the training was through")
    skips = {
        (epoch, batch)
        for event in events(directory)
        if event["event"] == "diverged"
        for epoch, first, last in event["skip"]
        for batch in range(first, last + 1)
    }
    told = Account.of(events(directory)).goodput()
    forward = seconds_forward(root / "interrupted.ticks", skips)
    known = told.seconds["training"] + told.seconds["saving"]
    print(f"goodput told by the events: {in_words(told)}")
    print(
        f"wall time: {told.wall_seconds:.1f} s told, {outside:.1f} s by an outside clock"
        f" ({abs(told.wall_seconds - outside) / outside:.2%} apart); training that counts, saving included:"
        f" {known / told.wall_seconds:.2%} told, {forward / outside:.2%} by the job's own clock"
    )
    if abs(told.wall_seconds - outside) > 0.01 * outside:
        campaign.problems.append("the account does not add up to the time that passed")
    if abs(known / told.wall_seconds - forward / outside) > 0.01:
        campaign.problems.append("goodput is more than 1 % of the time off")
    counts = Counter(str(event["event"]) for event in events(directory))
    for kind in KINDS:
        print(f"{kind:16} {campaign.done[kind]:5}")
    for name in ("launched", "preempted", "failed", "ended", "diverged", "committed"):
        print(f"{name:16} {counts[name]:5} events")
    print(
        f"{campaign.done.total()} interruptions, {counts['diverged']} divergences, {len(campaign.problems)} problems,"
        f" seed {seed}, {outside:.0f} s"
    )
    for problem in campaign.problems:
        print(problem)
    if campaign.problems:
        print(f"kept for inspection: {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
