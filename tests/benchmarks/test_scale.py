"""benchmarks/scale.py: one rank of many, through the engine's own start and step, and the price of what it sends."""

import json
import subprocess
import sys

import pytest

from tests.support.ranks import ROOT, rank_environment

sys.path.insert(0, str(ROOT / "benchmarks"))

import scale

RESULTS, DOCS = ROOT / "benchmarks" / "results" / "scale.json", ROOT / "docs" / "scale.md"


def simulated(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--one", "--models", "llama-15m", *arguments]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("stage", "masking"),
    [
        ("3", "forward"),
        pytest.param("1", "forward", marks=pytest.mark.slow),
        pytest.param("2", "backward", marks=pytest.mark.slow),
    ],
)
def test_one_rank_of_many_starts_and_steps_in_one_process(stage, masking):
    row = simulated("--worlds", "64", "--stages", stage, "--masking", masking)
    assert (row["num_subnetworks"], row["owners_per_unit"], row["owner_sets"]) == (8, 4, 14)
    assert set(scale.STARTING) < set(row["seconds"])
    gathers = [message for message in row["messages"] if message[0] == "all-gather"]
    assert gathers
    assert any(message[0] == "reduce-scatter" for message in row["messages"])
    assert all(1 < ranks <= 64 and 1 <= nodes <= 8 for _, ranks, nodes, _, _ in row["messages"])
    # What crosses the links as the engine counts it, and as it was seen where torch is called.
    seen = sum(count * nbytes * (ranks - 1) // ranks for _, ranks, _, nbytes, count in row["messages"])
    assert seen == pytest.approx(sum(row["sent"].values()), rel=1e-3)
    cost = scale.priced(row, scale.Links())
    assert 0 < cost["tree_latency"] < cost["ring_latency"]
    assert "llama-15m" in scale.tables({"rows": [row]})


def test_a_ring_takes_a_hop_for_each_rank_and_a_tree_for_each_halving():
    links = scale.Links(launch=0.0, hop_inside=1.0, hop_outside=10.0)
    assert links.ring_latency("all-gather", 8, 1) == 7
    assert links.ring_latency("reduce-scatter", 32, 4) == 28 + 3 * 10
    assert links.ring_latency("all-reduce", 32, 4) == 2 * (28 + 30)
    assert links.tree_latency("all-gather", 32, 4) == 7 + 2 * 10
    assert links.ring_latency("all-gather", 256, 256) == 2550
    assert links.tree_latency("all-gather", 256, 256) == 80


def test_a_group_sends_through_the_network_cards_of_its_ranks():
    links = scale.Links(inside=100.0, outside=10.0)
    assert links.transfer("all-gather", 4, 1, 400) == pytest.approx(3.0)
    assert links.transfer("all-gather", 4, 4, 400) == pytest.approx(30.0)
    assert links.transfer("all-reduce", 8, 2, 800) == pytest.approx(2 * 700 / 40)


def test_the_page_shows_the_figures_as_they_are():
    assert scale.tables(json.loads(RESULTS.read_text())) in DOCS.read_text(), "paste what benchmarks/scale.py prints"
