"""The drivers of benchmarks/systems on two gloo ranks, at a size that measures nothing."""

import json
import subprocess
import sys

import pytest

from tests.support.ranks import ROOT, rank_environment

SYSTEMS = ROOT / "benchmarks" / "systems"
TINY = ["--hidden_size", "64", "--head_size", "16", "--layers", "2", "--vocab_size", "128", "--sequence", "16"]


def run(script, *arguments, ranks=2):
    command = [sys.executable, str(SYSTEMS / "launch.py"), "--ranks", str(ranks), "--time_limit", "240"]
    return subprocess.run(
        [*command, str(SYSTEMS / script), *arguments],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_contenders_are_measured_side_by_side(tmp_path):
    output = tmp_path / "systems.json"
    done = run("run.py", "--quick", *TINY, "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    rows = {row["contender"]: row for row in results["rows"]}
    assert not any("reason" in row for row in rows.values())
    for row in rows.values():
        memory = row["memory"]
        kinds = ("weights", "gradients", "optimizer", "activations", "rest")
        assert sum(memory[kind] for kind in kinds) == memory["peak"]
        # Nothing is alive twice: what is no kind of its own would be negative.
        assert memory["rest"] >= 0
        assert row["flops"] == pytest.approx(row["predicted"]["flops"], rel=0.01)
        assert memory["weights"] == pytest.approx(row["predicted"]["weights"], rel=0.05)
        if results["settings"]["network"] != "loopback":
            assert row["wire"] == pytest.approx(row["sent"], rel=0.15)
    dense = [row["losses"][0] for row in rows.values() if row["coverage"] == "1"]
    assert len(dense) == 5
    assert max(dense) - min(dense) < 1e-4
    half, ddp = rows["SDP forward neuron 1/2 ZeRO-1"], rows["DDP"]
    assert half["sent"] == pytest.approx(half["predicted"]["sent"], rel=0.02)
    assert half["sent"] < ddp["sent"]
    assert half["memory"]["weights"] < ddp["memory"]["weights"]
    assert half["memory"]["largest_activations"] < ddp["memory"]["largest_activations"]


@pytest.mark.slow
def test_axes_are_swept_and_links_limited(tmp_path):
    output = tmp_path / "sweep.json"
    arguments = ["--axes", "sequence", "link", "--rates", "1", "--quick", *TINY, "--output", str(output)]
    done = run("sweep.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert {row["at"] for row in results["rows"] if row["axis"] == "sequence"} == {8, 32}
    if results["settings"]["network"] == "loopback":
        assert "left out" in done.stdout
        return
    limited = [row for row in results["rows"] if row["axis"] == "link" and row["rate"]]
    # Two workers cannot hold a quarter each: it says so, and the others are measured.
    assert [row["contender"] for row in limited if "reason" in row] == ["SDP forward neuron 1/4 ZeRO-1"]
    assert "coverage" in next(row["reason"] for row in limited if "reason" in row)
    ran = [row for row in limited if "reason" not in row]
    assert len(ran) == 4
    for row in ran:
        # A link hands over no more than its rate, after a first burst.
        assert row["seconds"][0] > (row["sent"] - 300_000) / row["rate"]


@pytest.mark.slow
def test_one_worker_runs_with_faked_peers(tmp_path):
    output = tmp_path / "faked.json"
    done = run("run.py", "--quick", "--fake_peers", "4", *TINY, "--output", str(output), ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert results["settings"]["ranks"] == 4
    assert results["settings"]["faked_peers"]
    ran = {row["contender"]: row for row in results["rows"] if "reason" not in row}
    assert {"DDP", "FSDP2", "DeepSpeed ZeRO-3", "SDP forward neuron 1/2 ZeRO-1"} <= set(ran)
    # One of four ranks: the state is its shard, whoever the others are.
    for row in ran.values():
        assert row["memory"]["weights"] == pytest.approx(row["predicted"]["weights"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head_size", "48"], "--head_size: got 48 with --hidden_size 256; takes an even divisor"),
        (["--contenders", "Megatron"], "--contenders: got 'Megatron'; takes parts of: DDP"),
        (["--sequence", "1"], "--sequence: got 1; takes a number from 2 on"),
        (["--output", "/dev/null/results.json"], "--output: got /dev/null/results.json; takes a file in a folder"),
    ],
)
@pytest.mark.slow
def test_unusable_options_are_named(arguments, message):
    done = run("run.py", *arguments, ranks=1)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
