"""What the checks run on: found by a process of its own, so that the one that waits for them holds no device."""

import json
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PROBE = """
import json, torch
found = {"devices": 0, "gpu": None, "cuda": torch.version.cuda, "nccl": None}
if torch.cuda.is_available():
    found["devices"] = torch.cuda.device_count()
    found["gpu"] = torch.cuda.get_device_name()
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(found))
"""


def describe(device: str, environment: dict[str, str]) -> dict[str, Any]:
    """``devices``, ``versions`` and ``date``; of a CPU there are no devices."""
    found: dict[str, Any] = {"devices": 0, "gpu": None, "cuda": None, "nccl": None}
    if device != "cpu":
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        if not found["devices"]:
            raise SystemExit("--device: got cuda, and torch sees none; takes cpu for a trial at toy size")
    packages = {name: _version(name) for name in ("torch", "deepspeed", "transformers")}
    return {
        "devices": found["devices"],
        "versions": {
            "python": sys.version.split()[0],
            **packages,
            "nccl": found["nccl"],
            "cuda": found["cuda"],
            "driver": _driver(),
            "gpu": found["gpu"],
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return (done.stdout.splitlines() or [None])[0]
