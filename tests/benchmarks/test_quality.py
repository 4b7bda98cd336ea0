"""The simulation behind ``make bench-quality`` equals the reference simulator, and so the distributed engine."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.quality import tables
from benchmarks.quality.apart import Apart, Outer
from benchmarks.quality.methods import SIZES
from benchmarks.quality.ownership import (
    Ownership,
    dropped_blocks,
    flops_per_token,
    make_plan,
    ownership_of,
    parse_sdp,
)
from benchmarks.quality.run import QUICK, main
from benchmarks.quality.simulated_llama import SimulatedLlama
from benchmarks.quality.training import Method, Phase, simulate_step, train
from deepspeed_sdp.plan import SubnetworkPlan
from tests.support import oracle
from tests.support.compare import EPS, LR, SCALES, WEIGHT_DECAY, adamw, assert_same_weights
from tests.support.models import tiny_model, token_batches

STEPS, CLIP = 4, 1.0
HALF, MOST = {"coverage": 0.5}, {"coverage": 0.75}  # of 4 workers: teams, and a worker with several chunks
BLOCK, BRANCH = {"granularity": "layer"}, {"granularity": "branch"}
BACKWARD = {"masking": "backward"}


def simulate(model, plan, sdp, batches, **options):
    """Losses ``[step][worker]`` and norms of the simulation, which trains ``model``."""
    simulation, optimizer = SimulatedLlama(model), adamw(model)
    ownership = ownership_of(model, plan, sdp) if plan else Ownership(len(batches[0]))
    losses, norms = [], []
    for step in batches:
        ids_NBT = torch.stack([micro_batches[0] for micro_batches in step])
        found, norm = simulate_step(simulation, optimizer, ids_NBT, ownership, **options)
        losses.append(found.tolist())
        norms.append(float(norm))
    return losses, norms


def reference(model, plan, sdp, batches, clip=CLIP):
    """The same by the reference simulator."""
    power = SCALES[sdp.output_scaling] if sdp.masking == "forward" else 0.0
    return oracle.train(
        model,
        oracle.unit_owners_of(plan, blocks=sdp.block_unit is not None),
        plan.num_subnetworks,
        batches,
        adamw(model),
        clip=clip,
        scale=plan.coverage**-power,
        masking=sdp.masking,
    )


@pytest.mark.parametrize(
    "block",
    [
        *({**units, **share} for units, share in itertools.product(({}, BLOCK, BRANCH), (HALF, MOST))),
        *({**units, **share, **BACKWARD} for units, share in itertools.product(({}, BLOCK, BRANCH), (HALF, MOST))),
        {**HALF, "output_scaling": "none"},
        {**MOST, **BLOCK, "output_scaling": "inverse_coverage"},
        {**HALF, "partition": ["mlp"]},
        {**HALF, "plan": {"design": "cyclic"}},
        {"coverage": 0.25, "shared_modules": ["model.layers.0"]},
    ],
    ids=lambda block: "-".join(f"{value}" for value in block.values()),
)
def test_the_simulation_equals_the_reference(block):
    sdp, batches = parse_sdp(block), token_batches(STEPS, 4)
    plan = make_plan(tiny_model(meta=True), sdp, 4)
    ours, theirs = tiny_model(), tiny_model()
    losses, norms = simulate(ours, plan, sdp, batches)
    expected_losses, expected_norms = reference(theirs, plan, sdp, batches)
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected_losses), rtol=0, atol=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_same_weights(ours.state_dict(), theirs.state_dict(), 1e-5)
    assert min(norms) > CLIP, "the clip value must clip"


def test_dense_training_equals_the_reference():
    sdp, batches = parse_sdp({"coverage": 1.0}), token_batches(STEPS, 4)
    ours, theirs = tiny_model(), tiny_model()
    losses, _ = simulate(ours, None, sdp, batches)
    expected, _ = reference(theirs, make_plan(tiny_model(meta=True), sdp, 4), sdp, batches)
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-5)
    assert_same_weights(ours.state_dict(), theirs.state_dict(), 1e-5)


@pytest.mark.parametrize("outer", [None, Outer(0.7, 0.9)])
@pytest.mark.parametrize("block", [{"coverage": 1.0}, HALF, MOST], ids=str)
def test_local_steps_equal_the_reference(block, outer):
    batches = token_batches(6, 4)
    model, sdp = tiny_model().double(), parse_sdp(block, seed=0, seq_length=12)
    plan = make_plan(model, sdp, 4)
    options = {"weight_decay": WEIGHT_DECAY, "eps": EPS}
    apart = Apart(model, plan, sdp, 2, outer, LR, CLIP, **options)
    losses = [apart.step(torch.stack([micro[0] for micro in step])).tolist() for step in batches]
    expected = tiny_model().double()
    found, _ = oracle.train_apart(
        expected,
        oracle.unit_owners_of(plan),
        4,
        batches,
        adamw,
        2,
        None if outer is None else {"lr": outer.lr, "momentum": outer.momentum, "nesterov": True},
        clip=CLIP,
        scale=plan.coverage ** -SCALES[sdp.output_scaling],
    )
    assert np.array(losses) == pytest.approx(np.array(found), abs=1e-6)
    assert_same_weights(model.state_dict(), expected.state_dict(), 1e-6)


def test_shuffled_plans_keep_every_owner_count():
    sdp = parse_sdp(HALF)
    model = tiny_model(intermediate_size=64)
    plan = make_plan(model, sdp, 4)
    plain, shuffled = ownership_of(model, plan, sdp), ownership_of(model, plan, sdp, shuffle=3)
    name = "model.layers.1.mlp"
    assert shuffled.counts[f"{name}.up_proj.weight"].flatten().tolist() == [2.0] * 64
    units = [ownership.parts[name].units_SU.sort(1).values for ownership in (plain, shuffled)]
    assert units[0].shape == units[1].shape
    assert not torch.equal(*units), "other neurons lie together"
    assert sorted(units[1].flatten().tolist()) == list(range(64)), "and the teams still have all of them"


def test_one_split_for_all_layers():
    model = tiny_model(intermediate_size=64, num_hidden_layers=4)
    plan = make_plan(model, parse_sdp(HALF), 4, same_split=True)
    assert len({tuple(chunk.owner_set for chunk in planned.chunks) for planned in plan.spaces}) == 1
    assert plan.spectral_gap == pytest.approx(0.0, abs=1e-9)
    assert flops_per_token(plan) == pytest.approx(flops_per_token(make_plan(model, parse_sdp(HALF), 4)))


def test_dropped_branches_fade_in_with_depth():
    generator = torch.Generator().manual_seed(0)
    draws = [dropped_blocks(2, 4, (0.0, 0.5), generator) for _ in range(200)]
    first = [draw.blocks["model.layers.0.mlp"] for draw in draws]
    last = [draw.blocks["model.layers.1.self_attn"] for draw in draws]
    assert all(block.owners == (0, 1, 2, 3) and block.scale == 1.0 for block in first)
    assert sum(len(block.owners) for block in last) == pytest.approx(400, abs=80)
    assert {block.scale for block in last} == {2.0}
    model = tiny_model()
    losses = SimulatedLlama(model).losses(
        torch.zeros(4, 2, 12, dtype=torch.long), dropped_blocks(3, 4, (0, 0.4, 0.8), generator)
    )
    assert losses.isfinite().all()


SMOKE = replace(SIZES["smoke"], dense_steps=16)
TEXT = np.random.default_rng(0).integers(0, SMOKE.vocab // 8, (300, SMOKE.length), dtype=np.int32)


def smoke(method):
    return train(method, SMOKE, TEXT, TEXT[:8], lr=1e-2, seed=0, equal="flops")


@pytest.fixture(scope="module")
def dense_run():
    return smoke(Method())


@pytest.mark.parametrize(
    "method",
    [
        Method(HALF, last=Phase(0.5, {"coverage": 1.0})),
        Method(stochastic_depth=0.4, dropout=0.1),
        Method(HALF, resample_interval=2, partitioned_lr=0.5),
        Method(HALF, last=Phase(0.3, {"coverage": 1.0}, only_norms=True)),
    ],
    ids=["dense_at_the_end", "stochastic_depth", "resampled", "norms_at_the_end"],
)
def test_a_training_takes_the_flops_of_the_dense_one(dense_run, method):
    run = smoke(method)
    assert run["flops_per_worker"] == pytest.approx(dense_run["flops_per_worker"], rel=0.05)
    assert run["steps"] > dense_run["steps"]
    assert run["flop_ratio"] < 0.95 < dense_run["flop_ratio"]
    assert run["loss"] < 6.1, "it learns which eighth of the 512 tokens occurs: log(512) = 6.24, log(64) = 4.16"


@pytest.mark.slow
@pytest.mark.parametrize("block", [HALF, {**MOST, **BLOCK}, {**HALF, **BACKWARD}, {**HALF, **BRANCH, **BACKWARD}])
def test_the_simulation_equals_the_engine(ranks4, block):
    results = ranks4.run("tests.engine.cases:train", timeout=120, sdp=block, ds={"stage": 1, "clip": CLIP}, steps=STEPS)
    plan = SubnetworkPlan.from_json(results[0]["plan"])
    ours = tiny_model()
    losses, norms = simulate(ours, plan, parse_sdp(block), token_batches(STEPS, 4))
    for rank, result in enumerate(results):
        assert result["losses"] == pytest.approx([step[rank] for step in losses], abs=1e-5)
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-5)
    assert_same_weights(results[0]["full"], ours.state_dict(), 1e-5)


@pytest.mark.slow
def test_a_quick_sweep_leaves_its_tables(tmp_path, capsys):
    arguments = ["--quick", "--output", str(tmp_path / "quality.jsonl"), "--data", str(tmp_path / "data")]
    main(arguments)
    finished = (tmp_path / "quality.jsonl").read_text()
    main(arguments)
    assert (tmp_path / "quality.jsonl").read_text() == finished, "what is there is not run again"
    capsys.readouterr()
    summary, picture = tmp_path / "quality.json", tmp_path / "quality.png"
    tables.main(["--results", arguments[2], "--size", "smoke", "--summary", str(summary), "--plot", str(picture)])
    printed = capsys.readouterr().out
    report = json.loads(summary.read_text())
    assert {row["name"] for row in report["rows"]} == set(QUICK)
    assert all(f"| {row['name']} |" in printed for row in report["rows"] if not row["parent"])
    half = next(row for row in report["rows"] if row["name"] == "forward, neurons, 1/2")
    assert half["preset_state_ratio"]["0"] < 0.6
    assert picture.stat().st_size > 10_000
