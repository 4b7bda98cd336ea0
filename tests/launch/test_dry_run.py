"""``--dry_run``: one process, without a launcher, says what a job would do on any number of ranks."""

from importlib import import_module

import pytest

from deepspeed_sdp import ConfigError
from deepspeed_sdp.pretraining.options import check_job_options, parse_run
from deepspeed_sdp.pretraining.run import dry_run as say_what_it_would_do
from tests.launch.jobs import RANK_VARIABLES, TRAIN
from tests.support.ranks import ROOT

DEMO = ["--model", "llama-demo", "--text", "builtin"] + [
    part
    for option, name in (("deepspeed", "demo"), ("sdp", "demo_sdp"))
    for part in (f"--{option}_config", str(ROOT / "ds_configs" / f"{name}.json"))
]


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAIN.parent))
    for variable in RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return import_module("train")


def test_a_script_s_options_on_any_number_of_ranks(train, capsys):
    given = [*DEMO, "--steps", "10", "--world_size", "8", "--dry_run", "--verbose"]
    say_what_it_would_do(parse_run(train.make_parser(), given), train.read)
    out = capsys.readouterr().out
    assert "ranks        8, global batch 64 sequences of 256 tokens (1 micro-batches of 8 on each)" in out
    assert "4 subnetworks, coverage 0.5" in out
    assert f"length       by steps: 10 steps, {10 * 8 * 8 * 256:,} tokens" in out


def test_a_world_size_is_for_a_dry_run(train):
    args = parse_run(train.make_parser(), [*DEMO, "--steps", "10", "--output_dir", "out", "--world_size", "8"])
    with pytest.raises(ConfigError, match=r"--world_size: got 8; takes .* with --dry_run; a job has the ranks"):
        check_job_options(args, "text")


def test_the_demo_s_recipe_is_what_its_files_say(train):
    """``make demo``, and the ready files of ``launch/train.py``."""
    from deepspeed_sdp.pretraining.recipe import read_recipe

    files = train.read(parse_run(train.make_parser(), [*DEMO, "--steps", "1"]))
    recipe = read_recipe("demo")
    assert (files.model, files.sdp.coverage) == (recipe.model, recipe.sdp.coverage)
    assert files.ds_config["optimizer"] == recipe.ds_config["optimizer"]
