"""The installed DeepSpeed is what the extension builds on, and a change would be noticed."""

import ast
import inspect
import re
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from deepspeed_sdp.engine.deepspeed import contract as internals
from deepspeed_sdp.engine.engine import SDPEngine
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer


def test_the_installed_deepspeed_fits():
    assert internals.contract_violations() == []
    assert deepspeed.__version__.startswith(internals.TESTED_DEEPSPEED.rsplit(".", 1)[0])


LISTED_METHODS = [(owner, name) for owner, names in internals.METHODS.items() for name in names]


@pytest.mark.parametrize(("owner", "name"), LISTED_METHODS, ids=str)
def test_a_method_that_is_gone_is_noticed(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    assert f"{owner.__name__}.{name} is gone" in internals.contract_violations()


@pytest.mark.parametrize(("owner", "name"), [item for item in LISTED_METHODS if item[1] != "__init__"], ids=str)
def test_a_method_that_takes_other_arguments_is_noticed(monkeypatch, owner, name):
    def other():
        """self.nothing"""

    known = internals.METHODS[owner][name]
    marked = any(key == (owner, name) for key in internals.SOURCE_MARKS)
    monkeypatch.setattr(owner, name, other)
    problems = internals.contract_violations()
    assert [p for p in problems if name in p] or not (known or marked)


@pytest.mark.parametrize(
    ("owner", "method", "mark"),
    [(*place, mark) for place, marks in internals.SOURCE_MARKS.items() for mark in marks],
    ids=str,
)
def test_a_line_that_is_gone_is_noticed(monkeypatch, owner, method, mark):
    whole, target = inspect.getsource, vars(owner)[method]
    monkeypatch.setattr(
        inspect, "getsource", lambda thing: whole(thing).replace(mark, "") if thing is target else whole(thing)
    )
    assert internals.contract_violations() == [f"{owner.__name__}.{method} no longer says {mark!r}"]


@pytest.mark.parametrize("name", internals.ZERO_CONFIG_FIELDS)
def test_a_key_that_is_gone_is_noticed(monkeypatch, name):
    monkeypatch.delitem(DeepSpeedZeroConfig.model_fields, name)
    assert internals.contract_violations() == [f"zero_optimization.{name} is gone"]


def test_a_source_method_that_is_gone_is_a_message_not_a_crash(monkeypatch):
    monkeypatch.delattr(DeepSpeedEngine, "_configure_optimizer")
    assert any("_configure_optimizer" in problem for problem in internals.contract_violations())


def test_another_engine_is_noticed(monkeypatch):
    monkeypatch.setattr(deepspeed, "DeepSpeedEngine", object)
    problems = internals.contract_violations()
    assert "deepspeed.DeepSpeedEngine is not deepspeed.runtime.engine.DeepSpeedEngine" in problems


@pytest.mark.parametrize(
    ("ours", "base", "listed"),
    [
        (SDPEngine, DeepSpeedEngine, internals.ENGINE_METHODS),
        (SDPOptimizer, ZeROOptimizer, internals.OPTIMIZER_METHODS),
    ],
)
def test_everything_that_is_overridden_is_listed(ours, base, listed):
    overridden = {
        name for part in parts_of(ours) for name, value in vars(part).items() if callable(value) and hasattr(base, name)
    }
    overridden -= {name for name in overridden if hasattr(object, name) and name != "__init__"}
    missing = overridden - set(listed)
    assert not missing, f"add to internals: {sorted(missing)}"


def parts_of(ours):
    return [part for part in ours.__mro__ if part.__module__.startswith("deepspeed_sdp.")]


def attributes(base):
    """What DeepSpeed's classes define, or assign to ``self`` anywhere in their source."""
    found = set()
    for part in base.__mro__:
        if part.__module__.startswith("deepspeed."):
            found |= {*vars(part), *re.findall(r"\bself\.(\w+)(?:: [^=\n]+)? = ", inspect.getsource(part))}
    return found


def used(ours, names):
    """Attributes that engine takes of ``self`` in the classes of ``ours``, and anywhere of what has ``names``."""
    classes = {part.__name__ for part in parts_of(ours)}
    for file in sorted(Path(internals.__file__).parents[1].rglob("*.py")):
        for statement in ast.parse(file.read_text()).body:
            is_own = isinstance(statement, ast.ClassDef) and statement.name in classes
            called = {*names, "self", "super()"} if is_own else names
            for node in ast.walk(statement):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in called:
                    yield node.attr


@pytest.mark.parametrize(
    ("ours", "base", "names"),
    [
        (SDPEngine, DeepSpeedEngine, {"engine"}),
        (SDPOptimizer, ZeROOptimizer, {"optimizer", "self.optimizer", "engine.optimizer", "self._optimizer"}),
    ],
)
def test_everything_that_is_used_is_listed(ours, base, names):
    listed = set(internals.METHODS[base])
    for (owner, _), marks in internals.SOURCE_MARKS.items():
        if owner is base:
            listed |= {name for mark in marks for name in re.findall(r"^self\.(\w+) = $", mark)}
    python = {name for name in dir(object()) if name != "__init__"} | {"__dict__"}
    missing = set(used(ours, names)) & attributes(base) - listed - python
    assert not missing, f"add to internals: {sorted(missing)}"
