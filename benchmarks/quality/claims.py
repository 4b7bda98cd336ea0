"""Sentences of the documents, made from the rows that their tables are made from.

A sentence that the rows no longer bear out is refused, so that a new measurement cannot leave an old conclusion.
"""

import textwrap
from collections.abc import Mapping, Sequence

from benchmarks.quality.methods import ENDS_SHARED
from benchmarks.quality.tables import DENSE, Losses, Results, difference, mean_and_error, paired
from deepspeed_sdp.errors import DataError

HALF, SMALL_DENSE, BACKWARD = "forward, neurons, 1/2", "dense, half the units", "backward, neurons, 1/2"
# Tokens of the dense training per parameter; docs/quality.md has the sizes.
TOKENS = {"small": 2, "wide": 5, "long": 7, "deep": 8, "narrow": 47}
Sizes = Mapping[str, Results]


def flops(sizes: Sizes, size: str, name: str) -> Losses:
    """Losses at equal FLOPs by seed; none where the row was not run."""
    return sizes[size].losses(name, "flops") if size in sizes else {}


def beside(sizes: Sizes, name: str, other: str = DENSE, equal: str = "flops") -> dict[str, tuple[float, float, int]]:
    """Mean paired difference of two rows, its standard error and its seeds, where both were run."""
    found = {}
    for size in TOKENS:
        if size in sizes:
            mine, theirs = (sizes[size].losses(row, equal) for row in (name, other))
            if (both := paired(mine, theirs)) is not None:
                found[size] = (*both, len(mine.keys() & theirs.keys()))
    return found


def listed(differences: Mapping[str, tuple[float, float, int]]) -> str:
    """``+0.073 at 5 tokens per parameter (1 seed), +0.098 at 7 (2 seeds)``."""
    unit = " tokens per parameter"
    found = []
    for size, (mean, error, count) in differences.items():
        found.append(f"{difference((mean, error)) or '0.000'} at {TOKENS[size]}{unit} ({_count(count, 'seed')})")
        unit = ""
    return ", ".join(found)


def in_short(sizes: Sizes) -> str:
    """The list at the top of quality.md."""
    half, ends, least = beside(sizes, HALF), beside(sizes, ENDS_SHARED), beside(sizes, SMALL_DENSE)
    _holds(all((mean > 0.0) == (size != "small") for size, (mean, *_) in half.items()), "1/2 behind dense but at first")
    against = beside(sizes, SMALL_DENSE, HALF)
    _holds(all(mean < 0.0 for mean, *_ in against.values()), "the smaller dense model ahead of 1/2 everywhere")
    gains = {size: gain for size in sizes if (gain := _gain(sizes[size], HALF)) is not None}
    return _items(
        [
            "1. **Forward masking at 1/2 of every layer is behind dense training at equal FLOPs once the training is "
            f"not very short**: {listed(half)}. The first is what more and cheaper steps are worth at the start of a "
            "training.",
            "2. **A dense model with half of the units**, as small as a subnetwork, on the same FLOPs, is ahead of "
            f"that wherever both were run: {listed(against)} beside it, and {listed(least)} beside the full dense "
            "model. Every unit of it sees every token; a unit of SDP sees those of its owners.",
            f"3. **Calibrating the full model** closes a part of the gap at no cost: {min(gains.values()):.3f} to "
            f"{max(gains.values()):.3f} of 1/2's loss, by size. It is built in (`engine.calibrate`), and on by "
            "default.",
            f"4. **The first and the last layer shared and the rest at 1/4** is {listed(ends)} beside dense. "
            f"{_ends_caveat(sizes)} It is not the default.",
            "5. The defaults (balanced design, `inverse_sqrt_coverage`, static masks) are confirmed at the longer "
            "budget; two findings of the short one against them turned out to be of the short one alone.",
        ]
    )


def given_up(sizes: Sizes) -> str:
    """The list in when.md."""
    tokens = {name: beside(sizes, name, equal="tokens") for name in (HALF, BACKWARD)}
    _holds(all(mean > 0.0 for row in tokens.values() for mean, *_ in row.values()), "SDP behind dense at equal tokens")
    ends = beside(sizes, ENDS_SHARED)
    return _items(
        [
            f"- at equal **tokens** SDP is behind dense training: forward masking at 1/2 by {listed(tokens[HALF])}, "
            f"backward masking by {listed(tokens[BACKWARD])};",
            "- at equal **FLOPs** forward masking at 1/2 of every layer, beside dense: "
            f"{listed(beside(sizes, HALF))}. That is with the calibrated full model, which is the default;",
            "- with the first and the last layer **shared** and the rest at 1/4, "
            f"{listed(ends)} beside dense. {_ends_caveat(sizes)}",
            f"- **a dense model as small as a subnetwork**, on the same FLOPs, beside 1/2 of every layer: "
            f"{listed(beside(sizes, SMALL_DENSE, HALF))}; beside shared ends: "
            f"{listed(beside(sizes, SMALL_DENSE, ENDS_SHARED))}. It needs as little memory, and nothing of this "
            "package. Take SDP for a model that you want at its full size: because more will be done with it, or "
            "because at your scale it is worth it, which these models are too small to show.",
        ]
    )


def in_readme(sizes: Sizes) -> str:
    """What the first page says of losses."""
    return _items(
        [
            "- half of every layer (forward masking, calibrated), beside the dense model of the same FLOPs: "
            f"{listed(beside(sizes, HALF))} nats per token;",
            "- a smaller dense model that needs as little memory, beside that half: "
            f"{listed(beside(sizes, SMALL_DENSE, HALF))}.",
        ]
    )


def options(sizes: Sizes) -> str:
    """What the options at the longer budget say."""
    long = sizes["long"]

    def change(variant: str) -> str:
        found = paired(long.losses(f"{HALF}; {variant}", "flops"), long.losses(HALF, "flops"))
        if found is None:
            raise DataError(f"results: no training of {variant!r} at size 'long'; make bench-quality runs it")
        return difference(found) or "0.000"

    short = paired(flops(sizes, "small", f"{HALF}; same split in every layer"), flops(sizes, "small", HALF))
    return _items(
        [
            f"- **`output_scaling`**: after calibration none ({change('no scaling')}) and the default hardly differ: "
            "a factor in the forward pass is undone by the calibration, and what is left is a change of the writes' "
            "initial values and learning rate. As trained, `inverse_sqrt_coverage` is far better than none. Scaling "
            "by inverse coverage with writes x 0.5 is the same in another form: subnetworks compute as small models "
            "do, and the full model is their mean.",
            f"- **Design**: the same split in every layer, which won the short budget ({difference(short)}), loses "
            f"the longer one ({change('same split in every layer')}): a unit that always met the same others cannot "
            "work with the rest.",
            f"- **Resampling every step**: {change('resampled every step')}, with units drawn one by one; the "
            "engine's `schedule` moves chunks of them.",
            f"- **A dense phase at the end**, of 10 % of the FLOPs: {change('last 10 percent dense')}. It brings "
            "what calibration brings, and needs the dense model's memory while it lasts.",
            f'- **Attention left whole** (`partition: ["mlp"]`): {change("MLP alone")} at equal FLOPs, inside '
            "the noise of one seed; it saves less.",
            f"- **Quieter writes**: {change('writes x 0 71')}.",
        ]
    )


def _items(items: Sequence[str]) -> str:
    return "\n".join(
        textwrap.fill(item, 150, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        for item in items
    )


def _ends_caveat(sizes: Sizes) -> str:
    count = sum(len(flops(sizes, size, ENDS_SHARED)) for size in sizes)
    return (
        f"Those are {_count(count, 'training')} in all, and two controls have still to be measured: the trained model "
        "with its cut layers left out, and a dense model of the shared layers alone on the same FLOPs. Until then any "
        "parity may be that of the shared layers alone."
    )


def _gain(results: Results, name: str) -> float | None:
    found = paired(results.losses(name, "flops", "loss"), results.losses(name, "flops"))
    return None if found is None else mean_and_error([found[0]])[0]


def _count(count: int, of: str) -> str:
    return f"{count} {of}{'s' * (count != 1)}"


def _holds(is_so: bool, claim: str) -> None:
    if not is_so:
        raise DataError(f"benchmarks/quality/claims.py: the results do not bear out {claim!r} any more; rewrite it")
