"""The benchmarks run, at a size that measures nothing."""

import json

import pytest

from tests.launch.jobs import run_job
from tests.support.ranks import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "keys"),
    [
        (
            "engine_speed.py",
            ["--stages", "1", "--repetitions", "2", "--steps", "1", "--hidden_size", "64", "--layers", "4"],
            {"time_ratio", "flop_ratio", "bytes_sent"},
        ),
        (
            "capacity.py",
            ["--stages", "1", "--repetitions", "2", "--steps", "1", "--hidden_size", "64"],
            {"wall_ratio", "cpu_of_the_slowest_rank_ratio"},
        ),
        ("engine_memory.py", ["--stages", "0", "3", "--hidden_size", "64", "--layers", "4"], {"peak", "design"}),
    ],
)
def test_a_benchmark_leaves_its_figures(tmp_path, script, arguments, keys):
    output = tmp_path / "result.json"
    job = run_job([str(ROOT / "benchmarks" / script), *arguments, "--output", str(output)], cwd=tmp_path, ranks=4)
    assert job.code == 0, job.output
    report = json.loads(output.read_text())
    assert report["settings"]["ranks"] == 4
    assert all(keys <= set(row) for row in report["rows"])
    assert "| ZeRO |" in job.output
