"""Estimated memory and traffic beside what real ranks allocate and send.

    python benchmarks/estimate.py --output benchmarks/results/estimate.json

Starts 4 gloo ranks itself. The model is the one of tests/estimate/test_memory.py; ``state``: short sequences, so that
weights, gradients and optimizer weigh most; ``activations``: long ones. Peaks are of torch's CPU allocator, of the
heaviest rank; of plain DeepSpeed, whose ranks are alike, the median.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deepspeed_sdp.options import OptionParser
from tests.estimate.test_memory import MODEL, SHAPES, ds_config, estimate, measured_peak
from tests.support.ranks import RankPool

CONTENDERS = {
    "deepspeed": None,
    "forward 1/2": {"coverage": 0.5},
    "forward 1/2, blocks": {"coverage": 0.5, "granularity": "layer"},
    "backward 1/2": {"coverage": 0.5, "masking": "backward"},
    "backward 1/2, blocks": {"coverage": 0.5, "masking": "backward", "granularity": "layer"},
}


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    pool = RankPool(4)
    rows = []
    try:
        for name, sdp in CONTENDERS.items():
            for stage in range(3 if sdp and "masking" in sdp else 4):
                rows += [row(pool, name, sdp, stage, shape) for shape in SHAPES]
    finally:
        pool.stop()
    print("| engine | ZeRO | weighs most | estimated MB | measured MB | estimated / measured | sent |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        sent = f"{r['sent_estimated'] / r['sent']:.3f}" if r["sent"] else ""
        print(
            f"| {r['engine']} | {r['stage']} | {r['shape']} | {r['estimated'] / 1e6:.2f} | {r['measured'] / 1e6:.2f} | "
            f"{r['estimated'] / r['measured']:.3f} | {sent} |"
        )
    if args.output:
        settings = {"model": MODEL, "ranks": 4, "torch": torch.__version__, "python": platform.python_version()}
        settings["date"] = time.strftime("%Y-%m-%d")
        args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def row(pool: RankPool, name: str, sdp: dict | None, stage: int, shape: str) -> dict:
    batch, length = SHAPES[shape]
    measured = pool.run(
        "tests.estimate.cases:measure",
        timeout=180,
        config=MODEL,
        ds=ds_config(stage, batch),
        sdp=sdp,
        batch=batch,
        length=length,
    )
    expected, _, _ = estimate(stage, sdp, shape)
    return {
        "engine": name,
        "stage": stage,
        "shape": shape,
        "estimated": expected.peak,
        "measured": measured_peak(measured, sdp),
        "sent_estimated": sum(expected.sent.values()),
        "sent": max(sum(of_rank.get("sent", {}).values()) for of_rank in measured),
    }


if __name__ == "__main__":
    main()
