"""Compiled steps as files: made by torch's C++ compilation, kept in the run directory, loaded when nothing has changed.

Policy: `compiled/<key>.step` in the run directory holds the machine code of one step. The key is a
digest of all that the code depends on: the graph with its constants, the shapes, dtypes and strides
of its inputs, the versions of torch and the C++ compiler, the processor, the thread count, torch's settings
in the environment. A file that is missing, damaged or not ours means compiling anew (about 10 s, most
of it in the C++ compiler) and nothing else; the same graph on the same machine gives the same code.

Trust: loading machine code is running it, and a run directory may come from somebody else. So each
file begins with a seal, an HMAC-SHA256 over key and code with a secret that only this user can read
(`$XDG_CACHE_HOME/resumable_trainer/compiled.secret`, 32 random bytes, made at the first use). A file that this user's
own process did not write has no valid seal, whoever owns it now and however it came here: it is not
loaded but replaced. Where the secret cannot be kept (no home, or one that others can read), nothing is
kept in the run either, and each start compiles. The bytes that were checked are the bytes that are loaded: they
are written to a private temporary directory first.

While compiling, torch keeps things of its own (precompiled headers, what the processor can do) in its
usual cache below the temporary directory (`TORCHINDUCTOR_CACHE_DIR`), with pickles of its own. That happens
only because `compile=True` was asked for; nothing of it is read from a run directory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import os
import platform
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resumable_trainer.durable.digest import reading
from resumable_trainer.durable.files import TEMPORARY_PREFIX, Files, make_directories, write_replacing
from resumable_trainer.state import generators

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

Step = Callable[[list[Tensor]], list[Tensor]]
"""A compiled step: all inputs of a graph, in its order, to its outputs; inputs are changed in place."""

SUFFIX = ".step"
_MAX_FILES = 16
_MAX_BYTES = 1 << 30
_SEAL_BYTES = hashlib.sha256().digest_size
_SECRET_BYTES = 32
_FORMAT = 1
_ENVIRONMENT = ("TORCHINDUCTOR_", "AOT_INDUCTOR_", "AOTINDUCTOR_", "OMP_", "MKL_")
_NOT_NUMBERS = ("TORCHINDUCTOR_CACHE_DIR",)


class CannotCompileError(Exception):
    """Why there is no compiled code for a graph; ends up as a line on the screen."""


def cxx() -> str | None:
    """Path of the C++ compiler that torch would use; None if there is none."""
    return _found(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"), os.environ.get("PATH"))


@functools.cache
def _found(name: str, path: str | None) -> str | None:
    return shutil.which(name, path=path)


@functools.cache
def toolchain(compiler: str) -> str:
    """Instruction set and compiler, for a person and for drift: what decides the last bits of compiled numbers."""
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)  # noqa: S603 - the C++ compiler
    version = answer.stdout.splitlines()[0] if answer.stdout else "unknown version"
    return f"{torch.backends.cpu.get_cpu_capability()}, {version}"


def key_of(graph: GraphModule, inputs: Sequence[Tensor], compiler: str) -> str:
    """Name of the compiled code: a digest of all that it depends on."""
    determinism = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    environment = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith(_ENVIRONMENT) and name not in _NOT_NUMBERS
    )
    parts = [
        _FORMAT,
        graph.code,
        [(str(t.dtype), list(t.shape), t.stride(), str(t.device)) for t in inputs],
        (torch.__version__, sys.platform, platform.machine(), _processor(), toolchain(compiler)),
        (torch.get_num_threads(), determinism, environment),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _processor() -> str:
    """Model and abilities: the code is made for exactly this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


class Artefacts:
    """The compiled steps of a run.

    Args:
        directory: `compiled/` in the run directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, key: str) -> Step | None:
        """The compiled step of this name; None if it is not here, damaged, or not sealed by this user."""
        secret = _secret()
        if secret is None:
            return None
        try:
            with reading(self._directory / f"{key}{SUFFIX}") as file:
                data = file.read(_MAX_BYTES)
        except (OSError, ValueError):  # ValueError: no plain file
            return None
        seal, code = data[:_SEAL_BYTES], data[_SEAL_BYTES:]
        if not hmac.compare_digest(seal, _seal(secret, key, code)):
            return None
        try:
            return _runner(code)
        except (CannotCompileError, OSError):
            return None

    def make(self, graph: GraphModule, inputs: Sequence[Tensor], compiler: str) -> tuple[Step, bytes]:
        """Compile; the step, and its code to be kept.

        Raises:
            CannotCompileError: torch or the C++ compiler refuses.
        """
        before = generators.capture_global()
        try:
            code = _compiled(graph, inputs, compiler)
            return _runner(code), code
        except OSError as error:
            raise CannotCompileError(f"its files cannot be written ({_first_line(error)})") from error
        finally:
            generators.restore_global(before)

    def keep(self, key: str, code: bytes) -> bool:
        """Keep code for the next start; False where that cannot be."""
        secret = _secret()
        if secret is None:
            return False
        files = Files()
        try:
            make_directories(files, self._directory)
            write_replacing(files, self._directory / f"{key}{SUFFIX}", _seal(secret, key, code) + code)
            self._make_room(files)
        except OSError:
            return False  # a full disk: the next start compiles again
        return True

    def _make_room(self, files: Files) -> None:
        """Code of earlier versions of the script goes, and what a process left that died while writing."""
        kept = sorted(self._directory.glob(f"*{SUFFIX}"), key=lambda path: path.lstat().st_mtime_ns)
        for path in [*kept[:-_MAX_FILES], *self._directory.glob(f"{TEMPORARY_PREFIX}*")]:
            files.remove_file(path)


def _seal(secret: bytes, key: str, code: bytes) -> bytes:
    return hmac.digest(secret, key.encode() + b"\0" + code, "sha256")


def _secret() -> bytes | None:
    """This user's secret, made if it is not there; None where it cannot be kept from others."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(home) / "resumable_trainer" / "compiled.secret"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _read_secret(path) or _new_secret(path)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None


def _read_secret(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(f"{path} is not this user's alone")
        secret = file.read(_SECRET_BYTES + 1)
    return secret if len(secret) == _SECRET_BYTES else None


def _new_secret(path: Path) -> bytes | None:
    """Made complete under another name, then given its own: of two processes, both read the first one's."""
    path.unlink(missing_ok=True)  # one that was cut short is of no use
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # mode 0600
        file.write(secrets.token_bytes(_SECRET_BYTES))
        file.flush()
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(file.name)
    return _read_secret(path)


def _runner(code: bytes) -> Step:
    with tempfile.TemporaryDirectory(prefix="resumable-trainer-") as directory:  # mode 0700
        path = Path(directory) / "step.so"
        path.write_bytes(code)
        try:
            loaded = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
        except (RuntimeError, AttributeError) as error:  # AttributeError: a torch that names it otherwise
            raise CannotCompileError(f"the compiled code cannot be loaded ({_first_line(error)})") from error
    run: Step = loaded.run
    return run


def _compiled(graph: GraphModule, inputs: Sequence[Tensor], compiler: str) -> bytes:
    """Machine code of a graph; deterministic, nothing is tried out and chosen by time."""
    with tempfile.TemporaryDirectory(prefix="resumable-trainer-") as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own insides
        path = Path(directory) / "step.so"
        options: dict[str, Any] = {
            "aot_inductor.output_path": str(path),
            "cpp.cxx": (compiler,),
            "compile_threads": 1,
            "max_autotune": False,
            "freezing": False,
        }
        try:
            import torch._inductor

            torch._inductor.aot_compile(graph, tuple(inputs), options=options)
        except Exception as error:
            raise CannotCompileError(f"torch cannot compile it ({_first_line(error)})") from error
        if any(b"proxy_executor_call_function(proxy_executor" in p.read_bytes() for p in path.parent.rglob("*.cpp")):
            raise CannotCompileError("it has an operation that compiled code cannot call")
        return path.read_bytes()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:200] if text else type(error).__name__
