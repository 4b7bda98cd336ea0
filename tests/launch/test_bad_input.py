"""Every mistake ends the whole job, soon, with one message."""

import json

import pytest

from tests.data.conftest import make_documents
from tests.launch.jobs import DEEPSPEED, MODEL, SDP, assert_ended_badly, assert_ended_with_one_traceback

BLOCK = "subnetwork_data_parallel"


def test_unknown_key(workplace):
    """On four ranks, which all find it at once."""
    workplace.write("sdp.json", json.dumps({**SDP, "coverige": 0.5}))
    job = workplace.launch(ranks=4)
    assert_ended_badly(job, f"error: {BLOCK}.coverige: unknown key, got 0.5; did you mean 'coverage'?")
    assert not list(workplace.output.glob("*")), "found before anything is prepared"


@pytest.fixture
def refused(workplace, pools):
    """What both ranks say of a job that is refused before it has an engine, the second with other arguments."""

    def run(of_second=None, **changes):
        arguments = workplace.arguments(**changes)
        said = pools(2).run("tests.launch.job_cases:refused", of_ranks=[arguments, of_second or arguments], timeout=60)
        assert said[0] == said[1], "all ranks alike"
        assert said[0] is not None
        return said[0]

    return run


def test_ranks_with_different_configs(workplace, refused):
    other = workplace.write("sdp_1.json", json.dumps({**SDP, "plan": {"seed": 7}}))
    said = refused(of_second=workplace.arguments(sdp_config=other))
    assert said.startswith(f"ranks disagree on {BLOCK}.plan.seed: rank 0 has 0, rank 1 has 7")


@pytest.mark.slow
def test_text_too_short_for_one_batch(workplace):
    text = workplace.write("short.txt", "\n\n\n".join(make_documents(150, words=20)))
    workplace.write("ds.json", json.dumps({**DEEPSPEED, "train_micro_batch_size_per_gpu": 50}))
    assert_ended_badly(
        workplace.launch(text=text, vocab_size=300), "sequences are too few for one batch of 100 (2 ranks"
    )


def test_output_that_cannot_be_written(workplace, refused):
    file = workplace.write("file", "in the way")
    assert refused(output_dir=file / "out").startswith(f"--output_dir: cannot write {file}/out: ")
    assert file.read_text() == "in the way"


def test_a_model_that_no_adapter_knows(workplace, refused):
    workplace.write("model.json", json.dumps({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}))
    said = refused()
    assert "BloomForCausalLM" in said
    assert "known families: " in said
    assert "Llama" in said


@pytest.mark.parametrize(("rank", "ranks"), [pytest.param(1, 2, marks=pytest.mark.slow), (0, 4)])
def test_an_unexpected_error_on_one_rank(workplace, rank, ranks):
    """It breaks in mid-run while the others wait for it in a collective. The rendezvous store ends with rank 0."""
    script = workplace.script(f"""
step = loop.train_step
def broken(*args, count=[0]):
    count[0] += 1
    if count[0] == 3 and os.environ["RANK"] == "{rank}":
        raise RuntimeError("boom")
    return step(*args)
loop.train_step = broken
""")
    job = workplace.launch(script=script, ranks=ranks)
    assert_ended_with_one_traceback(job, rank)
    assert "RuntimeError: boom" in job.output


BAD_BLOCKS = {
    "coverage without whole K": (
        {"num_subnetworks": 2, "coverage": 0.3},
        f"{BLOCK}.coverage: got 0.3 with 2 subnetworks",
    ),
    "subnetworks that do not divide the world": (
        {"num_subnetworks": 3, "coverage": 1},
        f"{BLOCK}.num_subnetworks: got 3 with a world size of 2; takes a number that divides the world",
    ),
    "local steps with a delay as long as a round": (
        {**SDP, "schedule": {"sync_interval": 4, "sync_delay": 4}},
        "schedule.sync_delay: got 4 with sync_interval 4",
    ),
    "a string": ({**SDP, "coverage": "half"}, f'{BLOCK}.coverage: got "half"; '),
}


@pytest.mark.parametrize("case", BAD_BLOCKS)
def test_bad_blocks(workplace, refused, case):
    block, message = BAD_BLOCKS[case]
    workplace.write("sdp.json", json.dumps(block))
    assert message in refused()


BAD_FILES = {
    "no text": ("text.txt", b"  \n\n\n  ", "{}: holds no text"),
    "text not UTF-8": ("text.txt", b"gr\xf6\xdfer " * 500, "{}: text is not UTF-8"),
    "broken DeepSpeed config": (
        "ds.json",
        b'{"train_batch_size": 8,',
        "--deepspeed_config: {} is not valid JSON: line 1",
    ),
    "DeepSpeed config of another kind": (
        "ds.json",
        b"[]",
        "--deepspeed_config: {} holds a list; takes a JSON object",
    ),
    "broken SDP block": ("sdp.json", b"{'coverage': 0.5}", "--sdp_config: {} is not valid JSON: line 1"),
    "SDP block not UTF-8": ("sdp.json", b"\xff\xfe", "--sdp_config: {} is not a text file"),
    "broken model config": ("model.json", b"{", "model.path: "),
    "model of no known type": ("model.json", b'{"model_type": "llamma"}', "model.path: "),
    "impossible model": (
        "model.json",
        json.dumps({**MODEL, "num_key_value_heads": 3}).encode(),
        "takes whole KV groups of heads of size 8",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(workplace, refused, case):
    name, content, message = BAD_FILES[case]
    file = workplace.write(name, content)
    assert message.format(file) in refused()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("deepspeed_config", "--deepspeed_config: cannot read {}: No such file or directory"),
        ("sdp_config", "--sdp_config: cannot read {}: No such file or directory"),
        ("model", "model.path: {} is no file, folder or preset; presets are "),
        ("text", "--text: {} does not exist; takes .parquet"),
        ("tokenizer", "--tokenizer: {} is no folder"),
    ],
)
def test_missing_files(workplace, refused, option, message):
    gone = workplace.folder / "gone.json"
    assert message.format(gone) in refused(**{option: gone})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100_000}, "--vocab_size: got 100000; the text supports at most "),
        ({"vocab_size": 10}, "--vocab_size: got 10; the characters of the text alone need "),
        ({"seq_length": 1_000_000}, "tokens are too few for one sequence of 1000000"),
        ({"steps": 0}, "length.steps: got 0; input should be greater than or equal to 1"),
        ({"seed": -1}, "data.seed: got -1; "),
    ],
    ids=str,
)
def test_bad_numbers(refused, changes, message):
    assert message in refused(**changes)


def test_a_cache_folder_with_other_files(workplace, refused):
    cache = workplace.folder / "cache"
    cache.mkdir()
    (cache / "thesis.tex").write_text("years of work")
    assert refused(cache=cache).startswith(f"{cache}: holds something else than shards")
    assert (cache / "thesis.tex").read_text() == "years of work"


def test_an_option_wrong_on_one_rank_alone(workplace, refused):
    """It is named, though the others are fine."""
    assert refused(of_second=workplace.arguments(steps=0)).startswith("rank 1: length.steps: got 0; ")
