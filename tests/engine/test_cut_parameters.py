"""Weights larger than a round are cut at element ranges: the same training, in bounded buffers."""

import itertools

import pytest
import torch

from tests.engine import test_checkpoints
from tests.engine.test_against_oracle import check
from tests.support.compare import assert_owners_equal

OWNER_SETS = {"comm": {"transport": "owner_sets"}}
ALL_TO_ALL = {"comm": {"transport": "all_to_all"}}
HALF = {"coverage": 0.5}
BACKWARD = {**HALF, "masking": "backward"}
TIED = {"tie_word_embeddings": True}
BIASES = {"attention_bias": True, "mlp_bias": True}
# Weights have 512 to 3,104 elements: those of the MLP fall into two to four rounds, embeddings into four to seven.
CUTS = (500, 1000)
OVERLAPPED = {**BACKWARD, "backward": {"overlap_refresh": True}}


def row(name, *, sdp=HALF, stage=1, bucket=500, model=None, slow=False, **ds):
    ds = {"stage": stage, "bucket": bucket, **ds}
    values = {"family": "llama", "model": model or {}, "sdp": sdp, "ds": ds}
    return pytest.param(values, id=name, marks=pytest.mark.slow if slow else [])


@pytest.mark.parametrize(
    "values",
    [
        row("stage0-tied-clip", stage=0, model=TIED, clip=1.0),
        row("stage1-owner_sets", sdp={**HALF, **OWNER_SETS}, clip=1.0),
        row("stage2-accumulate-three_quarters", stage=2, sdp={"coverage": 0.75}, accumulation=2),
        row("stage3-tied-accumulate", stage=3, model=TIED, accumulation=2),
        row("stage3-owner_sets-clip", stage=3, sdp={**HALF, **OWNER_SETS}, clip=1.0),
        row("backward-stage0-tied", sdp=BACKWARD, stage=0, model=TIED, slow=True),
        row("backward-stage1-biases-overlapped", sdp=OVERLAPPED, model=BIASES, clip=1.0),
        row("backward-stage2-tied-accumulate", sdp=BACKWARD, stage=2, model=TIED, accumulation=2),
        row("backward-layers", sdp={**BACKWARD, "granularity": "layer"}, model={"num_hidden_layers": 4}),
        *(
            row(f"stage{stage}-{transport}-bucket{bucket}", sdp={**sdp, "comm": {"transport": transport}}, stage=stage,
                bucket=bucket, model=model, clip=1.0, accumulation=2, slow=True)
            for stage, transport, bucket, (sdp, model) in itertools.product(
                range(4), ("owner_sets", "all_to_all"), CUTS,
                [({"coverage": 0.75}, TIED), (HALF, BIASES), (BACKWARD, TIED),
                 ({"num_subnetworks": 2, "coverage": 0.5}, {})],
            )
            if not (stage == 0 and transport == "all_to_all") and not (stage == 3 and "masking" in sdp)
        ),
    ],
)  # fmt: skip
def test_training_equals_the_simulation(ranks4, values):
    check(ranks4, values, 4)


@pytest.mark.parametrize(
    ("stage", "sdp", "bf16"),
    [
        (1, HALF, True),
        (3, HALF, True),
        pytest.param(2, {"coverage": 0.75}, False, marks=pytest.mark.slow),
        (2, BACKWARD, True),
        pytest.param(3, HALF, False, marks=pytest.mark.slow),
        pytest.param(1, BACKWARD, False, marks=pytest.mark.slow),
    ],
)
def test_cuts_change_no_bit_where_sums_go_by_rank(ranks4, stage, sdp, bf16):
    sdp = {**sdp, **ALL_TO_ALL}
    whole, cut = (
        ranks4.run(
            "tests.engine.cases:train",
            timeout=60,
            sdp=sdp,
            model=TIED,
            ds={"stage": stage, "bf16": bf16, "bucket": bucket, "accumulation": 2},
        )
        for bucket in (500_000, 500)
    )
    assert_owners_equal(cut)
    assert [result["losses"] for result in cut] == [result["losses"] for result in whole]
    for name, value in whole[0]["full"].items():
        assert torch.equal(value, cut[0]["full"][name]), name


PAIRS = [
    ({"stage": 3, "bucket": 500}, HALF, {"stage": 1, "bucket": 4000}, BACKWARD),
    ({"stage": 2, "bucket": 1000}, BACKWARD, {"stage": 3, "bucket": 500}, {"coverage": 0.75}),
    ({"stage": 0}, HALF, {"stage": 2, "bucket": 500}, HALF),
    ({"stage": 1, "bucket": 500}, {"coverage": 0.75}, {"stage": 0, "bucket": 700}, BACKWARD),
]


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=pytest.mark.slow if place > 1 else []) for place, pair in enumerate(PAIRS)]
)
def test_checkpoints_go_from_one_bucket_size_to_another(pools, tmp_path, monkeypatch, pair):
    ds, sdp, other_ds, other_sdp = pair
    monkeypatch.setitem(test_checkpoints.LAYOUTS, "cut", (sdp, ds))
    test_checkpoints.check_pair(pools, tmp_path, "cut", (other_sdp, other_ds), model=BIASES)


LARGE = {"vocab_size": 8000}


@pytest.mark.parametrize(
    "sdp",
    [
        OWNER_SETS,
        {**ALL_TO_ALL},
    ],
    ids=str,
)
@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_copies_of_gradients_take_two_rounds_however_large_a_weight_is(ranks4, sdp, masking):
    """An embedding of 256,000 elements, and rounds of 5,000."""
    results = ranks4.run(
        "tests.engine.cut_cases:flat_copies",
        timeout=60,
        ds={"stage": 1, "bucket": 5000},
        sdp={**HALF, "masking": masking, **sdp},
        model=LARGE,
    )
    for seen in results:
        assert seen["embedding"] == 4 * 256_000
        # Alignment is to 4 ranks * 8 elements.
        assert seen["copied"] <= 4 * (5000 + 32)
        # What is received is as large as what is sent.
        times = 2 if sdp["comm"]["transport"] == "all_to_all" else 1
        assert seen["on_their_way"] <= 2 * times * 4 * (5000 + 32)
        # The gradient at hand, at ZeRO-1 the shard of the head's average, and what is on its way.
        assert seen["peak"] <= (1 + 1 / 4) * seen["embedding"] + seen["on_their_way"] + 40_000
