"""Kill trainings at random instants until they are through, and compare how they end, byte for byte.

A parent that has imported torch once forks the victims; each round starts one training, kills it
(SIGKILL; every third round SIGTERM or SIGINT, to the process or to its whole group) and starts it
again, several times, and then lets it end. In every second round a scribe commits from the second
snapshot on (`resumable_trainer.snapshot.scribe`), whose life hangs on the victim's. Its metric journal
and its last snapshot must be those of the same training never killed. Prints counts; exits with 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
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

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "resume")]

import endings
import jobs
import torch
import torch._dynamo

from resumable_trainer.snapshot import dictation

MAX_KILLS_PER_ROUND = 8
_USUAL, _SCRIBE_AFTER = dictation._OFTEN, 2
ENDED = {0, 75, 130, -signal.SIGKILL}


class Campaign:
    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, job: str, directory: Path, *, fresh_interpreter: bool = False) -> int:
        """Start one training in its own process group; its pid."""
        log = directory.with_suffix(".log")
        if fresh_interpreter:
            with log.open("ab") as file:
                command = [sys.executable, __file__, "--one", job, str(directory)]
                # An interpreter that gets SIGINT before it runs any of our code dies with a code of its own.
                return subprocess.Popen(
                    command, stdout=file, stderr=file, start_new_session=True, preexec_fn=hold_interrupts
                ).pid
        pid = os.fork()
        if pid:
            return pid
        os.setpgid(0, 0)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os._exit(run_here(job, directory))

    def uninterrupted(self, job: str) -> tuple[dict[str, bytes], float]:
        directory = self.root / f"{job}-whole"
        started = time.monotonic()
        code = wait(self.run(job, directory))
        if code:
            raise SystemExit(f"{job} fails by itself ({code}):\n{directory.with_suffix('.log').read_text()}")
        return endings.ending(directory), time.monotonic() - started

    def round(self, job: str, number: int, whole: dict[str, bytes], seconds: float, *, fresh: bool = False) -> None:
        directory = self.root / f"{job}-{number}"
        gentle = number % 3 == 2
        dictation._OFTEN = _SCRIBE_AFTER if number % 2 else _USUAL
        code = -signal.SIGKILL
        for attempt in range(MAX_KILLS_PER_ROUND + 1):
            pid = self.run(job, directory, fresh_interpreter=fresh)
            code = self.interrupt(pid, seconds, gentle=gentle) if attempt < MAX_KILLS_PER_ROUND else wait(pid)
            end_group(pid)
            if code not in ENDED:
                break
            if code == 0:
                break
        self.judge(job, directory, whole, code)

    def interrupt(self, pid: int, seconds: float, *, gentle: bool) -> int:
        """Send a signal after a random time, if the training is still there by then; how it ended."""
        number = self.random.choice([signal.SIGTERM, signal.SIGINT]) if gentle else signal.SIGKILL
        deadline = time.monotonic() + self.random.uniform(0, seconds)
        while time.monotonic() < deadline:
            code = wait(pid, block=False)
            if code is not None:
                return code
            time.sleep(0.002)
        to_group = gentle and self.random.random() < 0.5
        os.kill(-pid if to_group else pid, number)
        code = wait(pid)
        assert code is not None
        if code:
            self.kills[signal.Signals(number).name + (" to the group" if to_group else "")] += 1
        return -signal.SIGKILL if gentle and code == -number else code  # before the handlers stood

    def judge(self, job: str, directory: Path, whole: dict[str, bytes], code: int) -> None:
        self.counts[job] += 1
        if code:
            log = directory.with_suffix(".log").read_text()[-3000:]
            self.problems.append(f"{directory.name} ended with {code}\n{log}")
            return
        differing = endings.differing(whole, endings.ending(directory))
        if differing:
            self.problems.append(f"{directory.name} differs in {', '.join(differing)}")
            return
        shutil.rmtree(directory)


def hold_interrupts() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def run_here(job: str, directory: Path) -> int:
    torch.set_num_threads(1)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        jobs.JOBS[job](str(directory))
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except KeyboardInterrupt:  # before the run's handlers stood
        return 130
    except BaseException as error:  # noqa: BLE001 - the edge of a process
        sys.excepthook(type(error), error, error.__traceback__)
        return 70
    return 0


def wait(pid: int, *, block: bool = True) -> int | None:
    found, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def end_group(pid: int) -> None:
    """Workers of a killed trainer leave by themselves within seconds; here they leave now."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="at least so many (default: %(default)s)")
    parser.add_argument("--fresh", type=int, default=3, help="rounds with a fresh interpreter per start")
    parser.add_argument("--seed", type=int, default=None, help="of the instants; printed, to be given again")
    parser.add_argument("--job", choices=jobs.JOBS, action="append", help="only this one; may be repeated")
    parser.add_argument("--one", nargs=2, metavar=("JOB", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_here(args.one[0], Path(args.one[1]))
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    root = Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    # What killed processes leave lying about goes with it.
    os.environ["TMPDIR"] = tempfile.tempdir = str(root)
    campaign = Campaign(root, seed)
    started = time.monotonic()
    chosen = args.job or list(jobs.JOBS)
    whole = {job: campaign.uninterrupted(job) for job in chosen}
    if {"loader", "loader, 2 workers"} <= set(chosen):
        differing = endings.differing(whole["loader"][0], whole["loader, 2 workers"][0])
        campaign.problems += [f"2 workers change {', '.join(differing)}"] if differing else []
    number = 0
    while campaign.kills.total() < args.kills:
        for job in chosen:
            campaign.round(job, number, *whole[job])
        number += 1
    for extra in range(args.fresh):
        job = chosen[extra % len(chosen)]
        campaign.round(job, number + extra, whole[job][0], whole[job][1] + 3.0, fresh=True)
    for job, count in campaign.counts.items():
        print(f"{job:28} {count:5} trainings")
    for name, count in sorted(campaign.kills.items()):
        print(f"{name:28} {count:5} kills")
    print(
        f"{campaign.kills.total()} kills, {len(campaign.problems)} differences, seed {seed}, "
        f"{time.monotonic() - started:.0f} s, torch {torch.__version__}"
    )
    for problem in campaign.problems[:10]:
        print(problem)
    if campaign.problems:
        print(f"kept for inspection: {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
