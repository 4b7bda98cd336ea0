"""The installed DeepSpeed is what the extension builds on, and a change would be noticed."""

import deepspeed
import pytest
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

from deepspeed_sdp.engine import internals
from deepspeed_sdp.engine.engine import SDPEngine
from deepspeed_sdp.engine.optimizer import SDPOptimizer


def test_the_installed_deepspeed_fits():
    assert internals.contract_violations() == []
    assert deepspeed.__version__.startswith(internals.TESTED_DEEPSPEED.rsplit(".", 1)[0])


@pytest.mark.parametrize(
    ("owner", "name"),
    [(DeepSpeedEngine, name) for name in internals.ENGINE_METHODS if name != "__init__"]
    + [(ZeROOptimizer, name) for name in internals.OPTIMIZER_METHODS if name != "__init__"],
)
def test_a_method_that_takes_other_arguments_is_noticed(monkeypatch, owner, name):
    def other():
        """self.nothing"""

    known = {**internals.ENGINE_METHODS, **internals.OPTIMIZER_METHODS}[name]
    marked = any(key == (owner, name) for key in internals.SOURCE_MARKS)
    monkeypatch.setattr(owner, name, other)
    problems = internals.contract_violations()
    assert [p for p in problems if name in p] or not (known or marked)


def test_a_method_that_is_gone_is_noticed(monkeypatch):
    monkeypatch.delattr(ZeROOptimizer, "enter_backward")
    monkeypatch.delattr(DeepSpeedEngine, "_backward_prologue")
    problems = internals.contract_violations()
    assert "ZeROOptimizer.enter_backward is gone" in problems
    assert "DeepSpeedEngine._backward_prologue is gone" in problems


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
    overridden = {name for name, value in vars(ours).items() if callable(value) and hasattr(base, name)}
    overridden -= {name for name in overridden if hasattr(object, name) and name != "__init__"}
    missing = overridden - set(listed)
    assert not missing, f"add to internals: {sorted(missing)}"
