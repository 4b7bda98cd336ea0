"""``--dry_run``: one process, without a launcher, says what a job would do on any number of ranks."""

import subprocess
import sys
from importlib import import_module

import pytest

from deepspeed_sdp import ConfigError
from tests.launch.jobs import RANK_VARIABLES, TRAIN
from tests.launch.recipe_jobs import PRETRAIN, RECIPE
from tests.support.ranks import ROOT, rank_environment

DEMO = [
    part
    for option, name in (("deepspeed", "demo"), ("sdp", "demo_sdp"), ("model", "demo_model"))
    for part in (f"--{option}_config", str(ROOT / "ds_configs" / f"{name}.json"))
]


@pytest.fixture
def dry_run(monkeypatch, capsys):
    """What ``launch/NAME.py --dry_run ARGUMENTS`` prints, in this process."""
    monkeypatch.syspath_prepend(str(TRAIN.parent))
    for variable in RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def run(name, *arguments):
        module, given = import_module(name), import_module("arguments")
        pretrain = name == "pretrain"
        parse = given.parse_pretrain_arguments if pretrain else given.parse_arguments
        args = parse([*arguments, "--dry_run", "--verbose"], None)
        (given.check_pretrain_arguments if pretrain else given.check_arguments)(args)
        module.dry_run(args)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("arguments", "ranks"), [((), 4), (("--world_size", "8"), 8), (("--world-size=16",), 16)])
def test_a_recipe_on_any_number_of_ranks(dry_run, arguments, ranks):
    out = dry_run("pretrain", "--recipe", str(RECIPE), *arguments)
    assert f"ranks        {ranks}, global batch 64" in out
    assert "SDP, forward masking by neuron, 4 subnetworks" in out


def test_a_script_s_options_on_any_number_of_ranks(dry_run):
    out = dry_run("train", *DEMO, "--steps", "10", "--world_size", "8")
    assert "ranks        8; micro-batches on each: 1, of 8 x 256 tokens" in out
    assert "4 subnetworks, coverage 0.5" in out
    assert f"length       10 steps, {10 * 8 * 8 * 256:,} tokens" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world_size", "6"), "train_batch_size: got 64 with 6 ranks"),
        (("--world_size", "2"), "num_subnetworks: got 4 with a world size of 2"),
        (("--world_size", "0"), "--world_size: got 0; takes a number from 1 on, with --dry_run"),
        (("--set", "zero_optimization.stage=7"), "zero_optimization.stage: got 7"),
        (("--set", "subnetwork_data_parallel.checkpoint.copies=3"), "checkpoint.copies: got 3 with 2 owners per unit"),
        (("--data", "no/where"), "no/where"),
        (("--retries", "3"), "--retries: got 3 without --stream"),
    ],
)
def test_it_finds_what_a_job_would(dry_run, arguments, message):
    from deepspeed_sdp.errors import SDPError

    with pytest.raises(SDPError) as raised:
        dry_run("pretrain", "--recipe", str(RECIPE), *arguments)
    assert message in str(raised.value)


def test_a_world_size_is_for_a_dry_run(dry_run):
    given = import_module("arguments")
    args = given.parse_arguments([*DEMO, "--steps", "10", "--output_dir", "out", "--world_size", "8"], None)
    with pytest.raises(ConfigError, match=r"--world_size: got 8; takes .* with --dry_run; a job has the ranks"):
        given.check_arguments(args)


@pytest.mark.parametrize(("rank", "said"), [(0, 1), (1, 0)])
def test_of_several_ranks_the_first_tells(rank, said):
    environment = rank_environment(RANK=rank, WORLD_SIZE=8)
    command = [sys.executable, str(PRETRAIN), "--recipe", str(RECIPE), "--dry_run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("ranks        8, global batch")) == (0, said), done.stderr
