"""The tables and the figure of benchmarks/systems, from a small results file."""

import importlib
import json
import re
import sys

import pytest

from deepspeed_sdp.errors import DataError, OutputError
from tests.support.ranks import ROOT


@pytest.fixture(scope="module")
def documents():
    """The module, which finds its neighbours beside itself as a script does."""
    folder = str(ROOT / "benchmarks" / "systems")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("documents")
    finally:
        sys.path.remove(folder)
        for name in ("documents", "tables", "sweep_tables", "figure"):
            sys.modules.pop(name, None)


SETTINGS = {
    "command": "python benchmarks/systems/run.py",
    "options": {
        "precision": "fp32",
        "hidden_size": 64,
        "layers": 2,
        "vocab_size": 320,
        "micro_batch": 2,
        "sequence": 8,
    },
    "ranks": 4,
    "backend": "gloo",
    "faked_peers": False,
    "network": "loopback",
    "matmul_ceiling": 4e9,
    "hardware": {"device": "cpu", "cpu": "a CPU", "cores": 2},
    "versions": {"python": "3.11", "torch": "2.13", "deepspeed": "0.19.8"},
    "date": "2026-01-01",
}


def row(name, system, seconds, peak, sent, coverage="1", **more):
    memory = {"peak": peak, "weights": 2e6, "gradients": 1e6, "optimizer": 1e6, "activations": 1e6, "rest": peak - 5e6}
    predicted = {"weights": 2e6, "gradients": 1e6, "optimizer": 1e6, "flops": 2e9, "sent": sent}
    return {
        "contender": name,
        "system": system,
        "stage": None if system == "ddp" else 1,
        "coverage": coverage,
        "masking": "forward" if system == "sdp" else None,
        "granularity": "neuron" if system == "sdp" else None,
        "checkpointing": False,
        "rate": None,
        "tokens": 64,
        "seconds": seconds,
        "memory": {**memory, "largest_gradients": 1e6, "largest_activations": 1e6},
        "flops": 2e9,
        "sent": sent,
        "wire": 1.01 * sent,
        "losses": [5.5],
        "predicted": predicted,
        **more,
    }


CONTENDERS = [
    row("DDP", "ddp", [1.0, 1.1, 1.2], 20e6, 6e6),
    row("SDP forward neuron 1/2 ZeRO-1", "sdp", [0.5, 0.6, 0.7], 10e6, 3e6, "1/2", flops=1e9, losses=[5.6]),
    {"contender": "FSDP2", "system": "fsdp2", "reason": "RuntimeError: no | such operation"},
]


def link_rows():
    for rate, dense, half in ((None, 1.0, 0.8), (1e8, 3.0, 0.9)):
        labels = {"axis": "link", "at": rate, "rate": rate}
        yield row("DeepSpeed ZeRO-1", "deepspeed", [dense], 20e6, 8e7, **labels)
        yield row("SDP forward neuron 1/2 ZeRO-1", "sdp", [half], 10e6, 3e6, "1/2", **labels)


def sweep_rows():
    labels = {"axis": "sequence", "at": 16}
    yield row("DeepSpeed ZeRO-1", "deepspeed", [1.0, 1.2], 20e6, 6e6, **labels)
    yield row("SDP forward neuron 1/2 ZeRO-1", "sdp", [0.5, 0.6], 10e6, 3e6, "1/2", flops=1e9, **labels)


@pytest.fixture
def place(tmp_path):
    """A folder of results and one of documents, whose comments say where tables go."""
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    rows = {"systems": CONTENDERS, "systems_134m": CONTENDERS, "sweep": [*sweep_rows(), *link_rows()]}
    for name, of_file in rows.items():
        (results / f"{name}.json").write_text(json.dumps({"settings": SETTINGS, "rows": of_file}))
    for name, keys in {
        "benchmarks": ("some systems", "larger", "link"),
        "../benchmarks/results/systems": ("systems", "sweep"),
        "when": ("when", "when on a link"),
        "../README": ("readme",),
    }.items():
        places = "\n".join(f"before {key}\n<!-- begin {key} -->\nold\n<!-- end {key} -->\nafter" for key in keys)
        (docs / f"{name}.md").write_text(places)
    return results, docs


def test_documents_get_the_measured_figures(documents, place):
    results, docs = place
    documents.write_documents(results, docs)
    pages = [docs / "benchmarks.md", docs.parent / "benchmarks" / "results" / "systems.md"]
    text = "".join(page.read_text() for page in pages)
    assert "old" not in text
    assert text.count("before") == text.count("after") == 5
    larger = text.partition("<!-- begin larger -->")[2].partition("<!-- end larger -->")[0]
    assert "| peak / DDP |" in larger
    assert "s/step" not in larger
    ddp = next(line for line in text.splitlines() if line.startswith("| DDP |"))
    assert "1.100 (1.050 to 1.150)" in ddp
    half = next(line for line in text.splitlines() if line.startswith("| SDP forward neuron 1/2 ZeRO-1 | **10.0**"))
    # 64 tokens in 0.6 s; 10^9 FLOPs in 0.6 s of 4 * 10^9 in a second.
    assert "**107**" in half
    assert " 42 " in half
    assert "cannot run: RuntimeError: no \\| such operation" in text
    assert (docs / "systems.png").stat().st_size > 10_000


def test_the_best_of_each_column_is_bold_and_the_loss_is_not(documents, place):
    results, docs = place
    documents.write_documents(results, docs)
    lines = (docs / "benchmarks.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| DDP |", "| SDP forward neuron 1/2 ZeRO-1 | "))][:2]
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in rows]
    for ddp, half in zip(*cells, strict=True):
        both = ddp.startswith("**") and half.startswith("**")
        # Figures that are equal are best together; the loss, which stands last, never is.
        assert not both or ddp == half
    assert cells[0][-1] == "5.5000"
    assert cells[1][-1] == "5.6000"
    share = [row[9] for row in cells]
    assert share == ["**45**", "42"]


def test_a_link_is_told_with_what_computing_and_sending_in_turn_would_take(documents, place):
    results, docs = place
    documents.write_documents(results, docs)
    text = (docs / "benchmarks.md").read_text()
    assert re.search(r"\| DeepSpeed ZeRO-1 \| 80.0 \| 1.000 \| 3.000 → 1.800 \|", text)
    when = (docs / "when.md").read_text()
    assert "| 100 MB/s | SDP forward neuron 1/2 ZeRO-1 | 0.900 | DeepSpeed ZeRO-1 | 3.000 |" in when


def test_filling_twice_is_filling_once(documents, place):
    results, docs = place
    documents.write_documents(results, docs)
    once = (docs / "benchmarks.md").read_text()
    documents.write_documents(results, docs)
    assert (docs / "benchmarks.md").read_text() == once


def test_a_document_without_its_place_is_named_and_left_alone(documents, place):
    results, docs = place
    (docs / "benchmarks.md").write_text("nothing here\n")
    with pytest.raises(OutputError, match=r"benchmarks\.md: takes a place"):
        documents.write_documents(results, docs)
    assert (docs / "benchmarks.md").read_text() == "nothing here\n"


@pytest.mark.parametrize("content", [None, "{", "[]", '{"settings": {}, "rows": []}'])
def test_results_that_are_none_are_named(documents, place, content):
    results, docs = place
    (results / "sweep.json").unlink()
    if content is None:
        (results / "systems.json").unlink()
    else:
        (results / "systems.json").write_text(content)
    with pytest.raises(DataError, match="systems"):
        documents.write_documents(results, docs)


def test_the_documents_of_this_tree_have_the_places(documents, place, tmp_path):
    results, _ = place
    docs = tmp_path / "tree"
    docs.mkdir()
    for name in ("benchmarks.md", "when.md"):
        (docs / name).write_text((ROOT / "docs" / name).read_text())
    documents.write_documents(results, docs)
    assert "1.100 (1.050 to 1.150)" in (docs / "benchmarks.md").read_text()
