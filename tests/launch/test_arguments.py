"""The command line: complete help at once, and one message for a wrong option."""

import argparse
import ast
import importlib.util
import subprocess
import sys

import pytest

from deepspeed_sdp.errors import ConfigError
from tests.launch.jobs import TRAIN
from tests.support.ranks import ROOT, rank_environment


@pytest.fixture(scope="module")
def arguments():
    spec = importlib.util.spec_from_file_location("launch_arguments", TRAIN.with_name("arguments.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parser(arguments, monkeypatch):
    found = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv: found.append(self))
    arguments.parse_arguments([], "what it does")
    return found[0]


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


def test_the_example_of_the_help_can_be_parsed(arguments):
    docstring = ast.get_docstring(ast.parse(TRAIN.read_text()))
    words = docstring[docstring.index("deepspeed --") :].replace("\\\n", " ").split()
    args = arguments.parse_arguments(words[words.index("launch/train.py") + 1 :], None)
    arguments.check_arguments(args)
    assert all((ROOT / path).is_file() for path in (args.deepspeed_config, args.sdp_config, args.model_config))


def test_help_says_the_defaults_it_has(parser):
    for action in parser._actions:
        if action.default not in (None, False, -1, argparse.SUPPRESS):
            assert f"{action.default:g}" in action.help, action.option_strings


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
    [["--bogus"], [], ["--steps", "many"], ["--steps", "1", "--tokens", "1"]],
    ids=["unknown", "nothing", "no number", "both lengths"],
)
def test_a_wrong_option_gives_one_message_of_one_rank(argv):
    first, second = run(*argv, RANK=0), run(*argv, RANK=1)
    assert first.returncode == second.returncode == 2
    assert first.stderr.count("error:") == 1
    assert "Traceback" not in first.stderr
    assert second.stderr == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps: got 0; takes a number from 1 on"),
        ({"steps": None, "tokens": 0.0}, "--tokens: got 0.0; takes a number from 1 on"),
        ({"steps": None, "tokens": float("nan")}, "--tokens: got nan; takes "),
        ({"steps": None, "tokens": float("inf")}, "--tokens: got inf; takes "),
        ({"seq_length": 1}, "--seq_length: got 1; takes a number from 2 on"),
        ({"eval_interval": 0}, "--eval_interval: got 0; takes a number from 1 on"),
        ({"eval_sequences": -1}, "--eval_sequences: got -1; takes a number from 0 on"),
        ({"heldout_fraction": 1.0}, "--heldout_fraction: got 1.0; takes a number between 0 and 1"),
        ({"heldout_fraction": float("nan")}, "--heldout_fraction: got nan; takes"),
        ({"max_text_mb": 0.0}, "--max_text_mb: got 0.0; takes a positive number"),
        ({"max_text_mb": float("inf")}, "--max_text_mb: got inf; takes"),
        ({"seed": -1}, "--seed: got -1; takes"),
    ],
    ids=str,
)
def test_impossible_numbers(arguments, changes, message):

    required = ["--deepspeed_config", "a", "--model_config", "b", "--output_dir", "c", "--steps", "5"]
    args = arguments.parse_arguments(required, None)
    arguments.check_arguments(args)
    for name, value in changes.items():
        setattr(args, name, value)
    with pytest.raises(ConfigError) as raised:
        arguments.check_arguments(args)
    assert str(raised.value).startswith(message)
