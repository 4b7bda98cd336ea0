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


def test_ranks_with_different_configs(workplace):
    workplace.write("sdp_1.json", json.dumps({**SDP, "plan": {"seed": 7}}))
    script = workplace.script(
        "if os.environ['RANK'] == '1': sys.argv = [a.replace('sdp.json', 'sdp_1.json') for a in sys.argv]"
    )
    assert_ended_badly(
        workplace.launch(script=script), f"error: ranks disagree on {BLOCK}.plan.seed: rank 0 has 0, rank 1 has 7"
    )


@pytest.mark.slow
def test_text_too_short_for_one_batch(workplace):
    text = workplace.write("short.txt", "\n\n\n".join(make_documents(8, words=20)))
    workplace.write("ds.json", json.dumps({**DEEPSPEED, "train_micro_batch_size_per_gpu": 50}))
    assert_ended_badly(
        workplace.launch(text=text, vocab_size=300), "sequences are too few for one batch of 100 (2 ranks"
    )


def test_output_that_cannot_be_written(workplace):
    file = workplace.write("file", "in the way")
    assert_ended_badly(workplace.launch(output_dir=file / "out"), f"error: --output_dir: cannot write {file}/out: ")
    assert file.read_text() == "in the way"


@pytest.mark.slow
def test_a_model_that_no_adapter_knows(workplace):
    workplace.write("model.json", json.dumps({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}))
    job = workplace.launch()
    assert_ended_badly(job, "BloomForCausalLM")
    assert "known families: " in job.errors[0]
    assert "Llama" in job.errors[0]


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
        f"error: {BLOCK}.coverage: got 0.3 with 2 subnetworks",
    ),
    "subnetworks that do not divide the world": (
        {"num_subnetworks": 3, "coverage": 1},
        f"error: {BLOCK}.num_subnetworks: got 3 with a world size of 2; takes a number that divides the world",
    ),
    "a feature not built": ({**SDP, "sync_interval": 4}, f"error: {BLOCK}.sync_interval: got 4; takes 1"),
    "a string": ({**SDP, "coverage": "half"}, f'error: {BLOCK}.coverage: got "half"; '),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) for case in BAD_BLOCKS])
def test_bad_blocks(workplace, case):
    block, message = BAD_BLOCKS[case]
    workplace.write("sdp.json", json.dumps(block))
    assert_ended_badly(workplace.launch(), message)


BAD_FILES = {
    "no text": ("text.txt", b"  \n\n\n  ", "error: {}: holds no text"),
    "text not UTF-8": ("text.txt", b"gr\xf6\xdfer " * 500, "error: {}: is not UTF-8 text (byte 2)"),
    "broken DeepSpeed config": (
        "ds.json",
        b'{"train_batch_size": 8,',
        "error: --deepspeed_config: {} is not valid JSON: line 1",
    ),
    "DeepSpeed config of another kind": (
        "ds.json",
        b"[]",
        "error: --deepspeed_config: {} holds a list; takes a JSON object",
    ),
    "broken SDP block": ("sdp.json", b"{'coverage': 0.5}", "error: --sdp_config: {} is not valid JSON: line 1"),
    "SDP block not UTF-8": ("sdp.json", b"\xff\xfe", "error: --sdp_config: {} is not a text file"),
    "broken model config": ("model.json", b"{", "error: model.path: "),
    "model of no known type": ("model.json", b'{"model_type": "llamma"}', "error: model.path: "),
    "impossible model": (
        "model.json",
        json.dumps({**MODEL, "num_key_value_heads": 3}).encode(),
        "error: ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(workplace, case):
    name, content, message = BAD_FILES[case]
    file = workplace.write(name, content)
    assert_ended_badly(workplace.launch(), message.format(file))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("deepspeed_config", "error: --deepspeed_config: cannot read {}: No such file or directory"),
        ("sdp_config", "error: --sdp_config: cannot read {}: No such file or directory"),
        ("model", "error: model.path: {} is no file, folder or preset; presets are "),
        ("text", "error: {}: does not exist"),
        ("tokenizer", "error: --tokenizer: {} is no folder"),
    ],
)
def test_missing_files(workplace, option, message):
    gone = workplace.folder / "gone.json"
    assert_ended_badly(workplace.launch(**{option: gone}), message.format(gone))


@pytest.mark.slow
def test_unreadable_text(workplace):
    (workplace.folder / "memory.txt").symlink_to("/proc/self/mem")
    job = workplace.launch(text=workplace.folder / "memory.txt")
    assert_ended_badly(job, "memory.txt: cannot be read: Input/output error")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100_000}, "error: --vocab_size: got 100000; the text supports at most "),
        ({"vocab_size": 10}, "error: --vocab_size: got 10; the characters of the text alone need "),
        ({"seq_length": 1_000_000}, "tokens are too few for one sequence of 1000000"),
        ({"steps": 0}, "error: length.steps: got 0; input should be greater than or equal to 1"),
        ({"seed": -1}, "error: data.seed: got -1; "),
    ],
    ids=str,
)
def test_bad_numbers(workplace, changes, message):
    assert_ended_badly(workplace.launch(**changes), message)


@pytest.mark.slow
def test_a_cache_folder_with_other_files(workplace):
    cache = workplace.folder / "cache"
    cache.mkdir()
    (cache / "thesis.tex").write_text("years of work")
    job = workplace.launch(cache=cache)
    assert_ended_badly(job, f"error: data.cache: {cache} holds other files (thesis.tex)")
    assert (cache / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_an_option_wrong_on_one_rank_alone(workplace):
    """Before the ranks can talk: the one that fails reports, though others wait for it."""
    script = workplace.script("if os.environ['RANK'] == '1': sys.argv[sys.argv.index('--steps') + 1] = '0'")
    assert_ended_badly(workplace.launch(script=script), "error: length.steps: got 0; ")
