"""Configuration from anywhere: what is wrong is said in a few short lines, at once."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.config import SDPConfig, read_json
from deepspeed_sdp.errors import ConfigError

NAN = float("nan")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "block",
    [
        {"num_subnetworks": 10**9},
        {"plan": {"chunk_multiple": 10**30}},
        {"plan": {"seed": 10**400}},
        {"plan": {"seed": 10**5000}},
        {"plan": {"max_owner_sets": 10**6}},
        {"plan": {"seq_length": 10**400}},
        {"coverage": NAN},
        {"coverage": 10**5000},
        {"coverage": nested(50_000)},
        {"coverage": {"x" * 10**5: 1}},
        {"coverage": {"mlp": 10**30}},
        {"plan": {"worker_capacity": [1] * 10**6}},
        {"plan": {"worker_capacity": [-1] * 10_000}},
        {"plan": {"worker_capacity": [NAN, 1]}},
        {"plan": {"worker_capacity": [10**400, 1]}},
        {"shared_modules": [1] * 10**6},
        {"plan": {"design": "q" * 10**6}},
        {"x" * 10**6: 1},
        {str(i): i for i in range(10_000)},
        {1: 2},
    ],
    ids=lambda block: str(next(iter(block)))[:20],
)
def test_hostile_values_are_refused_at_once(block: dict[Any, Any]) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        SDPConfig.parse(block)
    assert time.process_time() - start < 2
    lines = str(caught.value).splitlines()
    assert len(lines) <= 10
    assert all(len(line) < 1000 for line in lines)


@pytest.mark.parametrize("workers", [8, 16_384])
def test_a_coverage_too_small_names_few_others(workers: int) -> None:
    with pytest.raises(ConfigError, match="coverage: got 1e-300 with") as caught:
        SDPConfig.parse({"coverage": 1e-300}).owners(workers)
    assert len(str(caught.value)) < 500


@given(
    st.dictionaries(
        st.sampled_from(sorted(SDPConfig.model_fields)),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=4),
            st.lists(st.one_of(st.integers(), st.floats()), max_size=4),
            st.dictionaries(st.text(max_size=4), st.floats(), max_size=2),
        ),
        max_size=3,
    )
)
def test_any_values_are_a_config_or_refused(block: dict[str, Any]) -> None:
    refusal = ""
    try:
        json.dumps(SDPConfig.parse(block).model_dump(), allow_nan=False)
    except ConfigError as error:
        refusal = str(error)
    assert "\n\n" not in refusal


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "an integer of 10000 digits"),
        (b'{"seed": 0, "seed": 1}', 'the key "seed" stands twice'),
        (b'{"coverage": NaN}', "got NaN"),
        (b'{"coverage": 1e999}', "got 1e999"),
        (b"\xff\xfe", "is not a text file"),
        (b" " * (2**24 + 1), "is larger than 16 MiB"),
        (b'{"seed": 0,}', "is not valid JSON: line 1"),
        (b"[]", "holds a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_files_are_refused_in_one_line(text: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "sdp.json"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_json(file, "sdp_config")
    message = str(caught.value)
    assert message.startswith(f"sdp_config: {file} ")
    assert words in message
    assert "\n" not in message
