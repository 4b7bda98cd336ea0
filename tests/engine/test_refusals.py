"""What cannot work is refused at start, in words, on every rank alike, and without a hang."""

import pytest

from deepspeed_sdp.engine.deepspeed import refusals as support

CASE = "tests.engine.error_cases:refused"


def row(name, error, *words, **arguments):
    return pytest.param(arguments, error, words, id=name)


SDP_ROWS = [
    row(
        "unknown_key",
        "ConfigError",
        "subnetwork_data_parallel.coverag: unknown key",
        "did you mean 'coverage'",
        sdp={"coverag": 1},
    ),
    row(
        "no_whole_owners",
        "ConfigError",
        "coverage: got 0.4 with 4 subnetworks",
        "1.6 owners",
        "1/4, 1/2, 3/4, 1",
        sdp={"coverage": 0.4},
    ),
    row(
        "default_no_whole_owners", "ConfigError", "got 0.5 (the default) with 1 subnetworks", sdp={"num_subnetworks": 1}
    ),
    row(
        "no_divisor",
        "ConfigError",
        "num_subnetworks: got 3 with a world size of 4",
        "1, 2, 4",
        sdp={"num_subnetworks": 3},
    ),
    row(
        "too_many_owners",
        "ConfigError",
        'coverage: got "5/4"; takes a number above 0 and up to 1',
        sdp={"coverage": "5/4"},
    ),
    row("owners", "ConfigError", 'owners_per_unit: unknown key, got 2; takes "coverage"', sdp={"owners_per_unit": 2}),
    row(
        "backward_at_stage_3",
        "ConfigError",
        'masking: got "backward" with ZeRO stage 3; takes stage 0, 1 or 2',
        sdp={"masking": "backward"},
        ds={"zero_optimization.stage": 3},
    ),
    row(
        "scaled_backward",
        "ConfigError",
        'output_scaling: got "inverse_coverage" with masking "backward"; takes "none"',
        sdp={"masking": "backward", "output_scaling": "inverse_coverage"},
    ),
    row(
        "overlap_of_nothing",
        "ConfigError",
        'overlap_refresh: got true with masking "forward"; takes masking "backward"',
        sdp={"backward": {"overlap_refresh": True}},
    ),
    row(
        "recomputed_neurons",
        "ConfigError",
        'recompute_frozen: got true with masking "backward" and granularity "neuron"',
        sdp={"masking": "backward", "backward": {"recompute_frozen": True}},
    ),
    row("no_optimizer", "ConfigError", "optimizer: got none", ds={"optimizer": False}),
    row(
        "local_steps",
        "ConfigError",
        "zero_optimization.stage: got 1 with local steps",
        "takes 0 there",
        sdp={"schedule": {"sync_interval": 2}},
        ds={"stage": 1},
    ),
    row(
        "a_schedule_without_an_end",
        "ConfigError",
        "schedule.total_steps: got nothing with coverage_schedule",
        sdp={"schedule": {"coverage_schedule": [[0.0, 0.5]]}},
    ),
    row(
        "a_later_stage_that_is_no_plan",
        "ConfigError",
        "coverage: got 0.4 with 4 subnetworks",
        sdp={"schedule": {"coverage_schedule": [[0.0, 0.5], [0.5, 0.4]], "total_steps": 9}},
    ),
    row(
        "no_such_module",
        "ConfigError",
        "shared_modules: got 'model.layer.0'",
        sdp={"shared_modules": ["model.layer.0"]},
    ),
    row("all_shared", "ConfigError", "shares every unit", sdp={"shared_modules": ["model.layers.*"]}),
    row(
        "all_to_all_at_stage_0",
        "ConfigError",
        'transport: got "all_to_all" with ZeRO stage 0',
        sdp={"comm": {"transport": "all_to_all"}},
        ds={"zero_optimization.stage": 0},
    ),
    row(
        "offload_param_at_stage_2",
        "ConfigError",
        'offload_param: got "cpu" with ZeRO stage 2',
        ds={"zero_optimization.stage": 2, "zero_optimization.offload_param.device": "cpu"},
    ),
    row("no_batch", "ConfigError", "train_batch_size: got nothing", ds={"train_micro_batch_size_per_gpu": None}),
    row(
        "batch_of_other_ranks",
        "ConfigError",
        "train_batch_size: got 6 with 4 rank(s), train_micro_batch_size_per_gpu ",
        "the product of the others",
        ds={"train_batch_size": 6},
    ),
    row(
        "no_number",
        "ConfigError",
        "train_batch_size: got 'many'; takes a whole number",
        ds={"train_batch_size": "many"},
    ),
    row(
        "few_sets",
        "PlanError",
        "max_owner_sets",
        sdp={"coverage": 0.5, "plan": {"max_owner_sets": 1}},
    ),
    row("no_block", "ConfigError", "no SDP block", kind="no_block"),
    row("two_blocks", "ConfigError", "two SDP blocks", kind="two_blocks"),
    row("no_config", "ConfigError", "config: got nothing", kind="no_config"),
    row("no_model", "ConfigError", "model: got NoneType", kind="no_model"),
    row("bloom", "ModelError", "no adapter knows BloomForCausalLM", "Llama", "Mistral", "Qwen2", "GPT2", kind="bloom"),
    row("linear", "ModelError", "no adapter knows Linear", kind="linear"),
    row("half_meta", "ModelError", "model.norm.weight is on the meta device", kind="half_meta"),
    row("mpu", "ConfigError", "mpu: model parallelism", kind="mpu"),
    row("stepped_optimizer", "ConfigError", "optimizer: has state already", kind="stepped"),
    row(
        "foreign_optimizer",
        "ConfigError",
        "optimizer: a parameter of shape [97, 32] is not the model's",
        kind="foreign_optimizer",
    ),
    row("foreign_parameter", "ConfigError", "optimizer: a parameter of shape [3]", kind="foreign_parameter"),
    row("muon", "ConfigError", "optimizer: got Muon", ds={"optimizer.type": "Muon"}),
    row("missing_file", "ConfigError", "sdp_config: cannot read /nowhere/sdp.json", kind="file:/nowhere/sdp.json"),
    row(
        "missing_ds_file",
        "ConfigError",
        "deepspeed_config: cannot read /nowhere/ds.json",
        kind="ds_file:/nowhere/ds.json",
    ),
]

# A value that is refused for every row of engine/deepspeed/refusals.py.
REFUSED = {
    "zero_optimization.stage": 4,
    "zero_optimization.offload_optimizer.device": "nvme",
    "zero_optimization.offload_param.device": "nvme",
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "zero_optimization.zero_hpz_partition_size": 2,
    "zero_optimization.offload_optimizer.ratio": 0.5,
    "gradient_predivide_factor": 2.0,
    "gradient_allreduce_op": "sum",
    "tensor_parallel.autotp_size": 2,
    "sequence_parallel_size": 2,
}


@pytest.mark.parametrize(("arguments", "error", "words"), SDP_ROWS)
def test_an_unusable_job_is_refused(ranks4, arguments, error, words):
    check(ranks4.run(CASE, timeout=40, **arguments), error, words)


@pytest.mark.parametrize(("key", "reason"), [(key, reason) for key, _, reason in support._REFUSED], ids=str)
def test_what_deepspeed_offers_and_sdp_does_not_is_refused(ranks4, key, reason):
    value = REFUSED.get(key, True)
    check(
        ranks4.run(CASE, timeout=40, ds={key: value}),
        "ConfigError",
        [f"DeepSpeed config: {key}: got {value!r}", reason],
    )


ONE_RANK = [
    row(
        "sdp_key",
        "ConfigError",
        "ranks disagree on subnetwork_data_parallel.plan.seed: rank 0 has 0, rank 2 has 5",
        rank=2,
        only={"sdp": {"plan": {"seed": 5}}},
    ),
    row(
        "ds_key",
        "ConfigError",
        "ranks disagree on deepspeed_config.optimizer.params.lr: rank 0 has 0.001, rank 3 has 0.5",
        rank=3,
        only={"ds": {"optimizer.params.lr": 0.5}},
    ),
    row(
        "ds_key_missing",
        "ConfigError",
        "deepspeed_config.wall_clock_breakdown",
        "rank 0 has nothing, rank 1 has true",
        rank=1,
        only={"ds": {"wall_clock_breakdown": True}},
    ),
    row(
        "rank_0",
        "ConfigError",
        "ranks disagree on deepspeed_config.gradient_clipping: rank 0 has 9.0, rank 1 has 0.0",
        rank=0,
        only={"ds": {"gradient_clipping": 9.0}},
    ),
    row(
        "bad_key",
        "ConfigError",
        "rank 1: subnetwork_data_parallel.covrage: unknown key",
        rank=1,
        only={"sdp": {"covrage": 1}},
    ),
    row(
        "bad_stage",
        "ConfigError",
        "rank 3: DeepSpeed config: zero_optimization.stage: got 4",
        rank=3,
        only={"ds": {"zero_optimization.stage": 4}},
    ),
    row("other_model", "ModelError", "rank 2: model: no adapter knows BloomForCausalLM", rank=2, kind="bloom"),
    row(
        "other_width",
        "ConfigError",
        "ranks disagree on model_config.intermediate_size: rank 0 has 53, rank 1 has 60",
        rank=1,
        kind="other_width",
    ),
    row("more_layers", "ConfigError", "ranks disagree on", "rank 1", rank=1, kind="one_layer_more"),
    row("missing_file", "ConfigError", "rank 1: sdp_config: cannot read", rank=1, kind="file:/nowhere/sdp.json"),
    row("meta", "ConfigError", "ranks disagree on", "rank 2", "meta", rank=2, kind="meta"),
    row("hook", "ModelError", "rank 1: model: model.layers.1 has a forward hook, ", rank=1, kind="hook"),
    row("rope", "ModelError", "rank 3: model: model.rotary_emb.inv_freq, a buffer that is", rank=3, kind="rope"),
    row("compiled", "ModelError", "rank 1: model: got one that torch.compile wraps", rank=1, kind="compiled"),
    row("half_meta", "ModelError", "rank 1: model: model.norm.weight is on the meta device", rank=1, kind="half_meta"),
    row("no_model", "ConfigError", "rank 0: model: got NoneType", rank=0, kind="no_model"),
    row(
        "stepped", "ConfigError", "ranks disagree on optimizer: rank 0 has nothing, rank 2 has", rank=2, kind="stepped"
    ),
    row(
        "other_groups",
        "ConfigError",
        "ranks disagree on model_parameters: rank 0 has ",
        " parameters (digest ",
        rank=1,
        kind="fewer_parameters",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "words"), ONE_RANK)
def test_one_rank_that_differs_is_named_on_all(ranks4, arguments, error, words):
    check(ranks4.run(CASE, timeout=25, **arguments), error, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lr", ["ranks disagree on optimizer.param_groups[1].lr: rank 0 has 0.001, rank 2 has 0.1"]),
        ("betas", ["optimizer.param_groups[1].betas: rank 0 has [0.9, 0.999], rank 2 has [0.9, 0.95]"]),
        ("tensor_lr", ["optimizer.param_groups[1].lr: rank 0 has 0.2", "rank 2 has 0.1"]),
        ("class", ["optimizer: rank 0 has", "AdamW", "rank 2 has", "NAdam"]),
        ("none", ["optimizer: rank 0 has", "AdamW", "rank 2 has nothing"]),
        ("given_groups", ["model_parameters[0].weight_decay: rank 0 has nothing, rank 2 has 0.5"]),
        ("callable", ["optimizer.param_groups[0].lr: rank 0 has 0.2, rank 2 has 0.1"]),
        ("partial", ["ranks disagree on optimizer.keywords.momentum: rank 0 has nothing, rank 2 has 0.9"]),
        ("made_by_a_callable", ["optimizer.param_groups[0].lr: rank 0 has 0.2, rank 2 has 0.1"]),
        ("failing_callable", ["rank 2: TypeError: ", "nothing"]),
        ("scheduler", ["lr_scheduler.T_max: rank 0 has 6, rank 2 has 5"]),
        ("scheduler_class", ["lr_scheduler: rank 0 has", "CosineAnnealingLR", "LambdaLR"]),
        ("closure", ["lr_scheduler.lr_lambdas: rank 0 has", "digest"]),
        ("inner_scheduler", ["lr_scheduler._schedulers[1].T_max: rank 0 has 6, rank 2 has 5"]),
        ("scheduler_callable", ["lr_scheduler.T_max: rank 0 has 6, rank 2 has 5"]),
        ("dtype", ["ranks disagree on parameters: rank 0 has", "of float32", "of bfloat16"]),
    ],
)
def test_another_optimizer_or_scheduler_of_one_rank_is_named_on_all(ranks4, name, words):
    check_words(ranks4.run("tests.engine.error_cases:differing", timeout=40, name=name, rank=2), words)


@pytest.mark.parametrize("name", ["lr", "callable", "partial", "made_by_a_callable", "inner_scheduler", "closure"])
def test_the_same_optimizer_and_scheduler_on_all_ranks_are_taken(ranks4, name):
    assert ranks4.run("tests.engine.error_cases:differing", timeout=40, name=name, rank="all") == [None] * 4


def test_bad_files_are_named(ranks4, tmp_path):
    (tmp_path / "bad.json").write_text('{\n  "coverage": 0.5,,\n}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name, words in [
        ("bad", "is not valid JSON: line 2"),
        ("list", "holds a list"),
        ("bytes", "is not a text file"),
    ]:
        results = ranks4.run(CASE, timeout=40, kind=f"file:{tmp_path}/{name}.json")
        check(results, "ConfigError", [f"sdp_config: {tmp_path}/{name}.json", words])


BRANCHES = {"granularity": "branch"}


@pytest.mark.parametrize(
    ("kind", "sdp", "error", "words"),
    [
        ("one_norm", BRANCHES, "ModelError", ["input_layernorm.weight is in model.layers.0.self_attn and in"]),
        ("one_norm_of_attention", BRANCHES, "ModelError", ["does not compute the full model"]),
        ("forgotten", {}, "ModelError", ["a worker that owns some units of 'mlp' under forward masking cannot"]),
        ("other_on_a_rank", {}, "ConfigError", ["ranks disagree on adapter: rank 0 has", "rank 2 has"]),
    ],
)
def test_a_wrong_adapter_is_a_message_on_all_ranks(ranks4, kind, sdp, error, words):
    check(ranks4.run("tests.engine.error_cases:wrong_adapter", timeout=40, kind=kind, sdp=sdp), error, words)


def test_the_ranks_are_whole_after_refusals(ranks4):
    assert ranks4.run(CASE, timeout=40) == [None] * 4


def check_words(messages, words):
    assert len(set(messages)) == 1, messages
    for word in words:
        assert word in messages[0]


def check(results, error, words):
    assert all(results), "every rank must refuse"
    assert len(set(results)) == 1, results
    kind, message = results[0]
    assert kind == error, message
    for word in words:
        assert word in message
