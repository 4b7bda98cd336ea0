"""Killing ranks at random moments of saving, a hundred times, always leaves a loadable latest checkpoint."""

import subprocess
import sys

import pytest

from tests.support.ranks import ROOT, rank_environment


@pytest.mark.slow
def test_killed_a_hundred_times(tmp_path):
    command = [sys.executable, "-m", "tests.engine.kill_cases", str(tmp_path), "100", "0"]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
