"""Without a launcher one process runs; where something started several, DeepSpeed's discovery is left to work."""

import os
import subprocess
import sys

import pytest

from deepspeed_sdp import ConfigError
from deepspeed_sdp.engine.deepspeed import start as communication
from deepspeed_sdp.engine.deepspeed.start import take_a_place
from tests.support.models import tiny_model
from tests.support.ranks import ROOT, rank_environment

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Of a process that nothing launched; what is set in it is gone after the test."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return os.environ


def has_mpi4py(monkeypatch, is_there):
    monkeypatch.setattr(communication.importlib.util, "find_spec", lambda name: object() if is_there else None)


def test_a_process_that_nothing_launched_is_a_world_of_one(environment):
    take_a_place()
    assert [environment[name] for name in PLACE[:4]] == ["0", "0", "1", "127.0.0.1"]
    assert 1024 < int(environment["MASTER_PORT"]) < 65536


def test_a_launcher_s_variables_stay(environment):
    given = dict(zip(PLACE, ("3", "1", "8", "node0", "29500"), strict=True))
    environment.update(given)
    take_a_place()
    assert {name: environment[name] for name in PLACE} == given


@pytest.mark.parametrize(
    "given",
    [
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "8"},
        {"AZUREML_EXPERIMENT_ID": "x"},
        {"SM_TRAINING_ENV": "{}"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_deepspeed_discovers_is_left_to_it(environment, monkeypatch, given):
    has_mpi4py(monkeypatch, True)
    environment.update(given)
    take_a_place()
    assert not set(PLACE) & set(environment)


@pytest.mark.parametrize("given", [{"OMPI_COMM_WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "1"}])
def test_one_process_is_a_world_of_one_whoever_started_it(environment, given):
    environment.update(given)
    take_a_place()
    assert environment["WORLD_SIZE"] == "1"
    assert set(PLACE) <= set(environment)


@pytest.mark.parametrize("given", [{"OMPI_COMM_WORLD_SIZE": "4"}, {"WORLD_SIZE": "4", "RANK": "0"}, {"RANK": "2"}])
def test_several_processes_that_cannot_find_each_other_are_told_so(environment, monkeypatch, given):
    has_mpi4py(monkeypatch, False)
    environment.update(given)
    name, value = next(iter(given.items()))
    with pytest.raises(ConfigError, match=f"environment: got {name}={value} without .*MASTER_ADDR.*mpi4py"):
        take_a_place()


@pytest.mark.parametrize("coverage", [{}, {"coverage": 0.5}, {"coverage": {"mlp": 0.5, "attention": 0.75}}])
def test_in_a_world_of_one_the_plan_is_the_whole_model(coverage):
    from deepspeed_sdp.subnetwork import plan_for

    plan = plan_for(tiny_model(meta=True), coverage, 1)
    assert (plan.num_subnetworks, plan.coverage) == (1, 1.0)
    with pytest.raises(ConfigError, match="num_subnetworks: got 4 with a world size of 1"):
        plan_for(tiny_model(meta=True), {"num_subnetworks": 4, **coverage}, 1)


def run(script, tmp_path):
    environment = rank_environment()
    for name in PLACE:
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180
    )


def test_the_example_runs_without_a_launcher(tmp_path):
    done = run(ROOT / "examples" / "minimal.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("a world of one rank trains the whole model") == 1
    assert "deepspeed --num_accelerators N, or torchrun" in done.stderr
    assert (tmp_path / "runs" / "minimal" / "config.json").is_file()


def test_a_mistake_in_a_script_is_one_line(tmp_path):
    script = tmp_path / "script.py"
    source = (ROOT / "examples" / "minimal.py").read_text()
    script.write_text(source.replace('"coverage": 0.5', '"coverige": 0.5'))
    done = run(script, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("unknown key, got 0.5; did you mean 'coverage'?") == 1
    assert "Traceback" not in done.stderr
