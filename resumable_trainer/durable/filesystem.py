"""What the file system below a run directory is like: its kind, its traits, its free space; who may write there.

Policy: what makes "saved" untrue (a file system in memory, syncs left out, no locks) is said before the
run starts, never refused: people have reasons. A link where the run keeps its own files is refused: through
it the run would write, or read, somewhere else.

Cost: one small file of the kernel's read at the start; one `statvfs` before each snapshot.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from resumable_trainer.durable.digest import not_a_plain_file
from resumable_trainer.errors import SettingsError

_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "beegfs"})
_WITHOUT_SHARED_LOCKS = frozenset({"nolock", "local_lock=all", "local_lock=flock", "nobrl", "localflock"})
_PER_FILE_BYTES = 8192  # a block for the tail, and its share of directory and inode tables


@dataclass(frozen=True)
class FileSystem:
    """The mount below a path.

    Attributes:
        kind: "ext4", "xfs", "tmpfs", "overlay", "nfs4", ...; "" if the system does not tell.
        mount_point: Where it is mounted.
        options: Mount options, those of the superblock included.
    """

    kind: str
    mount_point: Path
    options: frozenset[str]

    @property
    def is_in_memory(self) -> bool:
        """Whether everything on it is gone at power-off."""
        return self.kind in _IN_MEMORY

    @property
    def is_network(self) -> bool:
        """Whether other hosts see it too."""
        return self.kind in _NETWORK or self.kind.startswith("fuse.")

    @property
    def omits_syncs(self) -> bool:
        """Whether it is mounted so that syncs do nothing."""
        return bool(self.options & {"volatile", "fsync=volatile", "nobarrier", "barrier=0"})

    @property
    def locks_are_local(self) -> bool:
        """Whether a lock keeps out the processes of this host alone."""
        return self.is_network and bool(self.options & _WITHOUT_SHARED_LOCKS)


def file_system(path: Path) -> FileSystem:
    """The file system on which a path, or its nearest parent that exists, lies.

    Read from /proc/self/mountinfo (proc(5)); where there is none, the kind is "".
    """
    place = _nearest_existing(path)
    best = FileSystem("", Path("/"), frozenset())
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return best
    for line in lines:
        found = _mount(line)
        # The last of equals is the one mounted on top.
        if place.is_relative_to(found.mount_point) and len(found.mount_point.parts) >= len(best.mount_point.parts):
            best = found
    return best


def _mount(line: str) -> FileSystem:
    before, _, after = line.partition(" - ")
    fields, tail = before.split(" "), after.split(" ")
    point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])  # a space is \040
    options = {*fields[5].split(","), *(tail[2].split(",") if len(tail) > 2 else ())}
    return FileSystem(tail[0], Path(point), frozenset(options))


def _nearest_existing(path: Path) -> Path:
    place = path.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


@dataclass(frozen=True)
class Room:
    """Space left for this process.

    Attributes:
        num_bytes: Free bytes; None if the file system does not count them.
        files: Free file entries; None if it does not count them.
    """

    num_bytes: int | None
    files: int | None

    def holds(self, *, num_bytes: int, files: int) -> bool:
        """Whether that many more bytes in that many new files and directories fit, as far as is known."""
        needed = bytes_on_disk(num_bytes, files=files)
        return (self.num_bytes is None or needed <= self.num_bytes) and (self.files is None or files <= self.files)


def bytes_on_disk(num_bytes: int, *, files: int) -> int:
    """What so many bytes in so many new files take at most, block rounding and directory entries included."""
    return num_bytes + files * _PER_FILE_BYTES


def room(path: Path) -> Room:
    """Space left below a directory.

    Raises:
        OSError: It cannot be asked, for example because the directory is gone.
    """
    found = os.statvfs(path)
    is_root = os.geteuid() == 0  # may use the blocks kept back for it
    blocks, entries = (found.f_bfree, found.f_ffree) if is_root else (found.f_bavail, found.f_favail)
    # Some file systems (FUSE, btrfs for entries) report nothing at all; that is not "full".
    return Room(blocks * found.f_frsize if found.f_blocks else None, entries if found.f_files else None)


def shortage(path: Path, found: Room, *, num_bytes: int, files: int) -> str:
    """What is missing where `found` does not hold so many bytes in so many new files, for a person."""
    place = file_system(path)
    needed, where = bytes_on_disk(num_bytes, files=files), f"on {place.mount_point} ({place.kind})"
    if found.num_bytes is not None and needed > found.num_bytes:
        return f"it needs {needed:,} bytes, {found.num_bytes:,} are free {where}"
    return f"it needs {files} file entries, {found.files} are free {where}"


def warnings(path: Path) -> list[str]:
    """Lines for a person on what makes a run in this directory less than durable or less than safe."""
    place = file_system(path)
    lines = []
    if place.is_in_memory:
        lines.append(f"{path} lies in memory ({place.kind}): kills are survived, a reboot takes all of it")
    if place.omits_syncs:
        lines.append(f"{path} lies on a file system whose syncs are off ({place.kind}): power loss may take it all")
    elif place.kind == "overlay":
        lines.append(f"{path} lies in a container's own layer (overlay) and goes with it: mount a volume")
    if place.locks_are_local:
        lines.append(f"{path} lies on {place.kind} without shared locks: never start this run on two hosts at once")
    if "eatmydata" in os.environ.get("LD_PRELOAD", ""):
        lines.append("libeatmydata is preloaded: nothing is synced, power loss may take everything")
    return lines + _strangers(path)


def _strangers(path: Path) -> list[str]:
    """Who else may put files, and links, into a directory."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return []
    lines = []
    if found.st_mode & stat.S_IWOTH:
        lines.append(f"{path} may be written by everybody on this machine (mode {stat.S_IMODE(found.st_mode):o})")
    if found.st_uid not in (os.geteuid(), 0):
        lines.append(f"{path} belongs to another user (id {found.st_uid}), who can change what this run keeps there")
    return lines


def refuse_links(directory: Path, names: tuple[str, ...]) -> None:
    """Make sure that a run's own files and directories are just that.

    The run directory itself may be a link, to a larger disk for example.

    Args:
        directory: The run directory.
        names: What the run keeps in it; those that are not there yet are fine.

    Raises:
        SettingsError: One is a link, a file that has a second name somewhere, a FIFO, a device or the like; all of
            them at once.
    """
    problems = []
    for name in names:
        try:
            found = os.lstat(directory / name)
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(found.st_mode):
            problems.append(f"{name} is a symbolic link to {os.readlink(directory / name)}")
        elif stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
            problems.append(f"{name} has {found.st_nlink} names (hard links)")
        elif not stat.S_ISDIR(found.st_mode) and (problem := not_a_plain_file(directory / name, found)) is not None:
            problems.append(f"{name} {problem}")
    if problems:
        raise SettingsError(
            f"run directory {directory} is refused: " + "; ".join(problems) + " - a run would write through it",
            path=directory,
            found=problems,
            expected="plain files and directories",
            hint="put a copy in its place; to keep a run on another disk, link the whole run directory",
        )
