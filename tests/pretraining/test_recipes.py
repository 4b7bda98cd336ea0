"""The recipe files: complete, alike but for what their names say, and planned at their real sizes."""

import json

import pytest

from deepspeed_sdp.cli import main
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.pretraining.job import describe, make_job
from deepspeed_sdp.pretraining.recipe import read_recipe, recipe_names
from tests.support.ranks import ROOT

FOLDER = ROOT / "ds_configs" / "recipes"
EIGHTHS = ("1/4", "3/8", "1/2", "5/8", "3/4")
# Layers, hidden size, MLP neurons, whether the output head is the embedding.
SHAPES = {
    "15m": (6, 288, 768, True),
    "134m": (12, 768, 2048, False),
    "500m": (22, 1280, 3456, False),
    "1b": (24, 2048, 5461, False),
}


def weights(size):
    """Numbers of weights in the layers' linears, and in embeddings, head and norms, by hand."""
    layers, hidden, neurons, is_tied = SHAPES[size]
    linears = layers * (4 * hidden * hidden + 3 * hidden * neurons)
    return linears, (1 if is_tied else 2) * 32000 * hidden + (2 * layers + 1) * hidden


METHODS = [
    (size, {"sdp.masking": masking, "sdp.granularity": granularity, "sdp.coverage": coverage})
    for size in SHAPES
    for masking in ("forward", "backward")
    for granularity in ("neuron", "layer")
    for coverage in EIGHTHS
    # Owners are whole, and more than one: nothing would tie the workers together.
    if size != "15m" or coverage in ("1/2", "3/4")
] + [(size, {"sdp.enabled": "false"}) for size in SHAPES]


def test_recipes_are_found_by_name_and_differ_in_what_their_names_say(capsys, tmp_path):
    names = ["demo", *SHAPES]
    assert recipe_names() == names
    for size in SHAPES:
        data = json.loads((FOLDER / f"{size}.json").read_text())
        assert data["model"]["path"] == f"llama-{size}"
        # DeepSpeed's own optimizer, on GPUs too.
        assert "torch_adam" not in data["deepspeed"]["optimizer"]["params"]
        assert main(["recipes", "show", size]) == 0
        assert json.loads(capsys.readouterr().out) == data
    assert main(["recipes", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
    own = tmp_path / "own.json"
    assert main(["recipes", "copy", "15m", str(own)]) == 0
    assert read_recipe(own).ds_config == read_recipe("15m").ds_config
    assert main(["recipes", "copy", "15m", str(own)]) == 1
    assert main(["recipes", "show", "16m"]) == 1
    error = "recipe: 16m is no file and no recipe; recipes are demo, 15m, 134m, 500m, 1b"
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "method"), METHODS, ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value
)
def test_planned_at_its_real_size(size, method):
    recipe = read_recipe(size, list(method.items()))
    world = recipe.sdp.num_subnetworks or 8
    job = make_job(recipe, world)
    assert all(parameter.is_meta for parameter in job.model.parameters())
    assert sum(parameter.numel() for parameter in job.model.parameters()) == sum(weights(size))
    # To half a step, its FLOPs are the dense baseline's.
    assert abs(job.length.flops - job.length.dense_flops) <= 0.5001 * job.length.tokens_per_step * job.flops.mean
    assert job.length.dense_tokens == (3e8 if size == "15m" else 1e9)
    schedule = recipe.for_steps(job.length.steps)["scheduler"]["params"]
    assert schedule["total_num_steps"] == job.length.steps
    assert schedule["warmup_num_steps"] == round(0.05 * job.length.steps)
    if recipe.sdp.enabled:
        assert job.plan.summary()["connected"]
        assert job.flops.max / job.flops.mean < (1.08 if recipe.sdp.granularity == "layer" else 1.006)
        layers, hidden, *_ = SHAPES[size]
        # Weights, and scores and weighted values at the full length, forward and backward.
        in_layers = 6 * weights(size)[0] + 12 * layers * hidden * recipe.data.seq_length
        is_forward = recipe.sdp.masking == "forward"
        saved = (1 - recipe.sdp.coverage) * (in_layers if is_forward else 2 * weights(size)[0])
        assert job.flops.dense == in_layers + 6 * 32000 * hidden
        assert job.flops.mean == pytest.approx(job.flops.dense - saved, rel=1e-9)
    else:
        assert job.flops.mean == job.flops.dense
    assert f"{job.length.steps:,} steps" in describe(job)["length"]


def test_as_many_tokens_or_as_many_flops():
    tokens = make_job(read_recipe("134m", [("length.match", "tokens")]), 8)
    flops = make_job(read_recipe("134m"), 8)
    assert tokens.length.tokens == pytest.approx(1e9, rel=2e-4)
    assert flops.length.tokens == pytest.approx(1e9 * flops.flops.dense / flops.flops.mean, rel=2e-4)
    assert flops.length.steps > 1.6 * tokens.length.steps
    assert tokens.length.flops < 0.61 * tokens.length.dense_flops


def test_a_schedule_is_counted_and_said():
    stages = "[[0.0, 0.25], [0.5, 0.5], [0.9, 1.0]]"
    job = make_job(read_recipe("134m", [("sdp.schedule.coverage_schedule", stages)]), 8)
    parts = [make_job(read_recipe("134m", [("sdp.coverage", str(c))]), 8).flops.mean for c in (0.25, 0.5, 1.0)]
    assert job.flops.mean == pytest.approx(0.5 * parts[0] + 0.4 * parts[1] + 0.1 * parts[2], rel=1e-9)
    steps = job.length.steps
    said = f"coverage 0.25 from step 0; coverage 0.5 from step {-(-steps // 2):,}; coverage 1 from step"
    assert describe(job)["changes"].startswith(said)
    block = job.run.for_steps(steps)["subnetwork_data_parallel"]
    assert block["schedule"]["total_steps"] == steps


@pytest.mark.parametrize("world_size", [1, 8, 16, 64])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(world_size):
    recipe = read_recipe("1b", [("sdp.enabled", "false")])
    assert recipe.micro_batches(world_size) * world_size * 4 == 256


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "length.token",
            "1",
            "length.token: unknown key, got 1; did you mean 'length.tokens'? takes tokens, steps, match",
        ),
        ("length.tokens", "-1", "length.tokens: got -1"),
        ("length.match", '"time"', 'length.match: got "time"'),
        ("length.match", "time", 'length.match: got "time"'),
        ("data.seq_length", "1", "data.seq_length: got 1"),
        ("deepspeed.subnetwork_data_parallel", "{}", 'takes it beside "deepspeed", not inside'),
        ("sdp", "3", "--sdp: got '3'; takes a section"),
        ("sdp.coverag", "0.5", "did you mean 'coverage'"),
        ("deepspeed.train_batch_size", "0", "train_batch_size: got 0; takes a whole number from 1 on"),
        ("deepspeed.train_batch_size.x", "1", "--deepspeed.train_batch_size.x: got '1'; deepspeed.train_batch_size is"),
        ("deepspeed.", "1", "--deepspeed.: got '1'; takes a section"),
        ("deepspeed.tokens", "1e6", "tokens: got 1000000.0; takes no such key; did you mean 'length.tokens'?"),
        ("deepspeed.gradient_cliping", "0.1", "did you mean 'deepspeed.gradient_clipping'"),
        ("lenght.tokens", "1e6", "did you mean --length.tokens?"),
        ("optimizer.params.lr", "1", "did you mean --deepspeed.optimizer.params.lr?"),
        ("length.tokens", "Infinity", 'length.tokens: got "Infinity"'),
        ("deepspeed.scheduler", "null", 'scheduler: got null; takes an object with "type"'),
        ("deepspeed.scheduler.params", "null", "scheduler.params: got null; takes an object"),
        (
            "deepspeed.scheduler.params.warmup_max_lr",
            "auto",
            'scheduler.params.warmup_max_lr: got "auto"; takes that for',
        ),
    ],
)
def test_a_wrong_recipe_is_refused(key, value, message):
    with pytest.raises(ConfigError) as error:
        read_recipe("134m", [(key, value)])
    assert message in str(error.value)


def test_what_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ConfigError, match='has no sections "model", "length" and "deepspeed"'):
        read_recipe(tmp_path / "recipe.json")
    with pytest.raises(ConfigError, match="is no file and no recipe; recipes are demo, 15m, 134m"):
        read_recipe(tmp_path / "none.json")
    recipe = read_recipe("134m", [("model.path", "llama-135m")])
    with pytest.raises(ConfigError, match=r"model\.path: llama-135m is no file, folder or preset"):
        make_job(recipe, 8)
    with pytest.raises(ConfigError, match=r"train_batch_size: got 256 with 6 ranks"):
        make_job(read_recipe("134m", [("sdp.enabled", "false")]), 6)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps 3; takes 384 "):
        make_job(read_recipe("134m", [("deepspeed.gradient_accumulation_steps", "3")]), 8)
    recipe = read_recipe("134m", [("sdp.num_subnetworks", "4"), ("sdp.coverage", "3/8")])
    with pytest.raises(ConfigError, match=r"coverage: got 0\.375 with 4 subnetworks"):
        make_job(recipe, 4)
