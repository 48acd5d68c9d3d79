"""Workers: shielded from signals to the group, gone with their trainer, never left behind.

The signals are real ones, sent to real process groups: each trainer below is a process of its own.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from batch_bytes import all_bytes
from torch.utils.data import DataLoader, Dataset, get_worker_info

from resumable_trainer.data.sources import source_of

TESTS = Path(__file__).parent
ROOT = TESTS.parent.parent


class Rows(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.rand(2), index


class WorkerOf(Rows):
    """Says which process made a sample."""

    def __getitem__(self, index):
        return os.getpid()


class Wide(Rows):
    """Samples that fill the pipe of results, so that a worker waits in the middle of a write."""

    def __getitem__(self, index):
        return "x" * 1_000_000


def trainer(body: str, *, context: str = "fork") -> subprocess.Popen[str]:
    """A trainer in a session of its own that runs `body` with `loader` and `source` and 2 workers at hand."""
    start = f"""
        import os, signal, sys
        from torch.utils.data import DataLoader
        from resumable_trainer.data.sources import source_of
        from test_workers import Rows, Wide, WorkerOf
        def loader(dataset, **how):
            return DataLoader(dataset, 4, num_workers=2, multiprocessing_context={context!r}, **how)
        def workers():
            import multiprocessing
            return [child.pid for child in multiprocessing.active_children()]
        def main():
            seen = []
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
    """
    code = textwrap.dedent(start) + textwrap.indent(textwrap.dedent(body), "    ")
    code += "\nif __name__ == '__main__':\n    main()\n"
    script = Path(os.environ["PYTEST_SCRIPTS"]) / f"trainer{time.monotonic_ns()}.py"
    script.write_text(code)
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}"},
        start_new_session=True,
    )


@pytest.fixture(autouse=True)
def scripts(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_SCRIPTS", str(tmp_path))


@pytest.fixture
def started():
    """Start trainers that do not outlive the test, whatever happens."""
    with contextlib.ExitStack() as stack:

        def start(body, **how):
            process = stack.enter_context(trainer(body, **how))
            stack.callback(_end_group, process)
            return process

        yield start


def _end_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until_gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if is_alive(pid)]} still there after {seconds} s"
        time.sleep(0.01)


CONSUME = """
    batches = source_of(loader(Rows()), seed=0).batches(epoch=0)
    taken = [next(batches)]
    print(*workers(), flush=True)
    sys.stdin.readline()
    taken += batches
    print(len(taken), sorted(set(seen)), flush=True)
"""


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_go_on_after_signals_to_the_group(started, context):
    process = started(CONSUME, context=context)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2, process.stderr.read()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.killpg(process.pid, number)
    out, err = process.communicate("go on\n", timeout=60)
    assert out == "10 ['SIGINT', 'SIGTERM', 'SIGUSR1']\n"
    assert (process.returncode, err) == (0, "")
    wait_until_gone(pids, 5)


def test_a_signal_to_a_worker_that_is_just_being_made_does_not_end_it(started):
    process = started(
        """
        def hit():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        os.register_at_fork(after_in_child=hit)
        print(len(list(source_of(loader(Rows()), seed=0).batches(epoch=0))), seen)
        """
    )
    assert process.communicate(timeout=60) == ("10 []\n", "")


def test_a_second_sigterm_ends_a_worker(started):
    process = started(CONSUME)
    first, second = (int(pid) for pid in process.stdout.readline().split())
    os.kill(first, signal.SIGTERM)
    while int(_status(first, "SigPnd"), 16) | int(_status(first, "ShdPnd"), 16):
        time.sleep(0.01)
    assert is_alive(first)
    deadline = time.monotonic() + 20
    while is_alive(first):  # two that come at once count as one
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGTERM)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    _, err = process.communicate("go on\n", timeout=60)
    assert process.returncode != 0
    assert "DataLoader worker" in err
    wait_until_gone([second], 10)


def _status(pid, field):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(field))


def test_the_trainers_own_signals_work_as_before_once_workers_are_made(started):
    process = started(
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        list(source_of(loader(Rows()), seed=0).batches(epoch=0))
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        os.kill(os.getpid(), signal.SIGTERM)
        print(seen)
        """
    )
    assert process.communicate(timeout=60) == ("['SIGTERM']\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch's watchdog needs five seconds")
@pytest.mark.parametrize(("context", "dataset"), [("fork", "Rows"), ("fork", "Wide"), ("spawn", "Rows")])
def test_workers_die_with_a_killed_trainer_at_once(started, context, dataset):
    process = started(
        f"""
        batches = source_of(loader({dataset}()), seed=0).batches(epoch=0)
        next(batches)
        print(*workers(), flush=True)
        sys.stdin.readline()
        """,
        context=context,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    wait_until_gone(pids, 3)


@pytest.mark.parametrize(
    ("ending", "how"),
    [
        ("raise KeyError('training failed')", ""),
        ("raise KeyError('training failed')", ", persistent_workers=True"),
        ("sys.exit(3)", ""),
        ("return", ", persistent_workers=True"),
    ],
)
def test_a_program_that_ends_while_batches_are_held_open_does_not_hang(started, ending, how):
    process = started(
        f"""
        global held
        source = source_of(loader(Rows(){how}), seed=0)
        held = source, source.batches(epoch=0)
        next(held[1])
        print(*workers(), flush=True)
        {ending}
        """
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    _, err = process.communicate(timeout=30)
    expected = {"raise": (1, "KeyError: 'training failed'"), "sys.e": (3, ""), "retur": (0, "")}[ending[:5]]
    assert (process.returncode, err.strip().rpartition("\n")[2]) == expected
    wait_until_gone(pids, 1)


def test_a_forked_child_of_the_trainer_leaves_the_workers_alone(started):
    process = started(
        """
        batches = source_of(loader(Rows()), seed=0).batches(epoch=0)
        next(batches)
        child = os.fork()
        if not child:
            import atexit
            atexit._run_exitfuncs()
            os._exit(0)
        os.waitpid(child, 0)
        print(1 + len(list(batches)))
        """
    )
    assert process.communicate(timeout=60)[0] == "10\n"


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_batches_are_the_same_in_any_context(context):
    here = all_bytes(source_of(DataLoader(Rows(), 4, shuffle=True), seed=0).batches(epoch=1))
    loader = DataLoader(Rows(), 4, shuffle=True, num_workers=2, multiprocessing_context=context)
    assert all_bytes(source_of(loader, seed=0).batches(epoch=1, start=3)) == here[3:]


def leave_by_break(batches):
    for _ in batches:
        break


def leave_by_close(batches):
    next(batches)
    batches.close()


def leave_at_the_end(batches):
    list(batches)


def leave_before_the_first(batches):
    batches.close()


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_close, leave_at_the_end, leave_before_the_first])
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_left_in_any_way_leave_no_worker_and_no_thread(leave, persistent):
    threads = set(threading.enumerate())
    source = source_of(DataLoader(Rows(), 4, num_workers=2, persistent_workers=persistent), seed=0)
    leave(source.batches(epoch=0))
    gc.collect()
    assert len(multiprocessing.active_children()) == (2 if persistent else 0)
    source.close()
    assert not multiprocessing.active_children()
    left = set(threading.enumerate()) - threads
    for thread in left:  # a queue's feeder has been told to end and does so by itself; one that is leaked never does
        thread.join(20)
    assert not any(thread.is_alive() for thread in left)


def test_persistent_workers_go_when_their_source_is_forgotten():
    source = source_of(DataLoader(Rows(), 4, num_workers=2, persistent_workers=True), seed=0)
    list(source.batches(epoch=0))
    assert len(multiprocessing.active_children()) == 2
    gc.disable()  # it must not take a collection of cycles
    try:
        del source
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_a_closed_source_can_be_used_again():
    source = source_of(DataLoader(WorkerOf(), 4, num_workers=2, persistent_workers=True), seed=0)
    first = {int(pid) for batch in source.batches(epoch=0) for pid in batch}
    source.close()
    second = {int(pid) for batch in source.batches(epoch=0) for pid in batch}
    source.close()
    assert len(first) == len(second) == 2
    assert not first & second


def test_workers_made_in_another_thread_outlive_it():
    source = source_of(DataLoader(Rows(), 4, num_workers=2), seed=0)
    made = []
    thread = threading.Thread(target=lambda: made.append(source.batches(epoch=0)))
    thread.start()
    thread.join()
    assert len(list(made[0])) == 10


def say_the_dataset(worker):
    get_worker_info().dataset.said = True


class Said(Rows):
    def __getitem__(self, index):
        return self.said


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_init_fn_finds_the_users_dataset(context):
    how = {"num_workers": 2, "worker_init_fn": say_the_dataset, "multiprocessing_context": context}
    batches = source_of(DataLoader(Said(), 20, **how), seed=0).batches(epoch=0)
    assert all(bool(batch.all()) for batch in batches)
