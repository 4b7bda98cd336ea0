"""A report that somebody hands over: shown, or refused in one line."""

import json
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.cli import main
from deepspeed_sdp.pretraining.metrics import _step_of
from tests.data.test_manifest import ANY, paths_of

BYTES = {"weights": 1000, "gradients": 1000, "optimizer": 2000, "total": 4000}
REPORT = {
    "steps": 10,
    "tokens": 1000,
    "run": {"method": "SDP"},
    "parameters": 7,
    "trained": "subnetworks",
    "train_loss": 3.5,
    "full_model_val_loss": 3.6,
    "unigram_val_loss": 4.0,
    "per_rank_model_state_bytes": {"sdp": [BYTES, BYTES], "dense": [BYTES, BYTES]},
    "is_gradient_peak_measured": True,
    "reduce_bucket_numel": 100,
    "bytes_sent_per_step_per_rank": [10, None],
    "owned_parameters_per_rank": [5, 6],
    "plan": {"num_subnetworks": 2},
    "seconds": 3.0,
    "timed_steps": 8,
    "tokens_per_second": 333.3,
    "versions": {"python": "3.11"},
}


def show(folder, report, capsys):
    (folder / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    code = main(["report", str(folder)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_loss_that_is_not_finite_is_shown(tmp_path, capsys):
    code, out, _ = show(tmp_path, {**REPORT, "full_model_val_loss": None}, capsys)
    assert code == 0
    assert "| validation loss (full model) | nan |" in out


CASES = {
    "nested": "[" * 100_000,
    "digits": '{"steps": ' + "1" * 5000 + "}",
    "cut": '{"steps": 10',
    "a list": "[]",
    "no steps": {key: value for key, value in REPORT.items() if key != "steps"},
    "a word": {**REPORT, "tokens": "many"},
    "huge": {**REPORT, "tokens": 10**39},
    "not a number": json.dumps({**REPORT, "train_loss": float("nan")}),
    "fewer ranks": {**REPORT, "owned_parameters_per_rank": [5]},
    "no ranks": {**REPORT, "per_rank_model_state_bytes": {"sdp": [], "dense": None}},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_report_is_one_line(tmp_path, capsys, case):
    code, out, err = show(tmp_path, CASES[case], capsys)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "report.json: " in err
    assert err.count("\n") == 1


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_report_with_anything_anywhere_is_shown_or_refused(tmp_path_factory, data):
    report = deepcopy(REPORT)
    path = data.draw(st.sampled_from([path for path in paths_of(report) if path]))
    place = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = data.draw(ANY)
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.json").write_text(json.dumps(report))
    assert main(["report", str(folder)]) in (0, 1)


@pytest.mark.parametrize("line", ["", "[", "[" * 100_000, '{"step": ' + "1" * 400 + "}", '{"step": null}', "{}", "7"])
def test_a_line_of_figures_that_is_none_is_dropped(line):
    assert _step_of(line) == float("inf")
