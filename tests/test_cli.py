"""The console script."""

import json
from pathlib import Path

import pytest
from PIL import Image

from deepspeed_sdp.cli import main
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.presets import preset_names

KEYS = {
    "num_subnetworks", "owners_per_unit", "coverage", "owner_sets", "connected", "spectral_gap", "spectral_gap_bound",
    "flop_imbalance", "byte_imbalance", "masking", "bytes_per_worker",
    "bytes_held_per_worker", "plan_hash", "process_groups", "bytes_sent_per_step",
}  # fmt: skip


def run(capsys, *arguments):
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_as_json(capsys, tmp_path):
    code, out, _ = run(
        capsys, "--model", "tinyllama-1.1b", "--num_subnetworks", "8", "--coverage", "0.5", "--json",
        "--out", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png"),
    )  # fmt: skip
    summary = json.loads(out)
    assert code == 0
    assert set(summary) >= KEYS
    assert summary["owner_sets"] == summary["process_groups"] == 14
    assert summary["flop_imbalance"] < 0.02
    assert summary["bytes_of_full_model"] == 2 * 1_100_048_384
    assert len(set(summary["bytes_per_worker"])) == 1
    # Half of the partitioned parameters, and all of the shared ones, 2 bytes each.
    shared = summary["parameters"] - summary["partitioned_parameters"]
    assert summary["bytes_per_worker"][0] == 2 * (shared + summary["partitioned_parameters"] // 2)
    plan = SubnetworkPlan.from_json((tmp_path / "plan.json").read_text())
    assert plan.hash == summary["plan_hash"]
    with Image.open(tmp_path / "plan.png") as picture:
        assert len(picture.convert("L").getcolors(1 << 16)) > 10


def test_rounds_are_drawn(capsys, tmp_path):
    arguments = ("--model", "llama-15m", "--num_subnetworks", "4", "--rounds")
    code, *_ = run(capsys, *arguments, "3", "--resample", "random", "--plot", str(tmp_path / "rounds.png"))
    assert code == 0
    with Image.open(tmp_path / "rounds.png") as picture:
        assert len(picture.convert("L").getcolors(1 << 16)) > 10
    for wrong in (("3",), ("0", "--plot", str(tmp_path / "rounds.png"))):
        code, _, error = run(capsys, *arguments, *wrong)
        assert code
        assert error.endswith(f"--rounds: got {wrong[0]}; takes a number from 1 on, and --plot for the picture\n")


def test_plan_as_text_names_units_and_sizes(capsys):
    code, out, _ = run(capsys, "--model", "llama-15m", "--num_subnetworks", "4", "--granularity", "layer")
    assert code == 0
    assert "layer 6" in out
    assert "MB" in out
    assert "connected" in out


def test_backward_masking_holds_the_full_model_and_sends_what_is_not_owned(capsys):
    arguments = ("--model", "tinyllama-1.1b", "--num_subnetworks", "8", "--coverage", "0.5", "--json")
    forward = json.loads(run(capsys, *arguments)[1])
    backward = json.loads(run(capsys, *arguments, "--masking", "backward")[1])
    assert backward["bytes_held_per_worker"] == [backward["bytes_of_full_model"]] * 8
    assert backward["bytes_per_worker"] == forward["bytes_per_worker"] == forward["bytes_held_per_worker"]
    refreshed = 2 * backward["partitioned_parameters"] // 2
    for before, after in zip(forward["bytes_sent_per_step"], backward["bytes_sent_per_step"], strict=True):
        assert after == before + refreshed


def test_plans_by_kind_and_capacity(capsys):
    code, out, _ = run(
        capsys, "--model", "llama-134m", "--num_subnetworks", "4", "--coverage", "mlp=0.5,attention=0.75",
        "--worker_capacity", "1,1,0.5,0.5", "--json",
    )  # fmt: skip
    summary = json.loads(out)
    assert code == 0
    assert summary["owners_per_unit"] == {"attention": 3, "mlp": 2}
    first, *_, last = summary["bytes_per_worker"]
    assert first > last


def test_fractions_are_coverages(capsys):
    arguments = ("--model", "llama-15m", "--num_subnetworks", "4", "--json")
    half, kinds = (json.loads(run(capsys, *arguments, "--coverage", c)[1]) for c in ("1/2", "mlp=1/2,attention=3/4"))
    assert half["owners_per_unit"] == 2
    assert kinds["owners_per_unit"] == {"attention": 3, "mlp": 2}


def test_a_block_is_a_start_and_options_override_it(capsys, tmp_path):
    (tmp_path / "sdp.json").write_text(
        json.dumps({"num_subnetworks": 4, "coverage": 0.25, "plan": {"design": "cyclic"}})
    )
    wrapped = {"subnetwork_data_parallel": {"num_subnetworks": 4}}
    (tmp_path / "wrapped.json").write_text(json.dumps(wrapped))
    of_wrapped = ("--model", "llama-15m", "--sdp_config", str(tmp_path / "wrapped.json"), "--json")
    assert json.loads(run(capsys, *of_wrapped)[1])["num_subnetworks"] == 4
    arguments = ("--model", "llama-15m", "--sdp_config", str(tmp_path / "sdp.json"), "--json")
    assert json.loads(run(capsys, *arguments)[1])["owners_per_unit"] == 1
    assert json.loads(run(capsys, *arguments, "--coverage", "3/4")[1])["owners_per_unit"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--model", "gpt-9", "--num_subnetworks", "4"),
            "--model: gpt-9 is no file, folder or preset; presets are llama",
        ),
        (("--model", "llama-15m", "--gpus", "7"), "got 0.5 (the default) with 7 subnetworks"),
        (("--model", "llama-15m", "--gpus", "8", "--num_subnetworks", "3"), "got 3 with a world size of 8"),
        (("--model", "llama-15m", "--num_subnetworks", "4", "--coverage", "0.3"), "takes a whole number of owners"),
        (("--model", "llama-15m", "--num_subnetworks", "4", "--out", "/proc/x/y"), "cannot write /proc/x/y"),
        (("--model", "llama-15m", "--num_subnetworks", "4", "--shared_modules", "model"), "shares every unit"),
        (("--model", "llama-15m", "--num_subnetworks", "4", "--worker_capacity", "1,2"), "got 2 numbers"),
        (("--model", "llama-15m", "--num_subnetworks", "8", "--max_owner_sets", "2"), "max_owner_sets"),
    ],
)
def test_impossible_wishes_are_one_line(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize("change", ["another", "damaged", "other workers"])
def test_a_plan_file_that_does_not_fit_is_refused(capsys, tmp_path, change):
    plan = tmp_path / "plan.json"
    run(capsys, "--model", "llama-15m", "--num_subnetworks", "4", "--out", str(plan))
    if change == "damaged":
        plan.write_text(plan.read_text()[:-20])
    (tmp_path / "sdp.json").write_text(json.dumps({"plan": {"file": str(plan)}}))
    model = "llama-134m" if change == "another" else "llama-15m"
    workers = "6" if change == "other workers" else "4"
    code, _, err = run(
        capsys, "--model", model, "--num_subnetworks", workers, "--sdp_config", str(tmp_path / "sdp.json")
    )
    assert code == 1
    expected = {
        "another": "is of another model or granularity: it has model.layers.0.self_attn with 6 units",
        "damaged": "JSON",
        "other workers": "is for 4 workers; got num_subnetworks 6",
    }[change]
    assert expected in err


def test_workers_are_by_default_those_of_a_job(capsys):
    def workers(command, *arguments):
        assert main([command, "--model", "llama-15m", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    one = ("--zero", "0", "--masking", "forward", "--granularity", "neuron", "--coverage", "1/2")
    for ranks, expected in (("512", 8), ("12", 6)):
        assert workers("plan", "--gpus", ranks)["num_subnetworks"] == expected
        estimates = workers("estimate", "--gpus", ranks, "--seq_length", "64", *one)["estimates"]
        assert {e["num_subnetworks"] for e in estimates} == {None, expected}
    assert workers("plan")["num_subnetworks"] == 8
    assert workers("plan", "--coverage", "3/4")["owner_sets"] == 16
    assert workers("plan", "--coverage", "3/4", "--max_owner_sets", "64")["owner_sets"] == 28


def test_a_plan_file_for_more_than_64_workers_takes_the_key(capsys, tmp_path):
    big, plan = ("--model", "llama-134m", "--coverage", "1/2"), tmp_path / "plan.json"
    assert run(capsys, *big, "--num_subnetworks", "128", "--out", str(plan))[0] == 0
    (tmp_path / "sdp.json").write_text(json.dumps({"plan": {"file": str(plan)}}))
    of_file = ("--model", "llama-134m", "--sdp_config", str(tmp_path / "sdp.json"))
    code, _, err = run(capsys, *of_file, "--gpus", "128")
    assert code == 1
    assert "is for 128 workers; takes num_subnetworks 128 beside it, as every plan for more than 64" in err
    assert run(capsys, *of_file, "--num_subnetworks", "128")[0] == 0


def test_presets_have_the_sizes_of_their_names():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"llama-15m": 15e6, "llama-134m": 134e6, "llama-500m": 500e6, "llama-1b": 1.3e9, "tinyllama-1.1b": 1.1e9}
    sizes |= {"llama-7b": 6.7e9, "llama-8b-gqa": 8e9, "llama-70b": 70e9, "llama-405b": 405e9}
    assert set(sizes) <= set(preset_names())
    for name, expected in sizes.items():
        file = Path(__file__).parents[1] / "deepspeed_sdp" / "presets" / f"{name}.json"
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.05)
