"""``make gpu`` on a CPU, at toy size; and what becomes of checks that fail, hang or come too late."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.checks import CHECKS, Check
from benchmarks.gpu.page import tables, write_page
from tests.support.ranks import ROOT, rank_environment

FACTS = {
    "command": "python -m benchmarks.gpu",
    "device": "cpu",
    "date": "2026-01-01",
    "versions": {"torch": "2", "nccl": None},
}


def run(tmp_path, *arguments):
    output, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--output", str(output), "--page", str(page)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=560
    )
    return done, json.loads(output.read_text())["rows"], page.read_text()


@pytest.mark.parametrize(
    "only",
    [
        ["oracle fp32: backward masking, ZeRO-2", "134M step of one of 8 workers: SDP forward"],
        pytest.param(["fp32", "resume", "offload", "fused", "Fused"], marks=pytest.mark.slow),
        pytest.param(["1B", "134M"], marks=pytest.mark.slow),
        pytest.param(["bf16", "compile"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_checks_run_at_toy_size_on_a_cpu(tmp_path, only):
    done, rows, page = run(tmp_path, "--only", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["check"] for row in rows] == [c.name for c in CHECKS if any(part in c.name for part in only)]
    for row in rows:
        assert row["state"] == ("not run" if row["check"].endswith("NCCL") else "passed"), row
        assert row["command"].startswith("python -m benchmarks.gpu --device cpu")
        assert row["date"]
        assert {"torch", "deepspeed", "nccl", "cuda", "driver", "gpu"} <= set(row["versions"])
        assert row["check"] in page
    assert "nothing of a GPU" in page


def test_what_is_out_of_time_is_said(tmp_path):
    done, rows, page = run(tmp_path, "--budget", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["check"] for row in rows] == [check.name for check in CHECKS]
    assert {(row["state"], row["says"]) for row in rows} == {("not run", "out of time"), ("not run", "takes a GPU")}
    assert f"0 of {len(CHECKS)} checks passed" in page


def test_what_is_not_run_again_stays(tmp_path):
    kept = {"check": CHECKS[0].name, "state": "passed", "seconds": 1.5, **FACTS, "command": "an earlier one"}
    gone = {**kept, "check": "no check of this name"}
    (tmp_path / "gpu.json").write_text(json.dumps({"rows": [gone, kept]}))
    _, rows, page = run(tmp_path, "--budget", "0")
    assert [row["check"] for row in rows] == [check.name for check in CHECKS]
    assert rows[0] == kept
    assert "an earlier one" in page
    assert "python -m benchmarks.gpu --device cpu" in page


def test_ratios_are_to_the_baseline_of_the_same_shape():
    sizes = {
        "1B step: DeepSpeed ZeRO-1": 8.0,
        "1B step: SDP": 2.0,
        "134M step: DeepSpeed ZeRO-1": 4.0,
        "134M step: SDP": 3.0,
    }
    rows = [
        {"check": name, "state": "passed", "step_seconds": size, "peak": None, **FACTS} for name, size in sizes.items()
    ]
    lines = {
        line.split("|")[1].strip(): line
        for line in tables(rows).splitlines()
        if line.startswith("| 1") and "ms" not in line
    }
    assert "| 0.25 |" in lines["1B step: SDP"]
    assert "| 0.75 |" in lines["134M step: SDP"]


PROGRAM = """
import json, os, sys, time
names, rows = sys.argv[2:], sys.argv[1]
for name in names:
    if name == "dies":
        print("last words", flush=True)
        os.kill(os.getpid(), 9)
    if name == "hangs":
        time.sleep(60)
    state = {"state": "failed", "says": "rank 0: AssertionError: no"} if name == "fails" else {"state": "passed"}
    with open(rows, "a") as file:
        file.write(json.dumps({"check": name, **state}) + "\\n")
    if name == "fails":
        sys.exit(1)
"""


def test_a_check_that_fails_dies_or_hangs_is_a_row_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(
        gpu,
        "_command",
        lambda group, checks, ranks, rows, seconds: [
            sys.executable, "-c", PROGRAM, str(rows), *(check.name for check in checks)
        ],
    )  # fmt: skip
    monkeypatch.setattr(gpu, "_START", {"cpu": 2.0})
    monkeypatch.setattr(gpu, "_LOGS", tmp_path)
    names = ["one", "fails", "two", "dies", "three", "hangs", "four"]
    checks = [Check(name, "shared", "nothing:nothing", limit=1.0) for name in names]
    rows = list(gpu._run_group("shared", checks, 0, rank_environment(), time.monotonic() + 60))
    assert [row["check"] for row in rows] == names
    states = {row["check"]: row["state"] for row in rows}
    assert states == {name: "failed" if name in ("fails", "dies", "hangs") else "passed" for name in names}
    said = {row["check"]: row.get("says", "") for row in rows}
    assert said["fails"] == "rank 0: AssertionError: no"
    assert said["dies"] == "its processes ended (-9): last words"
    assert said["hangs"].startswith("no end in ")


def test_the_page_has_every_figure_and_keeps_its_text(tmp_path):
    rows = [
        {"check": "a", "state": "passed", "seconds": 1.0, "loss_difference": 2e-6, **FACTS},
        {
            "check": "b",
            "state": "passed",
            "step_seconds": 0.5,
            "mfu": 0.25,
            "peak": 3e9,
            "estimated_peak": 4e9,
            **FACTS,
        },
        {"check": "c", "state": "failed", "says": "why | not", **FACTS},
    ]
    table = tables(rows)
    for text in ("2.0e-06", "500.0", "0.250", "3.000", "4.000", "failed: why / not", "2 of 3 checks passed"):
        assert text in table
    page = tmp_path / "gpu.md"
    for _ in range(2):
        write_page(rows, page if page.exists() else ROOT / "docs" / "gpu.md", page)
    text = page.read_text()
    assert text.count("2 of 3 checks passed") == 1
    assert text.startswith("# On a GPU")
    assert text.rstrip().endswith("<!-- end gpu -->")
