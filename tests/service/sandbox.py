"""A real systemd in namespaces of its own; see `sandbox.sh`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "sandbox.sh"
_NEEDED = ("systemctl", "dbus-daemon", "unshare", "nsenter", "setpriv", "findmnt", "pgrep")


def lacking() -> str | None:
    """Why there can be no sandbox here; None if it can be tried."""
    if os.geteuid() != 0:
        return "a systemd in a namespace needs root"
    if Path(sys.prefix).is_relative_to("/tmp"):  # noqa: S108 - looked at, not written to
        return "the interpreter lies in /tmp, of which every unit has its own"
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing or not Path("/lib/systemd/systemd").exists():
        return f"a systemd in a namespace needs Debian's systemd, dbus, util-linux, procps ({', '.join(missing)})"
    return None


class Sandbox:
    """A booted system; everything in it vanishes with `stop`."""

    def __init__(self, name: str) -> None:
        self._environment = {**os.environ, "SANDBOX": f"/run/{name}-{os.getpid()}"}
        done = subprocess.run([SCRIPT, "start"], env=self._environment, capture_output=True, text=True, check=False)
        self.failure = f"systemd did not boot in a namespace: {done.stdout[-300:]}" if done.returncode else None

    def sh(self, *command: str, timeout: float = 120, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command inside, in no particular environment."""
        inside = [str(SCRIPT), "sh", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
        return subprocess.run(
            [*inside, *command],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            input=text,
            check=False,
            start_new_session=True,  # signals in there reach nobody out here
        )

    def write(self, path: str, text: str) -> None:
        """Write a file inside."""
        self.sh("mkdir", "-p", str(Path(path).parent))
        done = self.sh("tee", path, text=text)
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        """End every process inside, and leave nothing."""
        subprocess.run([SCRIPT, "stop"], env=self._environment, capture_output=True, check=True, timeout=60)
