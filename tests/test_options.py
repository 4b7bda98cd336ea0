"""One spelling of options on all command lines, and no message that names an option which does not exist."""

import argparse
import ast
import importlib.util
import re

import pytest

from deepspeed_sdp.cli import make_parser
from deepspeed_sdp.options import OptionParser, spelt
from tests.support.ranks import ROOT

# Of DeepSpeed's launcher, torchrun, transformers' TrainingArguments and DeepSpeed's ds_to_universal.
OF_OTHERS = {
    "num_accelerators",
    "master_port",
    "log_level",
    "module",
    "nproc_per_node",
    "max_restarts",
    "standalone",
    "shutdown_timeout",
    "use_cpu",
    "inject_missing_state",
    "input_folder",
    "output_folder",
}


def launch_parser():
    spec = importlib.util.spec_from_file_location("launch_train", ROOT / "launch" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_parser()


def all_parsers():
    subcommands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [*subcommands.choices.values(), launch_parser()]


def test_options_are_declared_with_underscores():
    parsers = all_parsers()
    assert len(parsers) > 7
    for parser in parsers:
        assert isinstance(parser, OptionParser)
        for option in parser._option_string_actions:
            assert "-" not in option.lstrip("-"), (parser.prog, option)


@pytest.mark.parametrize("typed", [["--num-subnetworks", "4"], ["--num_subnetworks", "4"], ["--num-subnetworks=4"]])
def test_dashes_and_underscores_are_the_same_option(typed):
    plan = make_parser().parse_args(["plan", "--model", "llama-15m", *typed])
    assert plan.num_subnetworks == 4
    assert make_parser().parse_args(["estimate", *typed]).num_subnetworks == 4


def test_options_are_not_abbreviated(capsys):
    for parser in all_parsers():
        with pytest.raises(SystemExit):
            parser.parse_args(["--mod", "x"])


def test_a_kind_is_given_once(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["plan", "--model", "llama-15m", "--coverage", "mlp=1/2,mlp=1/4"])
    assert "got mlp twice" in capsys.readouterr().err


def test_values_stay_as_they_are():
    assert spelt(["--a-b=c-d", "x-y", "-n", "--", "--e-f"]) == ["--a_b=c-d", "x-y", "-n", "--", "--e-f"]


def strings_of(file):
    """String literals, docstrings left out."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_every_option_that_a_message_names_exists():
    # Settings of a recipe, --sdp.coverage, are no options.
    known = {option.lstrip("-") for parser in all_parsers() for option in parser._option_string_actions} | OF_OTHERS
    files = [*(ROOT / "deepspeed_sdp").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    named = {
        (file.name, option)
        for file in files
        for text in strings_of(file)
        for option in re.findall(r"(?<![\w-])--([a-z][\w-]*+)(?!\.\w)", text)
    }
    assert len(named) > 50
    assert {(file, option) for file, option in named if option not in known} == set()


def test_a_stream_s_errors_name_its_own_option():
    from deepspeed_sdp.data import SourceSpec
    from deepspeed_sdp.data.faults import Skipped
    from deepspeed_sdp.data.source import find_source
    from deepspeed_sdp.errors import DataError

    for option in ("--stream", "--source"):
        with pytest.raises(DataError, match=f"^{option}: no/where.parquet does not exist"):
            find_source(SourceSpec(("no/where.parquet",), option=option), Skipped())
