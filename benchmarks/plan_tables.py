"""Tables of docs/plans.md: the gaps of designs, the balance of plans, workers of unequal capacity.

python -m benchmarks.plan_tables [designs | many | balance | capacity]
"""

import sys
from collections.abc import Sequence

from deepspeed_sdp.plan import UnitSpace, make_design, make_plan
from deepspeed_sdp.plan.gap import spectral_gap_bound

RHO = "\N{GREEK SMALL LETTER RHO}"
# Hidden size, MLP size, layers: LLaMA 1B, TinyLlama, OpenLLaMA 3B, LLaMA 7B.
SHAPES = ((2048, 5461, 24), (2048, 5632, 22), (3200, 8640, 26), (4096, 11008, 32))
QUERY_HEADS, SEQUENCE_LENGTH = 32, 2048
CAPACITIES: tuple[tuple[int, tuple[float, ...]], ...] = (
    (2, (1, 1, 0.5, 0.5)),
    (3, (2, 1, 1, 1)),
    (4, (1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5)),
    (4, (1, 1, 1, 1, 1, 1, 1, 0.25)),
    (8, (1,) * 12 + (0.5,) * 4),
)


def llama_spaces(layers: int, hidden: int, kv_heads: int, mlp: int) -> list[UnitSpace]:
    """KV groups and MLP neurons of a LLaMA with 32 query heads; attention FLOPs without the causal half saved."""
    head, group = hidden // QUERY_HEADS, QUERY_HEADS // kv_heads
    numel = hidden * head * (2 * group + 2)
    attention_flops = 6.0 * numel + 12.0 * SEQUENCE_LENGTH * head * group
    spaces = []
    for i in range(layers):
        spaces.append(UnitSpace(f"model.layers.{i}.self_attn", "attention", i, kv_heads, numel, attention_flops))
        spaces.append(UnitSpace(f"model.layers.{i}.mlp", "mlp", i, mlp, 3 * hidden, 18.0 * hidden))
    return spaces


def designs(sizes: Sequence[tuple[int, int]], bounds: Sequence[int]) -> str:
    """The gap of the ``auto`` design with at most so many owner sets, as a share of the bound."""
    lines = [
        f"| N | K | chunks | {RHO}* | {' | '.join(f'{RHO}/{RHO}* with {m} (sets)' for m in bounds)} |",
        "| --- " * (4 + len(bounds)) + "|",
    ]
    for n, k in sizes:
        cells = []
        for most in bounds:
            design = make_design("auto", n, k, max_owner_sets=most)
            share = design.spectral_gap / spectral_gap_bound(n, k) + 1e-9
            cells.append(f"{share:.3f} ({len(design.owner_sets)})")
        chunks = design.classes[0].per_worker
        lines.append(f"| {n} | {k} | {chunks} | {spectral_gap_bound(n, k):.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def balance() -> str:
    """The worst excess over the mean for the shapes, whole and one layer shorter."""
    lines = ["| N | K | KV heads | FLOPs | bytes |", "| --- " * 5 + "|"]
    for n, k in ((4, 2), (6, 3), (8, 2), (8, 3), (8, 4), (8, 6), (16, 6), (16, 8), (16, 12)):
        for kv_heads in (4, 8, 32):
            plans = [
                make_plan(llama_spaces(layers, hidden, kv_heads, mlp), n, owners_per_unit=k)
                for hidden, mlp, depth in SHAPES
                for layers in (depth, depth - 1)
            ]
            flops, size = max(p.flop_imbalance for p in plans), max(p.byte_imbalance for p in plans)
            lines.append(f"| {n} | {k} | {kv_heads} | {flops:.2%} | {size:.2%} |")
    return "\n".join(lines)


def capacity() -> str:
    """How near workers of unequal capacity come to their due, LLaMA 1B."""
    lines = [f"| K | capacities | KV heads | owner sets | {RHO} | FLOPs over due |", "| --- " * 6 + "|"]
    for k, values in CAPACITIES:
        for kv_heads in (4, 32):
            spaces = llama_spaces(22, 2048, kv_heads, 5632)
            plan = make_plan(spaces, len(values), owners_per_unit=k, worker_capacity=values)
            shown = ", ".join(f"{value:g}" for value in values)
            lines.append(
                f"| {k} | {shown} | {kv_heads} | {len(plan.used_sets)} | {plan.spectral_gap:.3f} | "
                f"{plan.flop_imbalance:.2%} |"
            )
    return "\n".join(lines)


TABLES = {
    "designs": lambda: designs([(n, k) for n in range(3, 10) for k in range(2, n)], (16, 64)),
    "many": lambda: designs([(n, k) for n in (10, 12, 16, 24, 32) for k in range(2, n) if n % k == 0], (64, 256)),
    "balance": balance,
    "capacity": capacity,
}


if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        if name not in TABLES:
            raise SystemExit(f"got {name!r}, takes one of {', '.join(TABLES)}")
        print(TABLES[name](), end="\n\n")
