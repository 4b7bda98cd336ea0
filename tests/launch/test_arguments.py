"""The command line: complete help at once, and one message for a wrong option."""

import ast
import subprocess
import sys
from importlib import import_module

import pytest

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.pretraining.options import parse_run
from deepspeed_sdp.pretraining.schema import fields
from tests.launch.jobs import TRAIN
from tests.support.ranks import ROOT, rank_environment


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAIN.parent))
    return import_module("train")


@pytest.fixture
def parser(train):
    return train.make_parser()


def run(*argv, **environment):
    return subprocess.run(
        [sys.executable, str(TRAIN), *argv],
        env=rank_environment(**environment),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_option_is_explained(parser):
    options = [action for action in parser._actions if action.option_strings]
    assert len(options) > 15
    for action in options:
        assert action.help, action.option_strings
        assert len(action.help) > 8, action.option_strings


def test_help_is_complete(parser):
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for action in parser._actions:
        assert action.option_strings[-1] in done.stdout
    for name in ("report.json", "loss.png", "plan.png", "hf/", "deepspeed --num_accelerators"):
        assert name in done.stdout


def test_the_example_of_the_help_can_be_parsed(train, monkeypatch):
    monkeypatch.chdir(ROOT)
    docstring = ast.get_docstring(ast.parse(TRAIN.read_text()))
    words = docstring[docstring.index("deepspeed --") : docstring.index("What ")].replace("\\\n", " ").split()
    args = parse_run(train.make_parser(), words[words.index("launch/train.py") + 1 :])
    run = train.read(args)
    assert run.model_file.is_file()
    assert (run.data.text, run.length.steps) == (("my.jsonl",), 300)


def test_help_says_the_defaults_of_the_schema(parser):
    helps = {action.dest: action.help for action in parser._actions}
    for name, field in fields():
        if not field.is_required() and field.default not in (None, False, ()):
            shown = " ".join(field.default) if isinstance(field.default, tuple) else field.default
            assert f"(default: {shown})".lower() in helps[name].lower(), name


def test_help_imports_nothing_heavy():
    code = f"""
import runpy, sys
sys.path.insert(0, {str(TRAIN.parent)!r})
sys.argv = ["train.py", "--help"]
try:
    runpy.run_path({str(TRAIN)!r}, run_name="__main__")
except SystemExit as exit:
    assert exit.code == 0
heavy = {{"torch", "deepspeed", "transformers", "numpy", "matplotlib"}} & set(sys.modules)
print("heavy:", sorted(heavy))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=rank_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("heavy: []\n"), done.stderr


def test_help_comes_from_one_rank():
    done = run("--help", RANK=1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "argv",
    [["--bogus"], [], ["--world_size", "many"], ["--deepspeed.x"]],
    ids=["unknown", "nothing", "no number", "no value"],
)
def test_a_wrong_option_gives_one_message_of_one_rank(argv):
    first, second = run(*argv, RANK=0), run(*argv, RANK=1)
    assert first.returncode == second.returncode == 2
    assert first.stderr.count("error:") == 1
    assert "Traceback" not in first.stderr
    assert second.stderr == ""


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("steps", "0", "length.steps: got 0; input should be greater than or equal to 1"),
        ("steps", "many", 'length.steps: got "many"; input should be a valid integer'),
        ("tokens", "0.0", "length.tokens: got 0.0; "),
        ("tokens", "NaN", 'length.tokens: got "NaN"; '),
        ("tokens", "inf", 'length.tokens: got "inf"; '),
        ("seq_length", "1", "data.seq_length: got 1; input should be greater than or equal to 2"),
        ("eval_interval", "0", "logging.eval_interval: got 0; "),
        ("eval_sequences", "-1", "logging.eval_sequences: got -1; "),
        ("heldout_fraction", "1.0", "data.heldout_fraction: got 1.0; input should be less than 1"),
        ("seed", "-1", "data.seed: got -1; "),
        ("num_lanes", "4", "data.num_lanes: got 4 with data.text; takes it with data.stream alone"),
        ("weights", "1", "data.weights: got [1.0] with data.text; takes it with data.stream alone"),
        ("match", "time", "length.match: got \"time\"; input should be 'tokens' or 'flops'"),
        ("sdp.plan.seed", "x", 'subnetwork_data_parallel.plan.seed: got "x"; '),
        ("data", "shards", "data: got path and text; takes one of path, stream, text"),
    ],
)
def test_impossible_values(train, tmp_path, option, value, message):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 4}')
    (tmp_path / "sdp.json").write_text("{}")
    files = ["--deepspeed_config", str(tmp_path / "ds.json"), "--sdp_config", str(tmp_path / "sdp.json")]
    given = [*files, "--model", "llama-demo", "--text", "builtin", "--steps", "5"]
    train.read(parse_run(train.make_parser(), given))
    with pytest.raises(ConfigError) as raised:
        train.read(parse_run(train.make_parser(), [*given, f"--{option}", value]))
    assert str(raised.value).startswith(message)
