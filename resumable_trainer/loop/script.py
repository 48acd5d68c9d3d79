"""Running the user's script inside this process, as `python SCRIPT` would. Free of torch."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.errors import ExitCode
from resumable_trainer.loop import heartbeat
from resumable_trainer.loop.notices import report_error

if TYPE_CHECKING:
    from resumable_trainer.loop.launch import Command


def run_script(command: Command) -> int:
    """Run the script as `python SCRIPT` would, in this process; its exit code."""
    try:
        if command.script is not None:
            sys.argv = [command.script, *command.args]
            sys.path.insert(0, str(Path(command.script).parent))
            runpy.run_path(command.script, run_name="__main__")
        else:
            assert command.module is not None
            sys.argv = [command.module, *command.args]
            sys.path.insert(0, command.cwd)
            runpy.run_module(command.module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        return _code_of(leaving)
    except BaseException as error:  # noqa: BLE001 - the edge of the process: shown, and turned into an exit code
        code = report_error(type(error), error, error.__traceback__)
        if code not in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
            heartbeat.failing(error)
        return code
    return int(ExitCode.DONE)


def _code_of(leaving: SystemExit) -> int:
    if leaving.code is None:
        return int(ExitCode.DONE)
    if isinstance(leaving.code, int):
        return leaving.code
    print(leaving.code, file=sys.stderr)  # noqa: T201 - as the interpreter does
    return 1
