"""Tables of designs and of balance: `python -m deepspeed_sdp.plan.table [designs | few | balance | capacity]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed_sdp.plan.build import make_plan
from deepspeed_sdp.plan.classes import sets_per_worker
from deepspeed_sdp.plan.designs import make_design
from deepspeed_sdp.plan.mixing import spectral_gap_bound
from deepspeed_sdp.plan.units import UnitSpace

_RHO = "\N{GREEK SMALL LETTER RHO}"
# hidden size, MLP size, layers: LLaMA 1B, TinyLlama, OpenLLaMA 3B, LLaMA 7B, each also one layer shorter.
_SHAPES = ((2048, 5461, 24), (2048, 5632, 22), (3200, 8640, 26), (4096, 11008, 32))
_QUERY_HEADS, _SEQUENCE_LENGTH = 32, 2048
_COVERAGES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
# Workers that a job has by default at most, and the owner sets that it then has where they are not gloo's.
_FEW = (8, 16)
_CAPACITIES: tuple[tuple[int, tuple[float, ...]], ...] = (
    (2, (1, 1, 0.5, 0.5)),
    (3, (2, 1, 1, 1)),
    (4, (1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5)),
    (4, (1, 1, 1, 1, 1, 1, 1, 0.25)),
    (6, (4, 2, 1, 1, 1, 1, 1, 1)),
    (8, (1,) * 12 + (0.5,) * 4),
)


@dataclass(frozen=True)
class DesignRow:
    """The `"auto"` design for one `(N, K)`.

    Attributes:
        chunks: of a weight that a worker holds.
        turns: classes until the design begins again, those that stand in it several times counted as often.
        limit: no plan with `max_owner_sets` beats this gap, if its workers own equally much.
    """

    num_subnetworks: int
    owners_per_unit: int
    design: str
    owner_sets: int
    chunks: int
    turns: int
    gap: float
    bound: float
    limit: float


def design_table(max_n: int = 16, max_owner_sets: int = 64, seed: int = 0) -> list[DesignRow]:
    """The designs for all `2 ≤ K < N ≤ max_n`."""
    rows = []
    for n in range(3, max_n + 1):
        for k in range(2, n):
            design = make_design("auto", n, k, max_owner_sets=max_owner_sets, seed=seed)
            rows.append(
                DesignRow(
                    num_subnetworks=n,
                    owners_per_unit=k,
                    design=design.name,
                    owner_sets=len(design.owner_sets),
                    chunks=sets_per_worker(design.classes[0], n),
                    turns=len(design.classes),
                    gap=design.spectral_gap,
                    bound=spectral_gap_bound(n, k),
                    limit=gap_limit(n, k, max_owner_sets),
                )
            )
    return rows


def gap_limit(num_workers: int, owners_per_unit: int, max_owner_sets: int) -> float:
    """What no plan with at most so many owner sets beats if its workers own equally much, however its sets weigh.

    If two workers `i, j` share no set, the vector `e_i - e_j` shows that `λ₂(W) ≥ 1/K`. To hold every pair takes at
    least Schönheim's `⌈N/K · ⌈(N-1)/(K-1)⌉⌉` sets: a worker needs `⌈(N-1)/(K-1)⌉` to meet all others.
    """
    n, k = num_workers, owners_per_unit
    bound = spectral_gap_bound(n, k)
    if k == 1:
        return bound
    per_worker = -(-(n - 1) // (k - 1))
    return bound if max_owner_sets >= -(-n * per_worker // k) else min(bound, 1.0 - 1.0 / k)


def render_designs(rows: Sequence[DesignRow]) -> str:
    """Markdown."""
    lines = [
        f"| N | K | design | owner sets | chunks | turns | {_RHO} | {_RHO}/{_RHO}* | at most |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        limit = row.limit / row.bound
        lines.append(
            f"| {row.num_subnetworks} | {row.owners_per_unit} | {row.design} | {row.owner_sets} | {row.chunks} | "
            f"{row.turns} | {_shown(row.gap)} | {_shown(row.gap / row.bound)} | {_shown(limit)} |"
        )
    return "\n".join(lines)


def llama_spaces(
    layers: int, hidden: int, kv_heads: int, mlp: int, sequence_length: int = _SEQUENCE_LENGTH
) -> list[UnitSpace]:
    """KV groups and MLP neurons of a LLaMA with 32 query heads; attention FLOPs without the causal half saved."""
    head, group = hidden // _QUERY_HEADS, _QUERY_HEADS // kv_heads
    numel = hidden * head * (2 * group + 2)
    attention_flops = 6.0 * numel + 12.0 * sequence_length * head * group
    spaces = []
    for i in range(layers):
        spaces.append(UnitSpace(f"model.layers.{i}.self_attn", "attention", i, kv_heads, numel, attention_flops))
        spaces.append(UnitSpace(f"model.layers.{i}.mlp", "mlp", i, mlp, 3 * hidden, 18.0 * hidden))
    return spaces


def render_balance() -> str:
    """Markdown: the worst imbalance over the LLaMA shapes, for each `(N, K, KV heads)`."""
    lines = ["| N | K | KV heads | FLOPs | bytes | worst shape |", "| --- " * 6 + "|"]
    for n in (4, 6, 8, 16):
        for k in (round(n * c) for c in _COVERAGES if (n * c).is_integer()):
            for kv_heads in (4, 8, 16, 32):
                worst = (-1.0, 0.0, "")
                for hidden, mlp, depth in _SHAPES:
                    for layers in (depth, depth - 1):
                        plan = make_plan(llama_spaces(layers, hidden, kv_heads, mlp), n, owners_per_unit=k)
                        shape = f"{layers} x ({hidden}, {mlp})"
                        worst = max(worst, (plan.flop_imbalance, plan.byte_imbalance, shape))
                lines.append(f"| {n} | {k} | {kv_heads} | {worst[0]:.2%} | {worst[1]:.2%} | {worst[2]} |")
    return "\n".join(lines)


def render_capacity() -> str:
    """Markdown: how near workers of unequal capacity come to their due, LLaMA 1B."""
    lines = [f"| K | capacities | KV heads | owner sets | {_RHO} | FLOPs over due |", "| --- " * 6 + "|"]
    for k, capacity in _CAPACITIES:
        for kv_heads in (4, 32):
            spaces = llama_spaces(22, 2048, kv_heads, 5632)
            plan = make_plan(spaces, len(capacity), owners_per_unit=k, worker_capacity=capacity)
            shown = ", ".join(f"{value:g}" for value in capacity)
            lines.append(
                f"| {k} | {shown} | {kv_heads} | {len(plan.used_sets)} | {_shown(plan.spectral_gap)} | "
                f"{plan.flop_imbalance:.2%} |"
            )
    return "\n".join(lines)


def _shown(value: float) -> str:
    """Three digits; what lies between two of them up to the last bit of a float is rounded up everywhere."""
    return f"{value + 1e-12:.3f}"


def main(arguments: Sequence[str]) -> str:
    """The table named by the first argument, `designs` if there is none."""
    tables = {
        "designs": lambda: render_designs(design_table()),
        "few": lambda: render_designs(design_table(*_FEW)),
        "balance": render_balance,
        "capacity": render_capacity,
    }
    name = arguments[0] if arguments else "designs"
    if name not in tables or len(arguments) > 1:
        raise SystemExit(f"got {' '.join(arguments)!r}, takes one of {', '.join(tables)}")
    return tables[name]()


if __name__ == "__main__":
    print(main(sys.argv[1:]))
