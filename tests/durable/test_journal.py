from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resumable_trainer.durable import journal as journal_module
from resumable_trainer.durable.digest import digest_bytes
from resumable_trainer.durable.files import Files
from resumable_trainer.durable.journal import Journal, Mark, encode_row, read_rows, read_rows_from_end, rows_after
from resumable_trainer.errors import SnapshotWriteError

if TYPE_CHECKING:
    from pathlib import Path


class Dies(BaseException):
    """Stands for a kill or a second Ctrl-C."""


def test_a_torn_last_line_is_cut_and_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.open(path)
    journal.append({"a": 1, "b": float("nan")})
    journal.append({"a": 2})
    journal.close()
    path.write_bytes(path.read_bytes() + b'{"a": 3')
    journal = Journal.open(path)
    assert journal.mark().rows == 2
    journal.append({"a": 4})
    journal.close()
    assert [row["a"] for row in read_rows(path)] == [1, 2, 4]
    assert path.read_text().splitlines()[0] == '{"a":1,"b":"NaN"}'


def test_rewind_cuts_to_the_mark_and_refuses_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.open(path)
    journal.append({"a": 1})
    mark = journal.mark()
    before = path.read_bytes()
    journal.append({"a": 2})
    assert journal.rewind(mark)
    assert path.read_bytes() == before
    journal.append({"a": 3})
    later = journal.mark()
    assert not journal.rewind(Mark(mark.num_bytes, "0" * 32, 1))
    assert not journal.rewind(Mark(later.num_bytes + 1, later.digest, 3))
    assert journal.mark() == later
    journal.close()


def test_a_file_whose_sync_failed_is_never_synced_again(tmp_path: Path) -> None:
    class Once(Files):
        def __init__(self) -> None:
            self.synced: list[int] = []

        def sync(self, fd: int) -> None:
            self.synced.append(os.fstat(fd).st_ino)
            if len(self.synced) == 1:
                raise OSError(errno.EIO, "Input/output error")

    files = Once()
    journal = Journal.open(tmp_path / "j", files=files)
    journal.append({"a": 1})
    with pytest.raises(SnapshotWriteError):
        journal.sync()
    journal.sync()
    journal.close()
    assert files.synced.count(files.synced[0]) == 1


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b'{"a":1}\nxx\n{"a":2}\n')
    with pytest.raises(ValueError, match="j line 2 is damaged"):
        list(read_rows(tmp_path / "j"))


def test_a_line_cut_at_any_byte_costs_that_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.open(path)
    for number in range(3):
        journal.append({"row": number, "text": "\u00e9\n\u2028"})
    journal.close()
    content = path.read_bytes()
    ends = [0, *(place + 1 for place, byte in enumerate(content) if byte == ord("\n"))]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        num_rows = sum(end <= size for end in ends) - 1
        assert len(list(read_rows(path))) == num_rows
        journal = Journal.open(path)
        assert journal.mark() == Mark(ends[num_rows], digest_bytes(content[: ends[num_rows]]), num_rows)
        journal.close()
        assert path.read_bytes() == content[: ends[num_rows]]


def test_a_torn_tail_longer_than_a_chunk_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_CHUNK_BYTES", 4)
    path = tmp_path / "j"
    for start in (b"", b'{"a":1}\n', b'{"a":1}\n{"a":22}\n'):
        path.write_bytes(start + bytes(1000))
        journal = Journal.open(path)
        assert journal.mark() == Mark(len(start), digest_bytes(start), start.count(b"\n"))
        journal.close()
        assert path.read_bytes() == start


def test_a_mark_says_the_same_before_and_after_a_reopening(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.open(path)
    assert journal.mark() == Mark(0, digest_bytes(b""), 0)
    for number in range(20):
        journal.append({"a": number})
        mark = journal.mark()
        assert mark == Mark(path.stat().st_size, digest_bytes(path.read_bytes()), number + 1)
        if number % 5 == 0:
            journal.close()
            journal = Journal.open(path)
            assert journal.mark() == mark
    journal.close()


def test_a_run_that_goes_on_from_a_mark_writes_the_same_bytes(tmp_path: Path) -> None:
    def rows(journal: Journal, numbers: range) -> None:
        for number in numbers:
            journal.append({"a": number})

    whole = Journal.open(tmp_path / "whole")
    rows(whole, range(10))
    end = whole.mark()
    whole.close()
    cut = Journal.open(tmp_path / "cut")
    rows(cut, range(4))
    mark = cut.mark()
    rows(cut, range(4, 7))
    cut.close()
    cut = Journal.open(tmp_path / "cut")
    assert cut.rewind(mark)
    rows(cut, range(4, 10))
    assert cut.mark() == end
    cut.close()
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_rewind_touches_nothing_of_a_journal_damaged_before_the_mark(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.open(path)
    journal.append({"a": 1})
    journal.append({"a": 2})
    mark = journal.mark()
    journal.append({"a": 3})
    journal.close()
    good = path.read_bytes()
    for bit in range(mark.num_bytes * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        journal = Journal.open(path)
        assert not journal.rewind(mark)
        journal.close()
        assert path.read_bytes() == bytes(bad)


def test_rewind_asks_the_file_and_not_what_it_remembers(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j")
    journal.append({"a": 1})
    mark = journal.mark()
    (tmp_path / "j").write_bytes(b'{"a":9}\n')
    assert not journal.rewind(mark)
    journal.close()


def test_rows_are_not_seen_before_they_are_flushed_nor_lost_when_the_buffer_is_full(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j")
    journal.append({"a": 1})
    assert list(read_rows(tmp_path / "j")) == []
    journal.flush()
    assert list(read_rows(tmp_path / "j")) == [{"a": 1}]
    journal.append({"a": "x" * 70_000})
    assert len(list(read_rows(tmp_path / "j"))) == 2
    journal.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.text(st.characters()), JSON, max_size=4), max_size=4))
def test_whatever_is_json_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal.open(path)
    for row in rows:
        journal.append(row)
    journal.close()
    assert list(read_rows(path)) == rows


def test_an_argument_that_is_not_utf8_is_a_value_like_any_other(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    journal = Journal.open(tmp_path / "j")
    journal.append({"args": [odd, math.inf]})
    journal.append({"args": ["caf\u00e9"]})
    journal.close()
    assert [row["args"] for row in read_rows(tmp_path / "j")] == [[odd, "Infinity"], ["caf\u00e9"]]


def test_floats_that_json_does_not_know_are_words_at_any_depth(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j")
    journal.append({"a": math.inf, "b": [-math.inf, {"c": math.nan}], "d": (1.5,)})
    journal.close()
    assert list(read_rows(tmp_path / "j")) == [{"a": "Infinity", "b": ["-Infinity", {"c": "NaN"}], "d": [1.5]}]


@pytest.mark.parametrize("line", [b'{"a":NaN}', b'{"a":-Infinity}', b"[" * 100_000, b"\xff{}", b"[]", bytes(9), b""])
def test_a_line_that_is_no_strict_json_object_is_damage(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "j").write_bytes(b"{}\n" + line + b"\n{}\n")
    rows = read_rows(tmp_path / "j")
    assert next(rows) == {}
    with pytest.raises(ValueError, match="j line 2 is damaged"):
        next(rows)


@given(
    texts=st.lists(st.text(max_size=12), max_size=8),
    torn=st.sampled_from([b"", b"{", b'{"text":"\xc3']),
    block=st.integers(1, 200),
)
def test_rows_read_from_the_end_are_those_read_from_the_beginning(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], torn: bytes, block: int
) -> None:
    """Whatever the blocks: rows longer than one, characters and words cut by their borders, a torn last line."""
    path = tmp_path_factory.mktemp("journal") / "j"
    rows = [{"event": "odd" if number % 2 else "even", "text": text} for number, text in enumerate(texts)]
    path.write_bytes(b"".join(map(encode_row, rows)) + torn)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal_module, "_BLOCK_BYTES", block)
        assert list(read_rows_from_end(path)) == list(read_rows(path))[::-1] == rows[::-1]
        odd = read_rows_from_end(path, holding=(b'"event":"odd"', b"\xff"))
        assert list(odd) == [row for row in rows[::-1] if row["event"] == "odd"]


def test_a_row_of_many_blocks_is_read_from_the_end(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"text": "\u00e9\U0001f600" * 200_000}, {"a": 2}]
    (tmp_path / "j").write_bytes(b"".join(map(encode_row, rows)))
    assert list(read_rows_from_end(tmp_path / "j")) == rows[::-1]
    assert list(read_rows_from_end(tmp_path / "j", holding=[b'"text"'])) == [rows[1]]


@pytest.mark.parametrize("line", [b'{"a":NaN}', b"[" * 100_000, b"\xff{}", b"[]", b""])
def test_damage_is_told_from_the_end_when_it_is_come_to(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"b":2}\n')
    rows = read_rows_from_end(path)
    assert next(rows) == {"b": 2}
    with pytest.raises(ValueError, match=r"j line b.* is damaged"):
        next(rows)
    assert list(read_rows_from_end(path, holding=[b'"b"'])) == [{"b": 2}], "what is not asked for is not parsed"


def test_no_more_is_read_from_the_end_than_is_asked_for(tmp_path: Path) -> None:
    """Behind a megabyte that is no row at all."""
    path = tmp_path / "j"
    with path.open("wb") as file:
        file.seek(1 << 20)
        file.write(b'\n{"a":1}\n{"a":2}\n')
    rows = read_rows_from_end(path)
    assert [next(rows), next(rows)] == [{"a": 2}, {"a": 1}]


def test_rows_are_read_from_where_another_ends(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b'{"a":1}\n{"a":2}\nxx\n')
    rows = rows_after(tmp_path / "j", 8)
    assert next(rows) == (16, {"a": 2})
    with pytest.raises(ValueError, match="j line 2 after byte 8 is damaged"):
        next(rows)
    assert list(rows_after(tmp_path / "j", 1000)) == []


class FaultyOnce(Files):
    """Fails at the first call of one primitive, once it is armed; everything works again after it, as disks do."""

    def __init__(self, name: str, error: BaseException) -> None:
        self.armed = False
        for primitive in ("write", "sync", "truncate"):
            setattr(self, primitive, self._failing(primitive, error if primitive == name else None))

    def _failing(self, name: str, error: BaseException | None) -> Any:
        def call(*args: Any) -> Any:
            if self.armed and error is not None:
                self.armed = False
                if name == "write":  # half a row gets out, as on a disk that fills up
                    Files.write(self, args[0], bytes(args[1])[:3])
                raise error
            return getattr(Files, name)(self, *args)

        return call


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["write", "sync"])
def test_rows_that_the_disk_refused_are_kept_and_durable_at_the_next_sync(tmp_path: Path, call: str) -> None:
    path = tmp_path / "j"
    files = FaultyOnce(call, FULL)
    journal = Journal.open(path, files=files)
    journal.append({"a": 1})
    journal.sync()
    journal.append({"a": 2})
    files.armed = True
    with pytest.raises(SnapshotWriteError, match="could not be written: No space left"):
        journal.sync()
    journal.append({"a": 3})
    mark = journal.mark()
    assert mark.rows == 3
    journal.sync()
    assert [row["a"] for row in read_rows(path)] == [1, 2, 3]
    assert mark.num_bytes == path.stat().st_size
    journal.append({"a": 4})
    journal.close()
    reopened = Journal.open(path)
    assert reopened.rewind(mark)
    reopened.close()
    assert [row["a"] for row in read_rows(path)] == [1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["j"]


def test_a_write_that_is_interrupted_does_not_go_out_twice(tmp_path: Path) -> None:
    files = FaultyOnce("write", Dies())
    journal = Journal.open(tmp_path / "j", files=files)
    journal.append({"a": 1})
    files.armed = True
    with pytest.raises(Dies):
        journal.sync()
    journal.sync()
    assert (tmp_path / "j").read_bytes() == b'{"a":1}\n'
    journal.close()


def test_after_a_failed_sync_the_rows_go_to_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "j"
    files = FaultyOnce("sync", OSError(errno.EIO, "Input/output error"))
    journal = Journal.open(path, files=files)
    journal.append({"a": 1})
    before = path.stat().st_ino
    files.armed = True
    with pytest.raises(SnapshotWriteError):
        journal.sync()
    journal.sync()
    assert path.stat().st_ino != before
    journal.append({"a": 2})
    journal.close()
    assert [row["a"] for row in read_rows(path)] == [1, 2]


@pytest.mark.parametrize("call", ["create", "write", "sync", "replace", "sync_directory", "open_append"])
def test_a_new_file_that_fails_too_leaves_the_rows_to_the_sync_after_it(tmp_path: Path, call: str) -> None:
    class Failing(Files):
        failing = ""

        def __getattribute__(self, name: str) -> Any:
            if name == object.__getattribute__(self, "failing"):
                raise OSError(errno.EIO, "Input/output error")
            return object.__getattribute__(self, name)

    path = tmp_path / "j"
    files = Failing()
    journal = Journal.open(path, files=files)
    journal.append({"a": 1})
    files.failing = "sync"
    with pytest.raises(SnapshotWriteError):
        journal.sync()
    files.failing = call
    journal.append({"a": 2})
    with pytest.raises(SnapshotWriteError):
        journal.sync()
    files.failing = ""
    journal.sync()
    journal.close()
    assert [row["a"] for row in read_rows(path)] == [1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["j"]


def test_rows_that_the_disk_has_lost_are_never_called_durable(tmp_path: Path) -> None:
    """The old file reads otherwise than it was written: the pages of the failed sync have been dropped."""
    path = tmp_path / "j"
    files = FaultyOnce("sync", OSError(errno.EIO, "Input/output error"))
    journal = Journal.open(path, files=files)
    journal.append({"a": 1})
    files.armed = True
    with pytest.raises(SnapshotWriteError):
        journal.sync()
    path.write_bytes(bytes(path.stat().st_size))
    for _ in range(2):
        with pytest.raises(SnapshotWriteError, match="rows that were written before are lost"):
            journal.sync()
    journal.close()


@pytest.mark.parametrize("call", ["write", "truncate", "sync"])
def test_a_rewind_that_fails_is_done_by_the_next_start(tmp_path: Path, call: str) -> None:
    files = FaultyOnce(call, OSError(errno.EIO, "Input/output error"))
    journal = Journal.open(tmp_path / "j", files=files)
    mark = journal.mark()
    journal.append({"a": 1})
    if call != "write":
        journal.flush()
    files.armed = True
    with pytest.raises(SnapshotWriteError):
        journal.rewind(mark)
    journal.close()
    journal = Journal.open(tmp_path / "j")
    assert journal.rewind(mark)
    assert journal.mark() == mark
    journal.close()


def test_a_sync_that_waits_for_one_that_fails_takes_a_new_file(tmp_path: Path) -> None:
    """The kernel tells of lost bytes once: a sync that runs beside the failing one would come back clean."""
    inside, may_fail = threading.Event(), threading.Event()

    class TellsOnce(Files):
        def __init__(self) -> None:
            self.synced: list[int] = []

        def sync(self, fd: int) -> None:
            self.synced.append(os.fstat(fd).st_ino)
            if len(self.synced) == 1:
                inside.set()
                assert may_fail.wait(10)
                raise OSError(errno.EIO, "Input/output error")

    files = TellsOnce()
    journal = Journal.open(tmp_path / "j", files=files)
    journal.append({"a": 1})
    outcomes: list[str] = []

    def sync() -> None:
        try:
            journal.sync()
            outcomes.append("durable")
        except SnapshotWriteError:
            outcomes.append("error")

    first, second = threading.Thread(target=sync), threading.Thread(target=sync)
    first.start()
    assert inside.wait(10)
    second.start()
    second.join(0.05)  # long enough to get past the first check, were there no queue
    journal.append({"a": 2})  # and training goes on meanwhile
    may_fail.set()
    first.join()
    second.join()
    assert outcomes == ["error", "durable"]
    assert files.synced[0] not in files.synced[1:]
    journal.close()
    assert [row["a"] for row in read_rows(tmp_path / "j")] == [1, 2]


def test_rows_of_one_thread_keep_their_order_while_another_syncs(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j")
    done = threading.Event()

    def sync() -> None:
        while not done.is_set():
            journal.sync()

    thread = threading.Thread(target=sync)
    thread.start()
    for number in range(2000):
        journal.append({"a": number})
    done.set()
    thread.join()
    mark = journal.mark()
    journal.close()
    assert [row["a"] for row in read_rows(tmp_path / "j")] == list(range(2000))
    assert mark.digest == digest_bytes((tmp_path / "j").read_bytes())


def test_the_name_of_a_journal_is_durable_also_if_its_maker_was_killed_before(tmp_path: Path) -> None:
    synced: list[Path] = []

    class Noting(Files):
        def sync_directory(self, path: Path) -> None:
            synced.append(path)
            super().sync_directory(path)

    (tmp_path / "j").write_bytes(b"")
    Journal.open(tmp_path / "j", files=Noting()).close()
    assert synced == [tmp_path]


def test_a_journal_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"no newline")
    (tmp_path / "j").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        Journal.open(tmp_path / "j")
    assert (tmp_path / "precious").read_bytes() == b"no newline"


def test_a_journal_that_cannot_be_opened_leaves_no_descriptor_open(tmp_path: Path) -> None:
    class Failing(Files):
        def sync_directory(self, path: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output error"):
        Journal.open(tmp_path / "j", files=Failing())
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_second_close_does_nothing(tmp_path: Path) -> None:
    """The descriptor's number may be another file's by then."""
    closed: list[int] = []

    class Noting(Files):
        def close(self, fd: int) -> None:
            closed.append(fd)
            super().close(fd)

    journal = Journal.open(tmp_path / "j", files=Noting())
    journal.append({"a": 1})
    journal.close()
    journal.close()
    assert len(closed) == 1
    assert list(read_rows(tmp_path / "j")) == [{"a": 1}]


def test_after_a_sync_that_was_interrupted_the_rows_go_to_a_new_file_too(tmp_path: Path) -> None:
    """A second Ctrl-C within the call: whether it would have failed is not known."""
    path = tmp_path / "j"
    files = FaultyOnce("sync", Dies())
    journal = Journal.open(path, files=files)
    journal.append({"a": 1})
    before = path.stat().st_ino
    files.armed = True
    with pytest.raises(Dies):
        journal.sync()
    journal.sync()
    assert path.stat().st_ino != before
    journal.close()
    assert list(read_rows(path)) == [{"a": 1}]


def test_a_journal_cut_behind_our_back_is_not_rewound_to_what_it_has_lost(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.open(path)
    journal.append({"a": 1})
    mark = journal.mark()
    os.truncate(path, 3)
    assert not journal.rewind(mark)
    assert path.stat().st_size == 3
    journal.close()


def test_a_newline_at_the_edge_of_a_chunk_ends_a_row_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_CHUNK_BYTES", 4)
    path, start = tmp_path / "j", b'{"a":1}\n{"a":22}\n'
    for num_bytes in range(12):
        path.write_bytes(start + bytes(num_bytes))
        Journal.open(path).close()
        assert path.read_bytes() == start


def test_a_rewind_that_has_nothing_to_cut_changes_and_syncs_nothing(tmp_path: Path) -> None:
    calls: list[str] = []

    class Noting(Files):
        def truncate(self, fd: int, length: int) -> None:
            calls.append("truncate")

        def sync(self, fd: int) -> None:
            calls.append("sync")

    journal = Journal.open(tmp_path / "j", files=Noting())
    journal.append({"a": 1})
    assert journal.rewind(journal.mark())
    assert calls == []
    journal.close()


def test_a_file_whose_sync_failed_is_neither_written_to_again_nor_kept_open(tmp_path: Path) -> None:
    class Noting(FaultyOnce):
        def __init__(self) -> None:
            super().__init__("sync", OSError(errno.EIO, "Input/output error"))
            self.written: list[int] = []
            write = self.write

            def noted(fd: int, data: Any) -> int:
                self.written.append(os.fstat(fd).st_ino)
                return write(fd, data)

            self.write = noted  # type: ignore[method-assign]

    files = Noting()
    journal = Journal.open(tmp_path / "j", files=files)
    journal.append({"a": 1})
    journal.flush()
    lost = (tmp_path / "j").stat().st_ino
    before = len(os.listdir("/proc/self/fd"))
    files.armed = True
    with pytest.raises(SnapshotWriteError):
        journal.sync()
    files.written.clear()
    journal.append({"a": 2})
    journal.flush()
    journal.sync()
    assert files.written
    assert lost not in files.written
    assert len(os.listdir("/proc/self/fd")) == before
    journal.close()
    assert [row["a"] for row in read_rows(tmp_path / "j")] == [1, 2]


@pytest.mark.parametrize("appends", [False, True])
def test_a_journal_of_many_rows_is_read_once_when_it_is_opened_and_rewound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appends: bool
) -> None:
    path = tmp_path / "j"
    with contextlib.closing(Journal.open(path)) as journal:
        for number in range(200_000):
            journal.append({"a": number})
        mark = journal.mark()
        journal.append({"b": 1})
    read: list[int] = []
    preadv, pread = os.preadv, os.pread

    def counted(fd: int, buffers: Any, offset: int) -> int:
        read.append(preadv(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: (read.append(size), pread(fd, size, offset))[1])
    with contextlib.closing(Journal.open(path)) as journal:
        if appends:
            journal.append({"c": 2})
        assert journal.rewind(mark)
        assert sum(read) < (2.6 if appends else 1.6) * mark.num_bytes
        assert journal.mark() == mark
        journal.append({"a": 3})
        content = path.read_bytes() + b'{"a":3}\n'
        assert journal.mark() == Mark(len(content), digest_bytes(content), 200_001)


@pytest.mark.parametrize("num_bytes", [0, 8, 11])
@pytest.mark.parametrize("rows", [0, 1, 2**40])
def test_a_mark_that_no_journal_has_given_never_leaves_half_a_line(tmp_path: Path, num_bytes: int, rows: int) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"a":1}\n{"a":2}\n')
    with contextlib.closing(Journal.open(path)) as journal:
        assert journal.rewind(Mark(num_bytes, digest_bytes(path.read_bytes()[:num_bytes]), rows))
        journal.append({"b": 3})
        journal.flush()
        found = [{"a": 1}] * (num_bytes > 0) + [{"b": 3}]
        assert list(read_rows(path)) == found
        if (num_bytes, rows) != (8, 0):  # a mark that counts too few rows is believed
            assert journal.mark().rows == len(found)


def test_a_journal_that_was_only_opened_and_closed_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"a":1}\n')
    Journal.open(path).close()
    assert path.read_bytes() == b'{"a":1}\n'


def test_rows_that_were_there_before_count_in_the_digest_of_a_journal_that_is_renewed(tmp_path: Path) -> None:
    """Nothing was appended: the sync itself must know what the file held."""
    path = tmp_path / "j"
    path.write_bytes(b'{"a":1}\n')
    files = FaultyOnce("sync", OSError(errno.EIO, "Input/output error"))
    with contextlib.closing(Journal.open(path, files=files)) as journal:
        files.armed = True
        with pytest.raises(SnapshotWriteError):
            journal.sync()
        path.write_bytes(b'{"a":7}\n')  # what the disk really holds
        with pytest.raises(SnapshotWriteError, match="lost"):
            journal.sync()
