"""The block ``schedule``: which plan there is after how many steps."""

from typing import Any

from deepspeed_sdp.agreement import agreed, from_first_rank
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.deepspeed.settings import Settings
from deepspeed_sdp.engine.state.repartition import check_memory, placed, recut_as, repartition
from deepspeed_sdp.plan import SubnetworkPlan


def check_schedule(engine: Any) -> None:
    """Collective. Before the first step: whether there is a plan, and memory, for every stage of the schedule.

    Raises:
        ConfigError, PlanError: there is not; on every rank.
    """
    for coverage, _ in engine.sdp_config.schedule.stages()[1:]:
        sdp = engine.sdp_config.model_copy(update={"coverage": coverage})
        _check_stage(engine, coverage, sdp)


def _check_stage(engine: Any, coverage: float, sdp: SDPConfig) -> None:
    old, groups = engine._subnetwork, engine._owner_groups
    plan, workers = from_first_rank(lambda: placed(None, old, sdp, groups))
    engine._scheduled_plans.setdefault(coverage, plan)

    def check() -> None:
        made = recut_as(old, plan, workers[groups.rank], sdp, old.group_of)
        check_memory(engine, made, Settings.of(engine, sdp))

    agreed(check)


def follow_schedule(engine: Any, step: int) -> None:
    """Collective. Be what the block's ``schedule`` says after ``step`` steps."""
    schedule = engine.sdp_config.schedule
    coverage, interval = schedule.coverage_at(step), schedule.resample_interval
    at = coverage, step // interval if interval else 0
    if at == engine._scheduled_at:
        return
    sdp: SDPConfig = engine.sdp_config
    if coverage is not None:
        sdp = sdp.model_copy(update={"coverage": coverage})
    plans: dict[float | None, SubnetworkPlan] = engine._scheduled_plans
    repartition(engine, plans[coverage].resampled(at[1], schedule.resample), sdp, schedule.moments)
    engine.__dict__["_scheduled_at"] = at
