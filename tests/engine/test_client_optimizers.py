"""Optimizers, parameter groups and schedulers that a client brings work on the subnetwork as on the full model."""

import pytest

from tests.engine.cases import build_model
from tests.engine.client_cases import OPTIMIZERS, SCHEDULERS, Stepper, parameter_groups
from tests.support.compare import assert_like, assert_owners_equal, simulate


def row(how, **values):
    name = "-".join([how, *(f"{key}_{value}" for key, value in values.items())])
    return pytest.param({"how": how, **values}, id=name)


ROWS = [
    *(row(how, stage=stage, bucket=4000) for how in ("instance", "callable", "parameters") for stage in (0, 1, 2, 3)),
    row("instance", stage=2, optimizer="adagrad", bucket=4000),
    row("callable", stage=0, optimizer="adagrad"),
    row("instance", stage=2, optimizer="adamw-fused", bucket=4000),
    row("late", stage=1),
    row("instance", stage=2, reverse=True, bucket=4000, clip=1.0),
    row("parameters", stage=1, reverse=True, family="qwen2", scheduler="warmup"),
    row("callable", stage=2, scheduler="lambda"),
    row("instance", stage=1, optimizer="sgd"),
    row("instance", stage=2, optimizer="adamw-amsgrad", bucket=4000),
    row("instance", stage=1, scheduler="warmup"),
    *(row("instance", stage=2, scheduler=scheduler) for scheduler in SCHEDULERS if scheduler != "warmup"),
]


@pytest.mark.parametrize("values", ROWS)
def test_client_groups_train_as_the_full_model(ranks4, values):
    results = ranks4.run("tests.engine.client_cases:client_train", timeout=60, **values)
    assert_owners_equal(results)
    family = values.get("family", "llama")
    module = build_model(family)
    # Groups of "parameters" bring their own lr and decay; betas and eps are the config's, which are the same.
    optimizer = OPTIMIZERS[values.get("optimizer", "adamw")](parameter_groups(module, values.get("reverse", False)))
    scheduler = SCHEDULERS[values["scheduler"]](optimizer) if "scheduler" in values else None
    ds = {key: values[key] for key in ("clip",) if key in values}
    simulated = simulate(results[0], module=module, optimizer=Stepper(optimizer, scheduler), ds=ds, family=family)
    assert_like(results, simulated)


@pytest.mark.parametrize("how", ["instance", "callable", "parameters"])
def test_client_groups_of_a_meta_model(ranks4, how):
    first, trained = (
        ranks4.run("tests.engine.client_cases:client_train", how=how, meta=True, stage=1, steps=steps)
        for steps in (0, 5)
    )
    assert_owners_equal(trained)
    module = build_model()
    module.load_state_dict(first[0]["full"])
    optimizer = OPTIMIZERS["adamw"](parameter_groups(module))
    assert_like(trained, simulate(trained[0], module=module, optimizer=optimizer))
