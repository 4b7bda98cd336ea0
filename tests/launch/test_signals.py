"""What a job does with signals, sent to the command that a user types: ``deepspeed`` and ``torchrun``."""

import signal

import pytest

from tests.launch.recipe_jobs import RecipePlace
from tests.launch.signalled import run_signalled, was_saved

USR1, TERM, INT, KILL = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGKILL
NODE = "deepspeed.launcher.launch"


def test_a_signal_to_the_deepspeed_command_saves_the_job(workplace):
    job = run_signalled(workplace, "deepspeed", TERM)
    assert was_saved(workplace, job), job.output
    assert job.left == []


@pytest.mark.parametrize("number", [pytest.param(USR1, marks=pytest.mark.slow), TERM])
def test_a_signal_to_the_pretrain_command_saves_the_job(tmp_path, number):
    place = RecipePlace(tmp_path)
    job = run_signalled(place, "deepspeed-sdp", number)
    assert was_saved(place, job), job.output
    assert job.left == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "whom", "switches"),
    [
        ("deepspeed", USR1, "launcher", []),
        ("deepspeed", KILL, "launcher", []),
        ("deepspeed", INT, "launcher", []),
        ("deepspeed", TERM, NODE, []),
        ("deepspeed", USR1, NODE, []),
        ("torchrun", TERM, "launcher", ["--shutdown_timeout", "300"]),
        ("torchrun", USR1, "launcher", []),
        ("torchrun", USR1, "launcher", ["--signals_to_handle", "SIGTERM,SIGUSR1"]),
        ("torchrun", KILL, "launcher", []),
    ],
)
def test_whatever_ends_a_launcher_the_job_saves_and_ends(workplace, launcher, number, whom, switches):
    job = run_signalled(workplace, launcher, number, whom, switches)
    assert was_saved(workplace, job), job.output
    assert job.left == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_an_interrupt_from_the_keyboard_ends_the_job_without_saving(workplace, launcher):
    job = run_signalled(workplace, launcher, INT, "group")
    assert not was_saved(workplace, job)
    assert job.code != 0
    assert job.left == []
