"""The SDP block: defaults, values, and errors that name the key, what it got and what it takes."""

import copy
import json
import re
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp import ConfigError, SDPConfig
from deepspeed_sdp.config import BLOCK, default_subnetworks, read_json, say_total_steps, split_block


def test_defaults():
    config = SDPConfig.parse({})
    assert (config.masking, config.granularity, config.plan.design) == ("forward", "neuron", "auto")
    assert config.partition is None
    assert config.output_scaling == "inverse_sqrt_coverage"
    assert (config.plan.max_owner_sets, config.plan.chunk_multiple, config.plan.seed) == (None, 64, 0)
    assert config.subnetworks(8) == 8
    assert config.owners(8) == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enabled", "yes"),
        ("enabled", 1),
        ("masking", "sideways"),
        ("granularity", 3),
        ("num_subnetworks", 0),
        ("num_subnetworks", 2.0),
        ("num_subnetworks", True),
        ("num_subnetworks", "4"),
        ("coverage", 0),
        ("coverage", 1.5),
        ("coverage", -0.5),
        ("coverage", "0.5"),
        ("coverage", True),
        ("coverage", float("nan")),
        ("partition", []),
        ("partition", "mlp"),
        ("partition", ["mlp", "no kind"]),
        ("shared_modules", "model"),
        ("shared_modules", [1]),
        ("output_scaling", None),
        ("output_scaling", 2),
        ("plan.design", "best"),
        ("plan.max_owner_sets", 0),
        ("plan.chunk_multiple", 0),
        ("plan.seed", -1),
        ("plan.seed", 0.5),
        ("share_ends", -1),
        ("checkpoint.async", 1),
        ("checkpoint.copies", 0),
        ("checkpoint.on_error", "go on"),
        ("backward.overlap_refresh", None),
        ("comm.transport", "ring"),
        ("comm", 3),
        ("plan", [1]),
    ],
)
def test_impossible_values_are_named(key, value):
    with pytest.raises(ConfigError) as error:
        SDPConfig.parse(reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value))
    assert f"{BLOCK}.{key}" in str(error.value)
    assert "got " in str(error.value)
    assert "unknown key" not in str(error.value)


def test_all_mistakes_are_said_at_once():
    with pytest.raises(ConfigError) as error:
        SDPConfig.parse({"coverge": 0.5, "plan": {"seed": -1}})
    first, second = str(error.value).splitlines()
    assert "seed" in first + second
    assert "did you mean 'coverage'?" in first + second


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"transport": "auto"}, "did you mean 'comm.transport'?"),
        ({"checkpoint_async": True}, "did you mean 'checkpoint.async'?"),
        ({"keep_last": 3}, "did you mean 'checkpoint.keep_last'?"),
        ({"comm": {"transprt": 3}}, "comm.transprt: unknown key, got 3; did you mean 'comm.transport'?"),
        ({"plan": {"fil": 3}}, "takes design, seed, chunk_multiple"),
        ({"checkpoint": {"is_async": True}}, "did you mean 'checkpoint.async'? takes async, copies"),
        ({"owners_per_unit": 3}, 'takes "coverage"'),
        ({"block_unit": "layer"}, 'takes "granularity"'),
        (
            {"schedule": {"outer_optimizer": {"rate": 1}}},
            "outer_optimizer.rate: unknown key, got 1; takes lr, momentum",
        ),
        ({"outer_optimizer": {}}, "did you mean 'schedule.outer_optimizer'?"),
        ({"resample_interval": 5}, "did you mean 'schedule.resample_interval'?"),
    ],
)
def test_a_key_in_the_wrong_place_is_told_the_right_one(block, message):
    with pytest.raises(ConfigError) as error:
        SDPConfig.parse(block)
    assert message in str(error.value)


def test_a_schedule_of_coverages():
    block = {"coverage": 0.75, "schedule": {"coverage_schedule": [[0.0, "1/4"], [0.5, 0.5], [0.9, 1.0]]}}
    config = SDPConfig.parse(block)
    assert config.coverage == 0.25, "the schedule takes its place"
    assert SDPConfig.parse(config.written()) == config
    assert config.largest().coverage == 1.0
    with pytest.raises(ConfigError, match=r"schedule.total_steps: got nothing with coverage_schedule"):
        config.schedule.coverage_at(0)
    ds_config = {"subnetwork_data_parallel": copy.deepcopy(block)}
    say_total_steps(ds_config, 10)
    schedule = SDPConfig.parse(ds_config["subnetwork_data_parallel"]).schedule
    assert [schedule.coverage_at(step) for step in range(11)] == [0.25] * 5 + [0.5] * 4 + [1.0] * 2
    assert schedule.describe(10) == "coverage 0.25 from step 0; coverage 0.5 from step 5; coverage 1 from step 9"
    for stages, message in (
        ([[0.1, 0.5]], "got the shares 0.1; takes shares that begin at 0 and ascend"),
        ([[0.0, 0.5], [0.0, 0.25]], "got the shares 0, 0; takes"),
        ([[0.0, 0.5, 1]], "coverage_schedule.0"),
        ([[0.0, "half"]], "coverage_schedule.0.1"),
        (3, "coverage_schedule: got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            SDPConfig.parse({"schedule": {"coverage_schedule": stages}})
    with pytest.raises(ConfigError, match=r"coverage_schedule: got it with plan.file"):
        SDPConfig.parse({"plan": {"file": "a.json"}, "schedule": {"coverage_schedule": [[0.0, 0.5]]}})


def test_what_is_written_is_read_again():
    block = {"checkpoint": {"async": True}, "plan": {"worker_capacity": [1, 2]}, "coverage": "1/2"}
    config = SDPConfig.parse(block)
    assert SDPConfig.parse(config.written()) == config
    assert config.checkpoint.is_async


def test_a_job_says_its_length_where_the_block_does_not():
    assert SDPConfig.parse({}).at_length(77).plan.seq_length == 77
    assert SDPConfig.parse({"plan": {"seq_length": 5}}).at_length(77).plan.seq_length == 5
    assert SDPConfig.parse({"plan": {"file": "p.json"}}).at_length(77).plan.seq_length == 2048


@given(st.integers(1, 64), st.data())
def test_every_fraction_typed_as_a_person_would_gives_its_owners(n, data):
    k = data.draw(st.integers(1, n))
    for digits in (4, 6, 17):
        coverage = round(k / n, digits)
        if abs(coverage - k / n) <= 1e-3 * coverage:
            assert SDPConfig.parse({"coverage": coverage}).owners(n) == k
    assert SDPConfig.parse({"coverage": f"{k}/{n}"}).owners(n) == k


@given(st.integers(1, 32), st.floats(0.001, 1))
def test_owners_are_whole_and_near_or_refused(n, coverage):
    config = SDPConfig.parse({"coverage": coverage})
    try:
        owners = config.owners(n)
    except ConfigError as error:
        assert f"{BLOCK}.coverage: got {coverage:g} with {n} subnetworks" in str(error)  # noqa: PT017
    else:
        assert 1 <= owners <= n
        assert abs(owners / n - coverage) <= 1e-3 * coverage


@pytest.mark.parametrize(
    ("written", "owners"),
    [("1/2", 4), ("3/8", 3), (" 2 / 8 ", 2), ({"mlp": "1/2", "attention": 0.75}, {"mlp": 4, "attention": 6})],
)
def test_a_coverage_can_be_written_as_a_fraction(written, owners):
    assert SDPConfig.parse({"coverage": written}).owners(8) == owners


@pytest.mark.parametrize("written", ["3/2", "0/2", "1/0", "a/b", "-1/2", "1/2/3", "1/"])
def test_what_is_no_coverage_is_named_with_what_is_taken(written):
    with pytest.raises(
        ConfigError, match=re.escape(f'coverage: got "{written}"; takes a number above 0 and up to 1, as')
    ):
        SDPConfig.parse({"coverage": written})


def test_the_tools_print_what_they_take():
    with pytest.raises(ConfigError, match="takes a whole number of owners: 1/4, 1/2, 3/4, 1") as error:
        SDPConfig.parse({"coverage": 0.3}).owners(4)
    for written in str(error.value).rpartition(": ")[2].split(", ")[:-1]:
        SDPConfig.parse({"coverage": written}).owners(4)


def test_a_block_is_a_block_however_it_is_given(tmp_path):
    block = {"num_subnetworks": 4, "coverage": "1/4"}
    file = tmp_path / "sdp.json"
    file.write_text(json.dumps({BLOCK: block}))
    parsed = SDPConfig.parse(block)
    assert [SDPConfig.of(given) for given in (block, {BLOCK: block}, file, str(file), parsed)] == [parsed] * 5
    assert split_block({}, parsed) == parsed
    with pytest.raises(ConfigError, match="sdp_config: cannot read"):
        SDPConfig.of(tmp_path / "no.json")


def test_one_rank_owns_every_unit():
    for block in ({}, {"coverage": 0.25}, {"coverage": 0.5}, {"coverage": {"mlp": 0.5, "attention": 0.75}}):
        assert SDPConfig.parse(block).of_one_rank().owners(1) == 1
    with pytest.raises(
        ConfigError, match=r"got 4 with a world size of 1; .*deepspeed --num_accelerators 4, or torchrun"
    ):
        SDPConfig.parse({"num_subnetworks": 4}).subnetworks(1)


@pytest.mark.parametrize(
    ("world", "workers"),
    [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (8, 8), (11, 1), (12, 6), (20, 5), (512, 8), (4096, 8)],
)
def test_by_default_subnetworks_are_the_largest_divisor_of_the_world_up_to_8(world, workers):
    assert SDPConfig.parse({}).subnetworks(world) == default_subnetworks(world) == workers


@pytest.mark.parametrize("workers", [1, 3, 5, 7])
def test_a_default_coverage_of_no_whole_owners_says_what_else_can_be_taken(workers):
    with pytest.raises(ConfigError, match=f"0.5 .the default. with {workers} subnetworks.*or another num_subnetworks"):
        SDPConfig.parse({}).owners(SDPConfig.parse({}).subnetworks(workers))
    with pytest.raises(ConfigError) as error:
        SDPConfig.parse({"num_subnetworks": workers}).owners(workers)
    assert "another num_subnetworks" not in str(error.value)


def test_the_bound_on_owner_sets_goes_by_the_backend():
    config = SDPConfig.parse({})
    assert [config.owner_sets_bound(n, "nccl") for n in (1, 8, 9, 16, 32, 512)] == [16, 16, 18, 32, 64, 64]
    assert [config.owner_sets_bound(n, "gloo") for n in (1, 8, 512)] == [64] * 3
    assert SDPConfig.parse({"plan": {"max_owner_sets": 40}}).owner_sets_bound(8, "nccl") == 40


def test_int_coverage_is_full_coverage():
    assert SDPConfig.parse({"coverage": 1}).owners(6) == 6


def test_the_number_of_subnetworks_divides_the_world():
    assert SDPConfig.parse({"num_subnetworks": 4}).subnetworks(8) == 4
    with pytest.raises(ConfigError, match=r"num_subnetworks: got 3 with a world size of 8; .*1, 2, 4, 8"):
        SDPConfig.parse({"num_subnetworks": 3}).subnetworks(8)
    with pytest.raises(ConfigError, match=r"got 16 with a world size of 8"):
        SDPConfig.parse({"num_subnetworks": 16}).subnetworks(8)


def test_where_the_block_stands(tmp_path):
    path = tmp_path / "sdp.json"
    path.write_text(json.dumps({"plan": {"seed": 4}}))
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({BLOCK: {"plan": {"seed": 4}}}))
    for ds, sdp in [
        ({BLOCK: {"plan": {"seed": 4}}}, None),
        ({}, {"plan": {"seed": 4}}),
        ({}, path),
        ({}, str(path)),
        ({}, wrapped),
    ]:
        assert split_block(ds, sdp).plan.seed == 4
    with pytest.raises(ConfigError, match="no SDP block"):
        split_block({}, None)
    for second in ({}, {"plan": {"seed": 4}}, path):
        with pytest.raises(ConfigError, match="two SDP blocks"):
            split_block({BLOCK: {}}, second)
    for block in ([], "x", 3):
        with pytest.raises(ConfigError, match="takes an object with keys"):
            split_block({BLOCK: block}, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"coverage": }', "is not valid JSON: line 1"),
        (b"", "is not valid JSON"),
        (b"[]", "holds a list"),
        (b"\xff\xfe", "is not a text file"),
        (b"3", "holds a int"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"--sdp_config: {path} {message}")):
        read_json(path, "--sdp_config")


def test_files_that_cannot_be_read_are_named(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(f"key: cannot read {path}: ")):
            read_json(path, "key")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"plan": {"file": "p.json"}, "coverage": 0.5}, "plan.file: got 'p.json' with coverage"),
        (
            {"plan": {"file": "p", "worker_capacity": [1, 2], "max_owner_sets": 3}},
            "with plan.max_owner_sets, plan.worker_capacity",
        ),
        ({"coverage": "0/4"}, r'coverage: got "?0.*"?; takes a number above 0'),
        ({"plan": {"worker_capacity": [1, 0]}}, r"worker_capacity\.1: got 0"),
        ({"plan": {"rank_order": "random"}}, "rank_order: got"),
    ],
)
def test_units_and_workers_that_contradict(block, message):
    with pytest.raises(ConfigError, match=message):
        SDPConfig.parse(block)


def test_owners_of_each_kind():
    config = SDPConfig.parse({"coverage": {"mlp": 0.5, "attention": 0.75}})
    assert config.owners(8) == {"mlp": 4, "attention": 6}
    with pytest.raises(ConfigError, match=r"coverage\.attention: got 0\.75 with 2 subnetworks"):
        config.owners(2)
    with pytest.raises(ConfigError, match="takes one number"):
        SDPConfig.parse({"granularity": "layer", "coverage": {"mlp": 0.5, "attention": 0.5}}).owners(4)


def test_capacity_has_a_number_for_every_worker():
    assert SDPConfig.parse({"plan": {"worker_capacity": [1, 0.5]}}).capacity(2) == (
        1,
        0.5,
    )
    with pytest.raises(ConfigError, match=r"worker_capacity: got 2 numbers; takes one for each of the 4 subnetworks"):
        SDPConfig.parse({"plan": {"worker_capacity": [1, 0.5]}}).capacity(4)
