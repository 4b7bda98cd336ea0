"""A job that is asked to stop saves, ends well, and goes on with the same command."""

import json

import pytest
from safetensors.torch import load_file

from tests.launch.jobs import Workplace

STOP_AT_5 = """
import signal, time
step = loop.train_step
def stopping(engine, batches):
    loss = step(engine, batches)
    if engine.global_steps == 5 and engine.global_rank == 1:
        os.kill({}, signal.{})
        time.sleep(1)
    return loss
loop.train_step = stopping
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "signal", "interval"),
    [
        ("os.getpid()", "SIGUSR1", 0),
        ("os.getpid()", "SIGTERM", 2),
        # The launcher passes it on, waits 30 s, and ends with a code of its own.
        ("os.getppid()", "SIGTERM", 2),
    ],
    ids=["USR1", "TERM", "TERM-launcher"],
)
def test_a_stopped_job_ends_like_one_that_was_not(tmp_path, whom, signal, interval):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole, stopped = Workplace(tmp_path / "one"), Workplace(tmp_path / "two")
    options = {"steps": 9, "eval_interval": 3, "checkpoint_interval": interval}
    job = whole.launch(**options)
    assert job.code == 0, job.output
    first = stopped.launch(script=stopped.script(STOP_AT_5.format(whom, signal)), **options)
    assert first.code == (1 if "ppid" in whom else 0), first.output
    assert "; the same command goes on" in first.output
    assert "stopped at step 5" in first.output or "stopped at step 6" in first.output
    assert not (stopped.output / "hf").exists()
    second = stopped.launch(**options)
    assert second.code == 0, second.output
    assert "going on from" in second.output
    one, two = (load_file(place.output / "hf" / "model.safetensors") for place in (whole, stopped))
    assert all(one[name].equal(two[name]) for name in one)
    reports = [json.loads((place.output / "report.json").read_text()) for place in (whole, stopped)]
    assert reports[0]["history"]["full_model_val_loss"] == reports[1]["history"]["full_model_val_loss"]
    third = stopped.launch("--restart", **options)
    assert third.code == 0, third.output
    assert "going on from" not in third.output
