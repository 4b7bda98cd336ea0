"""What the engine offers, under backward masking: precision, accumulation, compilation, clients, evaluation."""

import pytest
import torch

from deepspeed_sdp.plan import SubnetworkPlan
from tests.engine.cases import build_model
from tests.engine.client_cases import OPTIMIZERS, parameter_groups
from tests.engine.face_cases import evaluation_batches
from tests.engine.test_precision import FP32, bf16_simulation, update_similarity
from tests.support.compare import assert_like, assert_owners_equal, assert_same_weights, simulate

CASES = "tests.engine.feature_cases"
LAYERS = {"coverage": 0.5, "masking": "backward", "granularity": "layer"}
# Nothing but the waits of whoever reads the weights keeps them from being stale.
HALF = {
    "coverage": 0.5,
    "masking": "backward",
    "backward": {"overlap_refresh": True},
}
UNITS = pytest.mark.parametrize("sdp", [HALF, LAYERS], ids=["neuron", "layer"])


@UNITS
@pytest.mark.parametrize("how", ["no_sync", "plain", "torch"])
def test_own_accumulation(ranks4, how, sdp):
    results = ranks4.run(f"{CASES}:own_accumulation", timeout=60, how=how, stage=1, sdp=sdp)
    assert_owners_equal(results)
    module, _, norms = simulate(results[0], steps=4, sdp=sdp, ds={"clip": 1.0, "accumulation": 3})
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-5)
    assert_same_weights(results[0]["full"], module.state_dict(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["engine", "layers"])
def test_compiled(ranks4, how):
    results = ranks4.run(f"{CASES}:compiled", timeout=180, how=how, stage=2, backend="aot_eager", sdp=HALF)
    assert_owners_equal(results)
    assert_like(results, simulate(results[0], steps=3, sdp=HALF))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(ranks4, reentrant):
    results = ranks4.run(f"{CASES}:checkpointed", timeout=60, reentrant=reentrant, stage=1, sdp=HALF)
    assert_like(results, simulate(results[0], steps=3, sdp=HALF))


@pytest.mark.parametrize("stage", [0, 2])
def test_offload(ranks4, stage):
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    config = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    results = ranks4.run("tests.engine.cases:train", timeout=60, sdp=HALF, ds={**config, "clip": 1.0})
    assert_like(results, simulate(results[0], sdp=HALF, ds={"clip": 1.0}))


@UNITS
@pytest.mark.parametrize(
    "ds",
    [{"stage": 0}, {"stage": 1, "clip": 1.0}, {"stage": 2, "accumulation": 2, "bucket": 4000, **FP32}],
    ids=["stage0", "stage1-clip", "stage2-accumulate"],
)
def test_bf16_is_close_to_the_fp32_simulation(ranks4, ds, sdp):
    results = ranks4.run("tests.engine.cases:train", timeout=60, sdp=sdp, ds={**ds, "bf16": True})
    assert_owners_equal(results)
    start, module, losses, norms = bf16_simulation(results, ds, sdp=sdp)
    for rank, result in enumerate(results):
        assert result["losses"] == pytest.approx([step[rank] for step in losses], abs=0.02)
        assert result["norms"] == pytest.approx(norms, rel=0.02)
    assert update_similarity(results[0]["full"], module.state_dict(), start) > 0.99


def test_fp16_scales_the_loss_on_all_ranks_alike(ranks4):
    results = ranks4.run(f"{CASES}:fp16", timeout=60, stage=1, power=20, steps=8, clip=1.0, sdp=HALF)
    assert_owners_equal(results)
    assert results[0]["skipped"][0] == 1, "a scale of 2**20 overflows"
    assert results[0]["skipped"][-1] < 8
    assert all(result["scales"] == results[0]["scales"] for result in results)


@pytest.mark.parametrize("how", ["instance", "callable", "parameters", "late"])
@pytest.mark.parametrize("sdp", [HALF, {**LAYERS, "coverage": 0.25}], ids=["neuron", "layer"])
def test_client_groups_train_as_the_full_model(ranks4, how, sdp):
    results = ranks4.run("tests.engine.client_cases:client_train", timeout=60, how=how, stage=1, sdp=sdp)
    assert_owners_equal(results)
    module = build_model()
    optimizer = OPTIMIZERS["adamw"](parameter_groups(module))
    assert_like(results, simulate(results[0], module=module, optimizer=optimizer, sdp=sdp))


@pytest.mark.parametrize(
    ("sdp", "family"), [({**LAYERS, "coverage": 0.25}, "llama"), (HALF, "qwen3")], ids=["layer", "one_kv_head"]
)
def test_a_client_that_picks_what_requires_gradients(ranks4, sdp, family):
    model = {"num_hidden_layers": 4} if family == "llama" else {"num_key_value_heads": 1}
    values = {"sdp": sdp, "family": family, "model": model}
    results = ranks4.run("tests.engine.client_cases:client_train", timeout=60, how="picky", stage=1, **values)
    assert_owners_equal(results)
    module = build_model(family, model)
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    assert_like(results, simulate(results[0], module=module, optimizer=optimizer, sdp=sdp))


def test_a_state_dict_has_the_weights_of_the_last_step(ranks4):
    for state, full in ranks4.run("tests.engine.backward_cases:state_dict", timeout=60, sdp=HALF):
        assert set(full) <= set(state)
        assert all(torch.equal(state[name], value) for name, value in full.items())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_bad_gradient_is_named_and_changes_nothing(ranks4, stage):
    results = ranks4.run(f"{CASES}:not_finite", timeout=60, action="skip", stage=stage, masking="backward")
    for result in results:
        before, after, last = result["snapshots"][1:]
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(after[name], last[name]) for name in after)
    report = "gradients are not finite (rank 2: nan in model.layers.1.mlp.up_proj.weight"
    assert report in results[0]["log"]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_copy_that_differs_is_named(ranks4, stage):
    values = {"stage": stage, "masking": "backward"}
    healthy = ranks4.run(f"{CASES}:inconsistent", bad_rank=-1, name="", unit=0, **values)
    assert [(result["error"], result["steps"]) for result in healthy] == [(None, 6)] * 4
    plan = SubnetworkPlan.from_json(healthy[0]["plan"])
    stranger = next(rank for rank in range(4) if rank not in plan.owners("model.layers.1.mlp", 40))
    name = "model.layers.1.mlp.up_proj.weight"
    results = ranks4.run(f"{CASES}:inconsistent", bad_rank=stranger, name=name, unit=40, **values)
    for result in results:
        kind, message = result["error"]
        assert kind == "ConsistencyError"
        assert f"step 4: ranks hold different weights: unit 40 of {name} on " in message
        assert f"rank(s) {stranger}" in message


@UNITS
@pytest.mark.parametrize("stage", [0, 2])
def test_a_forward_pass_around_the_engine(ranks4, stage, sdp):
    results = ranks4.run(f"{CASES}:around_the_engine", timeout=60, stage=stage, sdp=sdp)
    module, _, norms = simulate(results[0], steps=3, sdp=sdp, ds={"accumulation": 2})
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-5)
    assert_same_weights(results[0]["full"], module.state_dict(), 1e-5)


@pytest.mark.parametrize("how", ["retain", "no_grad", "evaluate", "two_forwards"])
def test_unusual_passes(ranks4, how):
    norms = [
        ranks4.run(f"{CASES}:unusual_passes", timeout=60, how=how, stage=stage, tied=True, sdp=HALF) for stage in (0, 1)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_gradients_that_nobody_asked_for_are_dropped(ranks4):
    assert ranks4.run(f"{CASES}:left_out", timeout=60, stage=2, sdp=HALF) == [True] * 4


@pytest.mark.parametrize(
    "values",
    [
        {"ds": {"stage": 2, "bucket": 4000}, "sdp": HALF, "family": "qwen2"},
        {"ds": {"stage": 1}, "sdp": {**HALF, "coverage": 0.75}, "model": {"tie_word_embeddings": True}},
        {"ds": {"stage": 0}, "sdp": LAYERS, "model": {"attention_bias": True}},
    ],
    ids=["half-qwen2", "three_quarters-tied", "layers"],
)
def test_training_from_meta_equals_the_simulation(ranks4, values):
    start = ranks4.run("tests.engine.cases:train", timeout=60, meta=True, **{**values, "steps": 0})
    assert_owners_equal(start)
    units = {key: value for key, value in values["sdp"].items() if key in ("coverage", "granularity")}
    forward = {**values, "steps": 0, "sdp": units}
    same = ranks4.run("tests.engine.cases:train", timeout=60, meta=True, **forward)
    assert_same_weights(start[0]["full"], same[0]["full"], 0.0)
    module = build_model(values.get("family", "llama"), values.get("model"))
    module.load_state_dict(start[0]["full"])
    results = ranks4.run("tests.engine.cases:train", timeout=60, meta=True, **values)
    assert_owners_equal(results)
    assert_like(results, simulate(results[0], module=module, sdp=values["sdp"], ds=values["ds"]))


@UNITS
def test_evaluation_is_the_exported_models_loss_and_sends_no_weights(ranks4, sdp):
    counts = [3, 0, 1, 2]
    results = ranks4.run("tests.engine.face_cases:evaluate", timeout=90, counts=counts, ignored=True, sdp=sdp)
    exported = build_model()
    exported.load_state_dict(results[0]["full_then"])
    total, tokens = 0.0, 0
    with torch.no_grad():
        for rank in range(4):
            for batch in evaluation_batches(rank, counts, True):
                count = int((batch["labels"][:, 1:] != -100).sum())
                total += count * float(exported(**batch).loss) if count else 0.0
                tokens += count
    calm = ranks4.run("tests.engine.face_cases:evaluate", timeout=90, counts=counts, sdp=sdp, evaluations=0)
    for result in results:
        assert result["values"] == pytest.approx([total / tokens] * 2, abs=1e-6)
        assert result["losses"] == calm[results.index(result)]["losses"]


def test_the_folder_is_the_full_model(ranks4, tmp_path):
    folder = tmp_path / "model"
    results = ranks4.run("tests.engine.face_cases:save", timeout=90, folder=str(folder), sdp=HALF, meta=True)
    assert [result["error"] for result in results] == [None] * 4
    loaded = type(build_model()).from_pretrained(folder)
    trained = ranks4.run("tests.engine.cases:train", timeout=60, sdp=HALF, meta=True, steps=1)
    assert_same_weights(trained[0]["full"], loaded.state_dict(), 0.0)
