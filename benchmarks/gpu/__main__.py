"""Run the checks of one device, in groups of processes with time limits, and write rows and a page of figures.

    make gpu                                       (python -m benchmarks.gpu --device cuda)
    make gpu DEVICE=cpu                            (the same at toy size: does it run?)
    python -m benchmarks.gpu --device cpu --only "oracle fp32" resume

A check that fails, hangs or kills its processes is a row, and the others go on in new processes. What the time does not
reach is a row too. Results are written after every check. Rows of earlier runs stay until their check is run again.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import CHECKS, RANKS, Check
from benchmarks.gpu.machine import describe
from benchmarks.gpu.page import write_page

ROOT = Path(__file__).resolve().parents[2]
_LOGS = ROOT / "runs" / "gpu"
# Imports, the device's context and the process group; a CPU that tries this may have other work.
_START = {"cuda": 90.0, "cpu": 240.0}
_LEAST = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks with one of these parts in their names")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for all of it (default: 520)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json; runs/gpu/gpu.json on a CPU")
    parser.add_argument("--page", type=Path, help="default: docs/gpu.md; runs/gpu/gpu.md on a CPU")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget
    is_cpu = args.device == "cpu"
    output = args.output or ROOT / ("runs/gpu" if is_cpu else "benchmarks/results") / "gpu.json"
    page = args.page or (ROOT / "runs/gpu/gpu.md" if is_cpu else ROOT / "docs/gpu.md")
    chosen = [c for c in CHECKS if not args.only or any(part in c.name for part in args.only)]
    if not chosen:
        parser.error(f"--only: got {' '.join(args.only)}; takes parts of: {', '.join(c.name for c in CHECKS)}")
    environment = _environment(args.device)
    facts = describe(args.device, environment)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = {row["check"]: row for row in (json.loads(output.read_text())["rows"] if output.exists() else [])}
    new = []
    for group, checks in groupby(chosen, key=lambda check: check.group):
        for row in _run_group(group, list(checks), facts["devices"], environment, deadline):
            row = {**row, "command": command, "device": args.device, **facts}
            new.append(row)
            # What the time did not reach is no news of a check that has been run before.
            if row["state"] != "not run" or row["check"] not in rows:
                rows[row["check"]] = row
            passed = time.monotonic() - deadline + args.budget
            print(f"[{passed:4.0f} s] {row['state']}: {row['check']} {row.get('says', '')}", flush=True)
            _replace(output, json.dumps({"rows": _ordered(rows)}, indent=1) + "\n")
    write_page(_ordered(rows), ROOT / "docs/gpu.md", page)
    print(f"{output}\n{page}")
    return int(any(row["state"] == "failed" for row in new))


def _ordered(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """As the checks are listed; rows of checks that are no more are left out."""
    return [rows[check.name] for check in CHECKS if check.name in rows]


def _run_group(
    group: str, checks: Sequence[Check], devices: int, environment: dict[str, str], deadline: float
) -> Iterator[dict[str, Any]]:
    """A row for each check, in their order. Processes end with a check that fails; new ones take those after it."""
    ranks = RANKS[group] or min(4, devices)
    left = list(checks)
    while left:
        if not ranks:
            yield from ({"check": check.name, "state": "not run", "says": "takes a GPU"} for check in left)
            return
        if time.monotonic() + _LEAST > deadline:
            yield from ({"check": check.name, "state": "not run", "says": "out of time"} for check in left)
            return
        for row in _run_processes(group, list(left), ranks, environment, deadline):
            left.pop(0)
            yield row


def _run_processes(
    group: str, checks: Sequence[Check], ranks: int, environment: dict[str, str], deadline: float
) -> Iterator[dict[str, Any]]:
    """Rows up to the first check that fails, or to the last one."""
    with tempfile.TemporaryDirectory(prefix="sdp-gpu-") as folder:
        rows, log = Path(folder, "rows"), _LOGS / f"{group}-{time.strftime('%H%M%S')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        rows.touch()
        with log.open("wb") as output:
            process = subprocess.Popen(
                _command(group, checks, ranks, rows, deadline - time.monotonic()),
                cwd=ROOT,
                env={**environment, "TMPDIR": folder},
                stdout=output,
                stderr=output,
            )
        try:
            began = time.monotonic()
            for place, check in enumerate(checks):
                end = min(
                    began + check.limit + (_START[environment["DS_ACCELERATOR"]] if place == 0 else 0.0), deadline
                )
                row = _await_row(process, rows, check.name, end)
                if row is None:
                    is_late = process.poll() is None
                    if is_late and time.monotonic() >= deadline:
                        yield {"check": check.name, "state": "not run", "says": "out of time"}
                        return
                    how = f"no end in {end - began:.0f} s" if is_late else f"its processes ended ({process.returncode})"
                    yield {"check": check.name, "state": "failed", "says": f"{how}: {_last_words(log)}"}
                    return
                yield row
                if row["state"] == "failed":
                    return
                began = time.monotonic()
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            return
        finally:
            _end(process)


def _command(group: str, checks: Sequence[Check], ranks: int, rows: Path, seconds: float) -> list[str]:
    launch = [sys.executable, str(ROOT / "benchmarks" / "systems" / "launch.py"), "--loopback", "--ranks", str(ranks)]
    program = [str(ROOT / "benchmarks" / "gpu" / "program.py"), "--group", group, "--rows", str(rows)]
    return [*launch, "--time_limit", str(max(1.0, seconds)), *program, "--checks", *(check.name for check in checks)]


def _await_row(process: subprocess.Popen[bytes], rows: Path, name: str, end: float) -> dict[str, Any] | None:
    """The row of a check that has ended, once it is there."""
    while True:
        is_over = process.poll() is not None
        found = [row for row in map(json.loads, rows.read_text().splitlines()) if row["check"] == name]
        ended = [row for row in found if row["state"] != "begun"]
        if ended:
            return ended[0]
        if is_over or time.monotonic() > end:
            return None
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """launch.py ends its ranks when it is asked to."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-400:]


def _environment(device: str) -> dict[str, str]:
    # DeepSpeed compiles for what it finds; it cannot read architectures with a letter (9.0a), which torch takes.
    given = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    return {
        **given,
        "DS_ACCELERATOR": device,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks" / "systems"), *_paths()]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "DS_SKIP_CUDA_CHECK": "1",
    }


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _replace(path: Path, text: str) -> None:
    staging = path.with_suffix(path.suffix + ".part")
    staging.write_text(text)
    os.replace(staging, path)


if __name__ == "__main__":
    sys.exit(main())
