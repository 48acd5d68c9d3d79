"""Imports run one way, and torch stays out of what only looks. Read from the sources, not from the docs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resumable_trainer

PACKAGE = Path(resumable_trainer.__file__).parent
TORCH_FILE = PACKAGE / "snapshot" / "torch_file.py"
FLOORS = {
    "errors": 0,
    "garbage": 0,
    "durable": 1,
    "snapshot": 2,
    "state": 2,
    "data": 2,
    "metrics": 2,
    "manager": 3,
    "loop": 4,
    "trainer": 5,
    "proof": 5,
    "report": 5,
    "service": 5,
    "cli": 6,
}
TORCH_FREE = [
    "errors",
    "garbage",
    "durable.files",
    "durable.digest",
    "durable.filesystem",
    "durable.journal",
    "durable.lock",
    "durable.priority",
    "snapshot.committer",
    "snapshot.layout",
    "snapshot.manifest",
    "snapshot.strict_json",
    "snapshot.verify",
    "snapshot.store",
    "snapshot.retention",
    "snapshot.pruning",
    "snapshot.exporting",
    "snapshot.raw",
    "snapshot.ready",
    "snapshot.scribe",
    "snapshot.scribe_process",
    "snapshot.values",
    "metrics.averages",
    "metrics.early_stopping",
    "metrics.history",
    "metrics.plot",
    "loop.deadline",
    "loop.launch",
    "loop.notices",
    "loop.probe",
    "loop.script",
    "loop.triggers",
    *(f"report.{path.stem}" for path in sorted((PACKAGE / "report").glob("*.py")) if path.stem != "__init__"),
    *(f"service.{path.stem}" for path in sorted((PACKAGE / "service").glob("*.py")) if path.stem != "__init__"),
    *(f"cli.{path.stem}" for path in sorted((PACKAGE / "cli").glob("*.py")) if path.stem != "__init__"),
]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """Rooms named in any import of a source, wherever it stands."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("resumable_trainer.")}
    return rooms & FLOORS.keys()


def violations(room: str, source: str) -> list[str]:
    return [
        f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"
        for other in sorted(imported_rooms(source))
        if other != room and FLOORS[other] >= FLOORS[room]
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards_only(path: Path) -> None:
    assert violations(room_of(path), path.read_text()) == []


def test_every_room_has_its_floor() -> None:
    assert {room_of(path) for path in modules()} <= FLOORS.keys()


def test_an_import_that_runs_upwards_or_sideways_is_found() -> None:
    assert violations("durable", "from resumable_trainer.snapshot.store import Store")
    assert violations("data", "def f():\n    import resumable_trainer.state.parts")
    assert not violations("loop", "from resumable_trainer.durable import files")


@pytest.mark.parametrize("name", TORCH_FREE)
def test_a_module_that_only_looks_starts_without_torch(name: str) -> None:
    code = f"import sys, resumable_trainer.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_sorted_complete_and_few() -> None:
    names = resumable_trainer.__all__
    assert names == sorted(names, key=str)
    assert len(names) <= 25
    for name in names:
        assert getattr(resumable_trainer, name).__name__ == name


def test_nothing_in_the_package_speaks_of_pickle() -> None:
    """Loading a snapshot runs no code of whoever wrote it: the module is not even imported by name.

    One module speaks torch's own format, for `export` and `import` alone, and reads with `weights_only` set.
    """
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert "pickle" not in [*names, module], path
            if isinstance(node, ast.Attribute):
                is_torchs = node.attr in ("load", "save") and ast.unparse(node.value) == "torch"
                assert not is_torchs or path == TORCH_FILE, path


def test_what_torch_saved_is_read_with_weights_only_and_for_two_commands_alone() -> None:
    calls = [node for node in ast.walk(ast.parse(TORCH_FILE.read_text())) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert loads
    for call in loads:
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert settings.get("weights_only") == "True", ast.unparse(call)
    users = {path.stem for path in modules() if "torch_file" in path.read_text() and path != TORCH_FILE}
    assert users <= {"exporting", "importing"}


def test_only_durable_changes_names_and_syncs() -> None:
    forbidden = {"replace", "rename", "fsync", "fdatasync", "unlink", "rmdir", "rmtree"}
    for path in modules():
        if room_of(path) == "durable":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("os", "shutil")
            ):
                assert node.attr not in forbidden, f"{path}: {ast.unparse(node)}"
