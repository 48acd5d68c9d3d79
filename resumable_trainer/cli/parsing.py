"""What the parsers of several commands have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["AnyOrderParser"]

_THE_REST = (argparse.REMAINDER, argparse.PARSER)


class AnyOrderParser(argparse.ArgumentParser):
    """Takes options between the arguments of a command, too: `show RUN_DIR --json best`.

    argparse gives all arguments that may be left out their defaults at the first option. Not where an argument takes
    all the rest: what follows a script belongs to the script.
    """

    _is_parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As ever."""
        takes_the_rest = any(action.nargs in _THE_REST for action in self._get_positional_actions())
        if takes_the_rest or self._is_parsing:
            return super().parse_known_args(args, namespace)
        self._is_parsing = True  # what it calls comes by here again
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_parsing = False


def add_command(
    commands: Commands, name: str, text: str, *, examples: str, description: str | None = None
) -> argparse.ArgumentParser:
    """Declare a command.

    Args:
        commands: Of the program.
        name: Of the command.
        text: What it does, in one line of the program's help.
        examples: Lines of its own help, each a call.
        description: What it does, in its own help; the line again if there is no more to say.
    """
    title = "examples" if "\n" in examples else "example"
    return commands.add_parser(
        name,
        help=text,
        description=description or f"{text[0].upper()}{text[1:]}.",
        epilog=f"{title}:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """The run that a command is about."""
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="default: the most recent run below runs/")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Whether to print for programs."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def add_looking(commands: Commands, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """Declare a command that looks at one run."""
    parser = add_command(commands, name, text, examples=examples)
    add_run_dir(parser)
    add_json(parser)
    return parser
