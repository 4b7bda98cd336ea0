"""What is compared: one row each. A row without a learning rate of its own takes that of the row it varies."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality.training import Method, Phase, Size, with_sdp

SIZES = {
    # 267 thousand parameters
    "small": Size(64, 176, 4, 4, 512, 64, 8, 2, 480),
    # A tenth and a fiftieth of the steps: what averages gradients in every step sends then as much as local steps do
    "tenth": Size(64, 176, 4, 4, 512, 64, 8, 2, 48),
    "fiftieth": Size(64, 176, 4, 4, 512, 64, 8, 2, 10),
    # The first on four times the budget: 7 tokens of a dense training per parameter instead of 2
    "long": Size(64, 176, 4, 4, 512, 64, 8, 2, 1920),
    # 83 thousand parameters and 47 tokens of a dense training for each: the end of a training rather than its start
    "narrow": Size(32, 88, 4, 4, 512, 64, 8, 2, 3840),
    # 183 thousand in three times as many layers, 8 tokens per parameter
    "deep": Size(32, 88, 12, 4, 512, 64, 8, 2, 1440),
    # 0.93 million, twice as wide; 5 tokens per parameter
    "wide": Size(128, 352, 4, 8, 512, 64, 8, 2, 4800),
    # 2.0 million
    "large": Size(144, 400, 8, 4, 512, 64, 8, 4, 700),
    "smoke": Size(16, 32, 4, 4, 512, 64, 8, 1, 12),
}


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: unique.
        group: what is run together.
        method: what is trained.
        like: the row whose tuned learning rate it takes; ``None``: it is tuned itself.
        equal_tokens: whether it is run at equal tokens as well; others are the same there, or vary a row.
        variant: what it changes of the row it varies.
    """

    name: str
    group: str
    method: Method
    like: str | None = None
    equal_tokens: bool = False
    variant: str | None = None


DENSE = Method()
BLOCK: Mapping[str, Any] = {"granularity": "layer"}
UNITS = ("neurons", "blocks")
MASKINGS: Mapping[str, Mapping[str, Any]] = {"forward": {}, "backward": {"masking": "backward"}}
COVERAGES = {"1/2": 0.5, "3/4": 0.75, "1/4": 0.25}
SCALINGS = {"no scaling": "none", "scaling by 1/sqrt(C)": "inverse_sqrt_coverage", "scaling by 1/C": "inverse_coverage"}
NEURON = Method({"coverage": 0.5})


def _block(masking: str, units: str, coverage: str) -> dict[str, Any]:
    """Keys of the SDP block. Four layers of two owners each leave workers apart, so at 1/4 blocks are branches."""
    keys = {"coverage": COVERAGES[coverage], **MASKINGS[masking], **(BLOCK if units == "blocks" else {})}
    return {**keys, "granularity": "branch"} if (units, coverage) == ("blocks", "1/4") else keys


_NEURON, _BLOCK = "forward, neurons, 1/2", "forward, blocks, 1/2"
ENDS_SHARED = f"{_NEURON}; first and last shared rest at 1 4"
# Curves of a picture: the rows that differ in coverage alone.
CURVES = {
    f"{masking} masking of {units}": [f"{masking}, {units}, {coverage}" for coverage in COVERAGES]
    for masking, units in itertools.product(MASKINGS, UNITS)
}


def _main() -> list[Row]:
    """What is tuned. Dense training at equal FLOPs is dense training at equal tokens."""
    halves = {
        f"{masking}, {units}, 1/2": Method(_block(masking, units, "1/2"))
        for masking, units in itertools.product(MASKINGS, UNITS)
    }
    rows = [Row("dense", "main", DENSE)]
    rows += [Row(name, "main", method, equal_tokens=True) for name, method in halves.items()]
    for coverage in ("3/4", "1/4"):
        method = Method({"coverage": COVERAGES[coverage]})
        rows.append(Row(f"forward, neurons, {coverage}", "main", method, equal_tokens=True))
    # What more and smaller steps are worth by themselves.
    rows.append(Row("dense, half the batch", "main", Method(sequences=1)))
    rows.append(Row(f"{_NEURON}, half the batch", "main", Method(NEURON.sdp, sequences=1)))
    # A model as small as a subnetwork: what SDP must beat to be worth its while.
    rows.append(Row("dense, half the units", "main", Method(share=0.5), equal_tokens=True))
    rows.append(Row("dense, dropout 0.1", "main", Method(dropout=0.1)))
    rows.append(Row("dense, stochastic depth 0.2", "main", Method(stochastic_depth=0.2), equal_tokens=True))
    return rows


def _more() -> list[Row]:
    """The other coverages."""
    names = [name.split(", ") for name in ("forward, blocks", "backward, neurons", "backward, blocks")]
    return [
        Row(
            f"{masking}, {units}, {coverage}",
            "more",
            Method(_block(masking, units, coverage)),
        )
        for (masking, units), coverage in itertools.product(names, ("3/4", "1/4"))
    ]


def _product() -> list[Row]:
    """Everything with everything; without the rows that the defaults of the others are."""
    rows = []
    designs = {
        "balanced": {},
        "cyclic": {"plan": {"design": "cyclic"}},
        "random": {"plan": {"design": "random"}},
        "same split": {},
    }
    for (masking, units, coverage), (scaling, value), (design, keys), resampled in itertools.product(
        itertools.product(MASKINGS, UNITS, COVERAGES), SCALINGS.items(), designs.items(), ("static", "resampled")
    ):
        is_default = value == "inverse_sqrt_coverage"
        if masking == "backward" and not is_default:  # which has no scaling
            continue
        if is_default and design == "balanced" and resampled == "static":
            continue
        if (units, coverage, design) == ("blocks", "1/4", "random"):  # leaves workers apart, so the package refuses it
            continue
        block = {**_block(masking, units, coverage), **keys}
        if masking == "forward":
            block["output_scaling"] = value
        parent = f"{masking}, {units}, {coverage}"
        name = ", ".join([*([scaling] if masking == "forward" else []), design, resampled])
        method = Method(block, same_split=design == "same split", resample_interval=int(resampled == "resampled"))
        rows.append(Row(f"{parent}; {name}", "product", method, like=parent, variant=name))
    return rows


def _of(group: str, parent: str, **variants: Method) -> list[Row]:
    named = {name.replace("_", " "): method for name, method in variants.items()}
    return [Row(f"{parent}; {name}", group, m, like=parent, variant=name) for name, m in named.items()]


def _defaults() -> list[Row]:
    block = Method({"coverage": 0.5, **BLOCK})
    first, last = "model.layers.0", "model.layers.{last}"
    ends_shared = with_sdp(NEURON, shared_modules=[first, last], coverage=0.25)
    return [
        Row(ENDS_SHARED, "main", ends_shared),
        *_of(
            "defaults",
            _NEURON,
            no_scaling=with_sdp(NEURON, output_scaling="none"),
            scaling_by_inverse_coverage=with_sdp(NEURON, output_scaling="inverse_coverage"),
            same_split_in_every_layer=Method(NEURON.sdp, same_split=True),
            random_design=with_sdp(NEURON, plan={"design": "random"}),
            cyclic_design=with_sdp(NEURON, plan={"design": "cyclic"}),
            resampled_every_step=Method(NEURON.sdp, resample_interval=1),
            resampled_every_20_steps=Method(NEURON.sdp, resample_interval=20),
            MLP_alone=with_sdp(NEURON, partition=["mlp"]),
            MLP_alone_at_1_4=with_sdp(NEURON, partition=["mlp"], coverage=0.25),
            first_layer_shared=with_sdp(NEURON, shared_modules=[first]),
            last_layer_shared=with_sdp(NEURON, shared_modules=[last]),
        ),
        *_of(
            "defaults",
            _BLOCK,
            no_scaling=with_sdp(block, output_scaling="none"),
            scaling_by_inverse_coverage=with_sdp(block, output_scaling="inverse_coverage"),
            branches_as_units=with_sdp(block, granularity="branch"),
            resampled_every_step=Method(block.sdp, resample_interval=1),
        ),
    ]


def _schedules() -> list[Row]:
    """Plans that change, as the engine's block ``schedule`` has them; shares of the FLOPs, and not of the steps."""
    moving = {
        f"{how}_every_{steps}": Method(NEURON.sdp, resample_interval=steps, resample=how)
        for how in ("rotate", "random")
        for steps in (1, 20, 200)
    }
    quarter, dense = Phase(0.4, {"coverage": 0.25}), Phase(0.2, {"coverage": 1.0})
    growing = {
        "quarter_then_half": Method(NEURON.sdp, first=quarter),
        "quarter_then_half_then_dense": Method(NEURON.sdp, first=quarter, last=dense),
        "half_then_20_percent_dense": Method(NEURON.sdp, last=dense),
    }
    return _of("schedules", _NEURON, **moving, **growing)


def _local() -> list[Row]:
    """Local steps, dense (DiLoCo) and with subnetworks: ``schedule.sync_interval`` and ``schedule.outer_optimizer``."""
    return [
        row
        for name, sdp in (("dense", {"coverage": 1.0}), (_NEURON, NEURON.sdp))
        for row in _of(
            "local",
            name,
            **{
                f"{interval}_local_steps{', outer' * outer}": Method(sdp, sync_interval=interval, outer=outer)
                for interval in (10, 50)
                for outer in (False, True)
            },
        )
    ]


def averaged(method: Method) -> Method:
    """Subnetworks that compute as a model of their size would, and the full model with the mean of what they add."""
    return replace(with_sdp(method, output_scaling="inverse_coverage"), writes=method.sdp["coverage"])


def _averaged() -> list[Row]:
    """What calibration amounts to, in initial values and learning rates: nothing is left to calibrate."""
    name, method = f"{_NEURON}; scaling by inverse coverage and writes x 0 5", averaged(NEURON)
    backward = {"masking": "backward", "output_scaling": "none"}
    ends = {
        "last 10 percent dense": Phase(0.1, {"coverage": 1.0}),
        "last 20 percent dense": Phase(0.2, {"coverage": 1.0}),
        "last 20 percent backward masking": Phase(0.2, backward),
    }
    return [
        Row(name, "main", method),
        *(
            Row(f"{name} then {end}", "gap", replace(method, last=phase), like=name, variant=end)
            for end, phase in ends.items()
        ),
    ]


def _gap() -> list[Row]:
    quiet = 0.5**0.5

    def at_end(share: float, coverage: float) -> Method:
        return Method(NEURON.sdp, last=Phase(share, {"coverage": coverage}))

    return [
        # What no scaling and a full model scaled by sqrt(C) amount to, and what that does to dense training.
        *_of("gap", "dense", writes_x_0_71=Method(writes=quiet), writes_x_0_5=Method(writes=0.5)),
        *_of("gap", "dense, half the batch", writes_x_0_71=Method(sequences=1, writes=quiet)),
        *_of("gap", _NEURON, writes_x_0_71=Method(NEURON.sdp, writes=quiet)),
        *_of(
            "gap",
            _NEURON,
            last_10_percent_dense=at_end(0.1, 1.0),
            last_20_percent_dense=at_end(0.2, 1.0),
            last_5_percent_dense=at_end(0.05, 1.0),
            first_10_percent_dense=Method(NEURON.sdp, first=Phase(0.1, {"coverage": 1.0})),
            last_20_percent_at_3_4=at_end(0.2, 0.75),
            last_20_percent_backward_masking=Method(
                NEURON.sdp, last=Phase(0.2, {"masking": "backward", "output_scaling": "none"})
            ),
            last_3_percent_norms_of_the_dense_model=Method(NEURON.sdp, last=Phase(0.03, {"coverage": 1.0}, True)),
            rate_of_partitioned_x_0_71=Method(NEURON.sdp, partitioned_lr=0.5**0.5),
            rate_of_partitioned_x_0_5=Method(NEURON.sdp, partitioned_lr=0.5),
            rate_of_partitioned_x_1_41=Method(NEURON.sdp, partitioned_lr=2**0.5),
        ),
        *_of(
            "gap",
            _BLOCK,
            last_10_percent_dense=Method({"coverage": 0.5, **BLOCK}, last=Phase(0.1, {"coverage": 1.0})),
            scaling_by_inverse_coverage_and_writes_x_0_5=averaged(Method({"coverage": 0.5, **BLOCK})),
        ),
        *_of(
            "gap",
            "forward, neurons, 1/4",
            scaling_by_inverse_coverage_and_writes_x_0_25=averaged(Method({"coverage": 0.25})),
        ),
        *_of(
            "gap",
            "forward, neurons, 3/4",
            scaling_by_inverse_coverage_and_writes_x_0_75=averaged(Method({"coverage": 0.75})),
        ),
    ]


def _designs() -> list[Row]:
    """What differ in nothing but who owns what (benchmarks/results/designs.md)."""
    names = ("auto", "cyclic", "random")
    return [
        Row(
            f"{parent}; design {name}",
            "designs",
            Method({"coverage": coverage, "plan": {"design": name}}),
            like=parent,
            variant=f"design {name}",
        )
        for (parent, coverage), name in itertools.product(((_NEURON, 0.5), ("forward, neurons, 1/4", 0.25)), names)
    ]


GROUPS = ("main", "defaults", "gap", "more", "product", "designs", "schedules", "local")
_ALL = (_main, _averaged, _more, _defaults, _gap, _product, _designs, _schedules, _local)
ROWS = {row.name: row for rows in _ALL for row in rows()}
