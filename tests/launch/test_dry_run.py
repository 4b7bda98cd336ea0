"""``--dry_run``: one process, without a launcher, says what a job would do on any number of ranks."""

from importlib import import_module

import pytest

from deepspeed_sdp import ConfigError
from tests.launch.jobs import RANK_VARIABLES, TRAIN
from tests.support.ranks import ROOT

DEMO = [
    part
    for option, name in (("deepspeed", "demo"), ("sdp", "demo_sdp"), ("model", "demo_model"))
    for part in (f"--{option}_config", str(ROOT / "ds_configs" / f"{name}.json"))
]


@pytest.fixture
def dry_run(monkeypatch, capsys):
    """What ``launch/train.py --dry_run ARGUMENTS`` prints, in this process."""
    monkeypatch.syspath_prepend(str(TRAIN.parent))
    for variable in RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments):
        module, given = import_module("train"), import_module("arguments")
        args = given.parse_arguments([*arguments, "--dry_run", "--verbose"], None)
        given.check_arguments(args)
        module.dry_run(args)
        return capsys.readouterr().out

    return run


def test_a_script_s_options_on_any_number_of_ranks(dry_run):
    out = dry_run(*DEMO, "--steps", "10", "--world_size", "8")
    assert "ranks        8; micro-batches on each: 1, of 8 x 256 tokens" in out
    assert "4 subnetworks, coverage 0.5" in out
    assert f"length       10 steps, {10 * 8 * 8 * 256:,} tokens" in out


def test_a_world_size_is_for_a_dry_run(dry_run):
    given = import_module("arguments")
    args = given.parse_arguments([*DEMO, "--steps", "10", "--output_dir", "out", "--world_size", "8"], None)
    with pytest.raises(ConfigError, match=r"--world_size: got 8; takes .* with --dry_run; a job has the ranks"):
        given.check_arguments(args)
