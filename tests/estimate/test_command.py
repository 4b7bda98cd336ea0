"""``deepspeed-sdp estimate``."""

import json

import pytest
from PIL import Image

from deepspeed_sdp.cli import main


def run(capsys, *arguments):
    code = main(["estimate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


NARROW = ("--coverage", "0.5", "--granularity", "neuron", "--seq_length", "256")


def test_a_table_a_picture_and_a_file(capsys, tmp_path):
    code, out, _ = run(
        capsys, "--model", "llama-15m", *NARROW, "--plot", str(tmp_path / "e.png"), "--out", str(tmp_path / "e.json")
    )
    assert code == 0
    assert "8 x h100, 8 subnetworks" in out
    assert out.count("DeepSpeed  ") == 4
    assert "SDP backward neuron 1/2" in out
    data = json.loads((tmp_path / "e.json").read_text())
    # Each without activation checkpointing and with it.
    assert len(data["estimates"]) == 2 * (4 + 4 + 3)
    assert [row["activation_checkpointing"] for row in data["estimates"]] == [False, True] * 11
    for row in data["estimates"]:
        assert sum(row["memory"].values()) == row["peak"] > 0
        assert row["seconds"]["step"] > 0
    with Image.open(tmp_path / "e.png") as picture:
        assert len(picture.convert("L").getcolors(1 << 16)) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "e.png"]


def test_a_recipe_s_own_row_comes_first(capsys, tmp_path):
    recipe = {
        "model": {"path": "llama-15m"},
        "data": {"seq_length": 128},
        "length": {"steps": 5},
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
        },
        "subnetwork_data_parallel": {"coverage": 0.75, "granularity": "layer", "num_subnetworks": 4},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    arguments = ("--recipe", str(tmp_path / "recipe.json"), "--coverage", "0.5")
    code, out, _ = run(capsys, *arguments, "--top", "3")
    assert code == 0
    assert "2 x 128 tokens" in out
    rows = out.split("\n\n")[1].splitlines()
    assert rows[1].startswith("> SDP forward layer 3/4")
    assert len(rows) == 1 + 1 + 3
    job = json.loads(run(capsys, *arguments, "--json")[1])["job"]
    assert (job["zero_stage"], job["coverage"], job["seq_length"]) == (3, 0.75, 128)


def rows_of(out):
    return out.split("\n\n")[1].splitlines()[1:]


def test_the_quickest_that_fit_are_never_some_that_do_not(capsys):
    arguments = ("--model", "llama-15m", *NARROW, "--all", "--reserved_gb", "0", "--top", "20")
    everything = rows_of(run(capsys, *arguments)[1])
    assert len(everything) == 4 + 4 + 3
    peaks = sorted(float(row.split()[-2].rstrip("*")) for row in everything)
    few = rows_of(run(capsys, *arguments, "--gpu_memory_gb", str(peaks[3] + 0.005))[1])
    assert 0 < len(few) < len(everything)
    assert not any("does not fit" in row for row in few)
    out = run(capsys, *arguments, "--gpu_memory_gb", "0.001")[1]
    assert "Nothing fits on a h100; shown is what takes least." in out
    assert all("does not fit" in row for row in rows_of(out))


def test_one_way_alone_can_be_asked_for(capsys):
    out = run(capsys, "--model", "llama-15m", *NARROW, "--activation_checkpointing", "--json")[1]
    assert {row["activation_checkpointing"] for row in json.loads(out)["estimates"]} == {True}


def test_work_is_announced_beside_the_figures(capsys):
    _, out, err = run(capsys, "--model", "llama-15m", *NARROW, "--zero", "1", "--json")
    assert err == "estimating 3 strategies ...\n"
    json.loads(out)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama-7b", "llama-70b", "llama-405b"])
def test_large_models_on_many_gpus(capsys, model):
    code, out, _ = run(capsys, "--model", model, "--gpus", "4096", "--num_subnetworks", "64", "--json")
    assert code == 0
    estimates = json.loads(out)["estimates"]
    assert len(estimates) == 2 * 74
    assert any(row["fits"] for row in estimates if row["zero_stage"] == 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model: got none"),
        (("--model", "gpt-9"), "--model: gpt-9 is no file, folder or preset"),
        (("--model", "llama-15m", "--gpus", "0"), "--gpus: got 0; takes a number from 1 on"),
        (("--model", "llama-15m", "--gpus", "6", "--num_subnetworks", "4"), "takes a divisor of --gpus, which is 6"),
        (("--model", "llama-15m", "--seq_length", "1"), "--seq_length: got 1; takes a number from 2 on"),
        (("--model", "llama-15m", "--mfu", "0"), "--mfu: got 0.0; takes a number above 0"),
        (("--model", "llama-15m", "--zero", "1,4"), "--zero: got 4; takes 0, 1, 2 or 3"),
        (("--model", "llama-15m", "--gpu", "abacus"), "--gpu: got abacus; takes one of"),
        (("--model", "llama-15m", "--coverage", "1/3"), "coverage: got 0.333333 with 8 subnetworks"),
        (("--model", "llama-15m", *NARROW, "--plot", "/proc/x/y.png"), "cannot write /proc/x/y.png"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err
