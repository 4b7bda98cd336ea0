"""The recipe files: complete, alike but for what their names say, and planned at their real sizes."""

import json
from fractions import Fraction

import pytest

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.pretraining.job import describe, make_job
from deepspeed_sdp.pretraining.recipe import read_recipe
from tests.support.ranks import ROOT

FOLDER = ROOT / "ds_configs" / "fineweb"
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*.json"))
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


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_takes_deepspeeds_own_optimizer(name):
    assert "torch_adam" not in json.loads((FOLDER / name).read_text())["optimizer"]["params"]


def test_the_set_is_complete_and_as_its_maker_writes_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import make_recipes

    made = {name: make_recipes.text_of(recipe) for name, recipe in make_recipes.recipes().items()}
    assert {name: (FOLDER / name).read_text() for name in FILES} == made
    for size, workers in (("134m", 8), ("500m", 8), ("1b", 8), ("15m", 4)):
        coverages = {"1_4", "3_8", "1_2", "5_8", "3_4"} if workers == 8 else {"1_2", "3_4"}
        names = {f"{m}-{g}-{c}" for m in ("forward", "backward") for g in ("neuron", "layer") for c in coverages}
        assert {name.removeprefix(f"{size}/") for name in FILES if name.startswith(f"{size}/")} == {
            f"{name}.json" for name in {*names, "dense"}
        }


@pytest.mark.parametrize("size", SHAPES)
def test_recipes_differ_in_what_their_names_say(size):
    files = {name: json.loads((FOLDER / name).read_text()) for name in FILES if name.startswith(f"{size}/")}
    blocks = {name: data.pop("subnetwork_data_parallel") for name, data in files.items()}
    assert all(data == files[f"{size}/dense.json"] for data in files.values())
    for name, block in blocks.items():
        if name.endswith("dense.json"):
            assert block == {"enabled": False}
            continue
        masking, granularity, coverage = name.removeprefix(f"{size}/").removesuffix(".json").split("-")
        assert (block["masking"], block["granularity"]) == (masking, granularity)
        assert block["coverage"] == float(Fraction(coverage.replace("_", "/")))


@pytest.mark.parametrize("name", FILES)
def test_planned_at_its_real_size(name):
    recipe = read_recipe(FOLDER / name)
    size = name.split("/")[0]
    world = recipe.sdp.num_subnetworks or 8
    job = make_job(recipe, world)
    assert all(parameter.is_meta for parameter in job.model.parameters())
    assert sum(parameter.numel() for parameter in job.model.parameters()) == sum(weights(size))
    # To half a step, its FLOPs are the dense baseline's.
    assert abs(job.length.flops - job.length.dense_flops) <= 0.5001 * job.length.tokens_per_step * job.flops.mean
    assert job.length.dense_tokens == (3e8 if name.startswith("15m") else 1e9)
    schedule = recipe.for_steps(job.length.steps)["scheduler"]["params"]
    assert schedule["total_num_steps"] == job.length.steps
    assert schedule["warmup_num_steps"] == round(0.05 * job.length.steps)
    if recipe.sdp.enabled:
        assert job.plan.summary()["connected"]
        assert job.flops.max / job.flops.mean < (1.08 if "layer" in name else 1.005)
        layers, hidden, *_ = SHAPES[size]
        # Weights, and scores and weighted values at the full length, forward and backward.
        in_layers = 6 * weights(size)[0] + 12 * layers * hidden * recipe.about.seq_length
        is_forward = recipe.sdp.masking == "forward"
        saved = (1 - recipe.sdp.coverage) * (in_layers if is_forward else 2 * weights(size)[0])
        assert job.flops.dense == in_layers + 6 * 32000 * hidden
        assert job.flops.mean == pytest.approx(job.flops.dense - saved, rel=1e-9)
    else:
        assert job.flops.mean == job.flops.dense
    assert f"{job.length.steps:,} steps" in describe(job)["length"]


def test_as_many_tokens_or_as_many_flops():
    path = FOLDER / "134m" / "forward-neuron-1_2.json"
    flops, tokens = make_job(read_recipe(path), 8), make_job(read_recipe(path, ["pretraining.match=tokens"]), 8)
    assert tokens.length.tokens == pytest.approx(1e9, rel=2e-4)
    assert flops.length.tokens == pytest.approx(1e9 * flops.flops.dense / flops.flops.mean, rel=2e-4)
    assert flops.length.steps > 1.6 * tokens.length.steps
    assert tokens.length.flops < 0.61 * tokens.length.dense_flops


@pytest.mark.parametrize("world_size", [1, 8, 16, 64])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(world_size):
    recipe = read_recipe(FOLDER / "1b" / "dense.json")
    assert recipe.micro_batches(world_size) * world_size * 4 == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["pretraining.token=1"], "pretraining.token: unknown key, got 1; takes model, seq_length, tokens"),
        (["pretraining.tokens=-1"], "pretraining.tokens: got -1"),
        (['pretraining.match="time"'], 'pretraining.match: got "time"'),
        (["pretraining.match=time"], 'pretraining.match: got "time"'),
        (["pretraining.seq_length=1"], "pretraining.seq_length: got 1"),
        (["pretraining=3"], 'has no block "pretraining"'),
        (["subnetwork_data_parallel=null"], 'has no block "subnetwork_data_parallel"'),
        (["subnetwork_data_parallel.coverag=0.5"], "did you mean 'coverage'"),
        (["train_batch_size=0"], "train_batch_size: got 0; takes a whole number from 1 on"),
        (["train_batch_size"], "--set: got 'train_batch_size'; takes KEY=VALUE"),
        (["train_batch_size.x=1"], "--set: got 'train_batch_size.x=1'; train_batch_size is no block"),
        (["=1"], "--set: got '=1'"),
        (["tokens=1e6"], "tokens: got 1000000.0; takes no such key at the top of a recipe; did you mean"),
        (["gradient_cliping=0.1"], "did you mean 'gradient_clipping'"),
        (["pretrainig.tokens=1e6"], "did you mean 'pretraining'"),
        (["gradient_accumulation_steps=3"], "gradient_accumulation_steps: got 3; takes none in a recipe"),
        (["pretraining.tokens=Infinity"], 'pretraining.tokens: got "Infinity"'),
        (["scheduler=null"], 'scheduler: got null; takes an object with "type"'),
        (["scheduler.params=null"], "scheduler.params: got null; takes an object"),
        (["scheduler.params.warmup_max_lr=auto"], 'scheduler.params.warmup_max_lr: got "auto"; takes that for'),
    ],
)
def test_a_wrong_recipe_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        read_recipe(FOLDER / "134m" / "forward-neuron-1_2.json", changes)
    assert message in str(error.value)


def test_what_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ConfigError, match='has no block "pretraining"'):
        read_recipe(tmp_path / "recipe.json")
    with pytest.raises(ConfigError, match="--recipe: cannot read"):
        read_recipe(tmp_path / "none.json")
    recipe = read_recipe(FOLDER / "134m" / "dense.json", ["pretraining.model=llama-135m"])
    with pytest.raises(ConfigError, match=r"pretraining\.model: llama-135m is no file, folder or preset"):
        make_job(recipe, 8)
    with pytest.raises(ConfigError, match=r"train_batch_size: got 256 with 6 ranks"):
        make_job(read_recipe(FOLDER / "134m" / "dense.json"), 6)
    recipe = read_recipe(FOLDER / "134m" / "forward-neuron-3_8.json", ["subnetwork_data_parallel.num_subnetworks=4"])
    with pytest.raises(ConfigError, match=r"coverage: got 0\.375 with 4 subnetworks"):
        make_job(recipe, 4)
