"""Code of others is replaced in one place, and put back."""

import ast
import sys
from pathlib import Path

from deepspeed_sdp.failures import report_uncaught
from deepspeed_sdp.patches import patch, patched

PACKAGE = Path(__file__).parents[1] / "deepspeed_sdp"


class Foreign:
    def name(self):
        return "foreign"


class Heir(Foreign):
    pass


def test_what_stood_there_is_put_back_once():
    undo = patch(Foreign, "name", lambda self: "ours")
    assert Foreign().name() == Heir().name() == "ours"
    undo()
    assert Foreign().name() == "foreign"
    with patched(Heir, "name", lambda self: "ours"):
        undo()
        assert (Foreign().name(), Heir().name()) == ("foreign", "ours")
    assert Heir().name() == "foreign"
    assert "name" not in vars(Heir)


def test_uncaught_errors_are_reported_until_that_is_undone():
    report_uncaught.cache_clear()
    before = sys.excepthook
    undo = report_uncaught()
    assert sys.excepthook is not before
    undo()
    report_uncaught.cache_clear()
    assert sys.excepthook is before


def imported(tree):
    """Names that a module has of others: modules, and classes by their capital."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("deepspeed_sdp"):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_nothing_else_is_assigned_to_what_others_made():
    found = []
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        foreign = imported(tree)
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
                targets = node.args[:1]
            for target in targets:
                of = target.value if isinstance(target, ast.Attribute) else target
                is_attribute = isinstance(target, ast.Attribute) or isinstance(node, ast.Call)
                if (
                    is_attribute
                    and isinstance(of, ast.Name | ast.Attribute)
                    and ast.unparse(of).split(".")[0] in foreign
                ):
                    found.append(f"{file.name}: {ast.unparse(node)[:80]}")
    assert not found
