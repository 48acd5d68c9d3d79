"""Whether a variable steers the training, as its source text says. Pure, and free of torch.

A short examination may end before what a lost variable decides: the patience of an early stopping, a learning rate
halved every hundred steps. Such a one stands in a condition with something behind it that is more than showing.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LEAVES = (ast.Break, ast.Continue, ast.Raise, ast.Return)
_CHANGES = {"step", "load_state_dict", "requires_grad_", "zero_grad", "backward", "reset", "add_param_group"}


def steers(name: str, sources: Iterable[str]) -> bool:
    """Whether a variable or attribute of that name decides in a condition over more than what is shown or kept."""
    return any(_steers_in(ast.parse(source), name) for source in sources if _is_python(source))


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def _steers_in(tree: ast.AST, name: str) -> bool:
    return any(
        _names(node.test, name) and any(_acts(inner) for inner in _behind(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.If | ast.While)
    )


def _names(test: ast.expr, name: str) -> bool:
    return any(
        (isinstance(node, ast.Name) and node.id == name) or (isinstance(node, ast.Attribute) and node.attr == name)
        for node in ast.walk(test)
    )


def _behind(node: ast.If | ast.While) -> Iterable[ast.AST]:
    """What the condition decides over; of a branch within it, the branch's own condition is asked by itself."""
    waiting: list[ast.AST] = [*node.body, *node.orelse]
    while waiting:
        inner = waiting.pop()
        yield inner
        if not isinstance(inner, ast.If | ast.While | ast.FunctionDef):
            waiting.extend(ast.iter_child_nodes(inner))


def _acts(node: ast.AST) -> bool:
    if isinstance(node, _LEAVES):
        return True
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
    return any(isinstance(target, ast.Subscript) and _is_setting(target) for target in targets)


def _is_setting(target: ast.Subscript) -> bool:
    """`group["lr"] = ...`, and not a table of results."""
    return isinstance(target.slice, ast.Constant) and target.slice.value in _SETTINGS


_SETTINGS = {"lr", "momentum", "weight_decay", "betas", "eps", "alpha"}
