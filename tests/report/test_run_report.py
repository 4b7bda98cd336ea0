"""The report of a run: its data, its page, and its pictures."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from deepspeed_sdp.plan import UnitSpace, make_plan
from deepspeed_sdp.report import RunFacts, RunReport, plan_summary, plot_plan, plot_rounds, to_markdown


def spaces(layers=3, neurons=344, heads=4):
    made = []
    for layer in range(layers):
        made.append(UnitSpace(f"model.layers.{layer}.self_attn", "attention", layer, heads, 4096))
        made.append(UnitSpace(f"model.layers.{layer}.mlp", "mlp", layer, neurons, 96))
    return made


def plan_of(n, k, design="auto", model=None, **options):
    return make_plan(model or spaces(), n, owners_per_unit=k, design=design, chunk_multiple=8, **options)


def state(weights):
    return {"weights": weights, "gradients": weights * 2, "optimizer": weights * 3, "total": weights * 6}


def facts_of(plan, masking="forward"):
    flops = tuple(1e6 + worker for worker in range(plan.num_subnetworks))
    return RunFacts("LlamaForCausalLM", plan.total_numel + 1000, plan, masking, "neuron", 2048, 3e6, flops)


def report_of(plan, dense=True, masking="forward", **changes):
    ranks = [
        {
            "model_state_bytes": state(1_234_567 + rank),
            "mean_bytes_sent": 7_654_321 + rank,
            "bytes_sent_by_kind": {"gradients": 7_000_000, "parameters": 654_321 + rank},
            "owned_numel": 400_000 + rank,
        }
        for rank in range(plan.num_subnetworks)
    ]
    made = {
        "unigram_val_loss": 4.5,
        "train_losses": [(10, 4.0), (20, 3.25), (30, 2.7512)],
        "val_losses": [(15, 3.9), (30, 2.9876)],
        "ranks": ranks,
        "dense_state_bytes": [state(3_000_000)] * plan.num_subnetworks if dense else None,
        "reduce_bucket_numel": 200_000 if dense else None,
        "seconds": 12.0,
        "timed_steps": 20,
        "timed_seconds": 8.0,
    }
    return RunReport(facts=facts_of(plan, masking), **{**made, **changes})


def test_the_keys_and_what_they_hold():
    data = report_of(plan_of(4, 2)).to_dict()
    assert set(data) >= {
        "steps",
        "tokens",
        "train_loss",
        "full_model_val_loss",
        "unigram_val_loss",
        "per_rank_model_state_bytes",
        "bytes_sent_per_step_per_rank",
        "plan",
        "history",
    }
    assert (data["steps"], data["tokens"]) == (30, 30 * 2048)
    assert (data["train_loss"], data["full_model_val_loss"], data["unigram_val_loss"]) == (2.7512, 2.9876, 4.5)
    assert data["per_rank_model_state_bytes"] == {
        "sdp": [state(1_234_567 + rank) for rank in range(4)],
        "dense": [state(3_000_000)] * 4,
    }
    assert data["bytes_sent_per_step_per_rank"] == [7_654_321 + rank for rank in range(4)]
    assert data["owned_parameters_per_rank"] == [400_000 + rank for rank in range(4)]
    assert data["tokens_per_second"] == 20 * 2048 / 8, "of the steps that were timed, and not of all the time"
    assert data["history"]["train_loss"][1] == {"step": 20, "tokens": 20 * 2048, "loss": 3.25}
    assert data["history"]["full_model_val_loss"][-1] == {"step": 30, "tokens": 30 * 2048, "loss": 2.9876}


def test_the_plan_is_summed_up_and_can_be_told_from_others():
    plan = plan_of(4, 2)
    data = report_of(plan).to_dict()["plan"]
    assert (data["num_subnetworks"], data["owners_per_unit"], data["coverage"]) == (4, 2, 0.5)
    assert data["spectral_gap"] == plan.spectral_gap
    assert data["plan_hash"] == plan.hash != plan_of(4, 2, "cyclic").hash


def test_versions_name_what_the_figures_were_made_with():
    data = report_of(plan_of(2, 1)).to_dict()
    assert set(data["versions"]) == {"python", "deepspeed-sdp", "torch", "deepspeed", "transformers"}
    assert all(re.match(r"\d+\.\d+", version) for version in data["versions"].values())


def pixels(path):
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def assert_drawn(path):
    """Opens as a picture, has size, and shows something in all its quarters."""
    shown = pixels(path)
    height, width, _ = shown.shape
    assert 300 <= height <= 6000
    assert 300 <= width <= 6000
    marked = (shown != shown[0, 0]).any(axis=2)
    assert marked.mean() > 0.01
    for part in (marked[: height // 2], marked[height // 2 :], marked[:, : width // 2], marked[:, width // 2 :]):
        assert part.any()
    return shown


def test_writing_leaves_four_valid_files(tmp_path):
    report = report_of(plan_of(4, 2))
    report.write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "report.md", "loss.png", "plan.png"}
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    assert (tmp_path / "report.md").read_text() == to_markdown(report.to_dict())
    assert_drawn(tmp_path / "loss.png")
    assert_drawn(tmp_path / "plan.png")


def test_writing_again_replaces_the_files(tmp_path):
    report_of(plan_of(4, 2)).write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    report_of(plan_of(4, 3), train_losses=[(30, 9.0)], dense=False).write(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() != before[file.name], file.name


def test_one_evaluation_and_no_time_are_enough(tmp_path):
    report = report_of(
        plan_of(1, 1),
        train_losses=[(1, 5.0)],
        val_losses=[(1, 5.1)],
        seconds=0.0,
        timed_steps=0,
        timed_seconds=0.0,
        dense=False,
    )
    report.write(tmp_path)
    assert_drawn(tmp_path / "loss.png")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["tokens_per_second"] is None
    assert data["per_rank_model_state_bytes"]["dense"] is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_that_diverged_still_leaves_valid_json_and_pictures(tmp_path, loss):
    report = report_of(plan_of(2, 1), train_losses=[(10, 4.0), (20, loss)], val_losses=[(20, loss)])
    report.write(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert data["train_loss"] is data["full_model_val_loss"] is data["history"]["train_loss"][1]["loss"] is None
    assert f"| training loss (subnetworks) | {loss:.4f} |" in (tmp_path / "report.md").read_text()
    assert_drawn(tmp_path / "loss.png")


def number(text):
    return float(text.replace(",", ""))


def test_the_page_says_what_the_data_says(tmp_path):
    report_of(plan_of(4, 2)).write(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    page = (tmp_path / "report.md").read_text()
    cells = {
        row[0]: row[1:]
        for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line)
    }
    assert [number(n) for n in cells["steps, tokens"][0].split(", ")] == [data["steps"], data["tokens"]]
    assert number(cells["training loss (subnetworks)"][0]) == pytest.approx(data["train_loss"], abs=5e-5)
    assert number(cells["validation loss (full model)"][0]) == pytest.approx(data["full_model_val_loss"], abs=5e-5)
    assert number(cells["unigram baseline, same tokens"][0]) == pytest.approx(data["unigram_val_loss"], abs=5e-5)
    assert cells["rank"] == ["parameters", "weights", "gradients", "optimizer", "total", "sent per step"]
    for rank in range(4):
        expected = [data["per_rank_model_state_bytes"]["sdp"][rank][k] for k in cells["rank"][1:5]]
        expected.append(data["bytes_sent_per_step_per_rank"][rank])
        shown = cells[str(rank)]
        assert number(shown[0]) == data["owned_parameters_per_rank"][rank]
        assert [number(s.removesuffix(" MB")) for s in shown[1:]] == [
            pytest.approx(e / 1e6, abs=0.005) for e in expected
        ]
        dense = [data["per_rank_model_state_bytes"]["dense"][rank][k] for k in cells["rank"][1:5]]
        shown = cells[f"{rank}, dense"]
        assert [number(s.removesuffix(" MB")) for s in shown[1:5]] == [pytest.approx(e / 1e6, abs=0.005) for e in dense]
    for key, value in data["plan"].items():
        assert cells[key] == [str(value)]
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (tmp_path / picture).is_file()


def test_tables_are_whole():
    """Every row of a table has as many cells as its header, which markdown needs."""
    widths = []
    for line in to_markdown(report_of(plan_of(3, 2)).to_dict()).splitlines():
        if line.startswith("|"):
            widths.append(line.count("|"))
        elif widths:
            assert len(set(widths)) == 1
            widths = []


def test_without_a_dense_run_the_page_has_no_dense_row(tmp_path):
    report = report_of(plan_of(2, 1), dense=False)
    assert "dense" not in to_markdown(report.to_dict()).lower()
    assert "(dense:" not in report.closing_lines(tmp_path)


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({"dense": True}, {"dense"}),
        ({"is_peak_measured": True}, {"gradient"}),
        ({"timed_steps": 3, "timed_seconds": 2.0}, {"tokens/s"}),
        ({"bytes_sent": 7}, {"sent per step"}),
        ({"masking": "forward"}, {"## plan"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_sentence_stands_where_its_figures_do(changes, there):
    """Of a run that knows as little as one can, all are gone; each fact brings back what is said of it alone."""
    words = {"gradient": "their peak", "tokens/s": "tokens/s", "sent per step": "sent per step", "## plan": "## plan"}
    words["dense"] = "dense: plain deepspeed"

    def said(dense=False, bytes_sent=None, **changes):
        known = {"masking": "dense", "is_peak_measured": False, "timed_steps": 0, "timed_seconds": 0.0, **changes}
        report = report_of(plan_of(2, 1), dense=dense, **known)
        for rank in report.ranks:
            rank["mean_bytes_sent"] = bytes_sent
        page = to_markdown(report.to_dict()).lower()
        return {name for name, text in words.items() if text in page}

    assert said() == set()
    assert said(**changes) == there


def test_one_set_of_figures_for_console_data_and_plan_summary():
    plan = plan_of(4, 2)
    facts = facts_of(plan)
    data, summary = report_of(plan).to_dict(), plan_summary(plan, facts.parameters)
    assert data["parameters"] == summary["parameters"] == facts.parameters
    assert [2 * numel for numel in data["parameters_per_worker"]] == summary["bytes_per_worker"]
    assert data["parameters_per_worker"] == [1000 + plan.owned_numel(worker) for worker in range(4)]
    assert data["flops"] == 30 * 2048 * sum(data["flops_per_token"]) / 4
    most = max(data["parameters_per_worker"])
    said = facts.describe()["method"]
    assert f"each worker trains {most / 1e6:.1f} M parameters ({most / data['parameters']:.0%})" in said
    assert data["plan"]["coverage"] == summary["coverage"] == plan.coverage


def test_a_later_job_goes_on_from_the_history():
    first, second = report_of(plan_of(2, 1)), report_of(plan_of(2, 1), train_losses=[], val_losses=[], seconds=0.0)
    second.set_history(json.loads(json.dumps(first.history())))
    assert second.history() == json.loads(json.dumps(first.history()))
    second.add_lap(0, 5.0)
    second.add_lap(2, 1.0)
    assert (second.timed_steps, second.timed_seconds) == (22, 9.0), "what took time without a step is none of training"


def test_closing_lines(tmp_path):
    lines = report_of(plan_of(2, 1)).closing_lines(tmp_path)
    assert "2.988" in lines
    assert "4.500" in lines
    assert "7.41 MB" in lines, "the largest rank's model state"
    assert "ratio 0.41 with reduce_bucket_size 200,000 in both, 0.41 without gradients" in lines
    assert "7.65 MB" in lines
    assert str(tmp_path / "hf") in lines
    assert str(tmp_path / "report.md") in lines


PLANS = [(1, 1, "auto"), (2, 1, "cyclic"), (4, 3, "random"), (5, 5, "auto"), (8, 4, "auto"), (16, 8, "auto")]
MORE_PLANS = [(n, k, design) for n in (2, 3, 4, 6, 8, 12, 16) for k in (1, 2) for design in ("auto", "cyclic")]


@pytest.mark.parametrize(
    ("n", "k", "design"), [*PLANS, *(pytest.param(*p, marks=pytest.mark.slow) for p in MORE_PLANS)]
)
def test_every_plan_can_be_drawn(tmp_path, n, k, design):
    plan = plan_of(n, k, design)
    plot_plan(plan, tmp_path / "plan.png")
    shown = assert_drawn(tmp_path / "plan.png")
    vivid = shown[(shown.max(axis=2).astype(int) - shown.min(axis=2)) > 40]
    assert len(vivid) > 0.01 * shown.shape[0] * shown.shape[1], "owner sets are coloured"


@pytest.mark.parametrize(("n", "how"), [(1, "rotate"), (4, "random"), (16, "rotate")])
def test_rounds_can_be_drawn(tmp_path, n, how):
    plan = plan_of(n, max(1, n // 2), "cyclic")
    plot_rounds([plan.resampled(round_, how) for round_ in range(5)], tmp_path / "rounds.png")
    assert_drawn(tmp_path / "rounds.png")


def test_the_picture_shows_the_share_that_a_worker_owns(tmp_path):
    """Coloured against grey area is the coverage, whatever the chunks."""
    for n, k in ((4, 1), (4, 2), (4, 3)):
        plan = plan_of(n, k, "cyclic", model=spaces(layers=4, neurons=480, heads=12))
        plot_plan(plan, tmp_path / "plan.png")
        shown = pixels(tmp_path / "plan.png").astype(int)
        grey = (abs(shown - round(0.93 * 255)) <= 1).all(axis=2).sum()
        vivid = ((shown.max(axis=2) - shown.min(axis=2)) > 30).sum()
        assert vivid / (vivid + grey) == pytest.approx(k / n, abs=0.06)


def test_many_layers_and_chunks(tmp_path):
    plan = plan_of(8, 3, "cyclic", model=spaces(layers=32, neurons=11008, heads=8))
    assert max(len(planned.chunks) for planned in plan.spaces) >= 8
    assert any(len(plan.owned(planned.space.name, 0)) > 1 for planned in plan.spaces), "more than one chunk per worker"
    plot_plan(plan, tmp_path / "plan.png")
    assert_drawn(tmp_path / "plan.png")


def test_one_kind_of_units_alone(tmp_path):
    plan = plan_of(4, 2, model=[space for space in spaces() if space.kind == "mlp"])
    plot_plan(plan, tmp_path / "plan.png")
    assert_drawn(tmp_path / "plan.png")


def test_under_backward_masking_the_training_loss_is_the_full_models(tmp_path):
    report_of(plan_of(4, 2), masking="backward").write(tmp_path)
    assert "| training loss (full model) |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["trained"] == "full model"
