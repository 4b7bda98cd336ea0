"""``deepspeed-sdp pretrain``: its options, its dry run, and the ranks that it starts itself."""

import json
import os
import subprocess
import sys

import jsonschema
import pytest

from deepspeed_sdp.cli import main, make_parser
from deepspeed_sdp.data import FaultPolicy, SourceSpec
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.options import split_settings
from deepspeed_sdp.pretraining.job import describe, make_job
from deepspeed_sdp.pretraining.options import check_job_options, parse_run
from deepspeed_sdp.pretraining.recipe import read_recipe, recipe_names, recipe_path
from deepspeed_sdp.pretraining.schema import SECTIONS, RunSchema, fields
from deepspeed_sdp.pretraining.sources import stream_sources
from tests.launch.jobs import RANK_VARIABLES, kill, marked
from tests.launch.recipe_jobs import RecipePlace
from tests.support.ranks import ROOT, rank_environment

STREAM = ["--output_dir", "out", "--stream", "a.parquet", "--tokenizer", "t"]


def parsed(*arguments):
    args = parse_run(make_parser(), ["pretrain", "15m", *arguments])
    run = read_recipe(args.recipe, args.settings)
    check_job_options(args, run.data.source)
    return run.data


def test_options_of_a_stream_reach_its_source_and_are_refused_without_one():
    assert stream_sources(parsed(*STREAM)) == [SourceSpec(("a.parquet",))]
    given = ["--on_broken_row", "stop", "--on_broken_file", "skip", "--retries", "0", "--text_column", "content"]
    data = parsed(*STREAM, *given, "--heldout_fraction", "0.1")
    policy = FaultPolicy("stop", "skip", 0)
    assert stream_sources(data) == [SourceSpec(("a.parquet",), text_column="content", faults=policy)]
    shards = ["--output_dir", "out", "--data", "shards"]
    for name, value in zip(given[::2], given[1::2], strict=True):
        message = rf"data\.{name[2:]}: got .*{value}.* with data\.path; takes it with data\.stream or data\.text alone"
        with pytest.raises(ConfigError, match=message):
            parsed(*shards, name, value)


def test_paths_with_weights_are_sources_of_their_own(capsys):
    paths = ["--stream", "hub:HuggingFaceFW/fineweb", "code.jsonl", "--tokenizer", "t", "--output_dir", "out"]
    mixed = ["--weights", "3", "1", "--hub_config", "sample-10BT"]
    web, code = stream_sources(parsed(*paths, *mixed))
    assert (web.paths, web.config, web.weight) == (("hub:HuggingFaceFW/fineweb",), "sample-10BT", 3.0)
    assert (code.paths, code.config, code.weight) == (("code.jsonl",), None, 1.0)
    run = read_recipe("15m", parse_run(make_parser(), ["pretrain", "15m", *paths, *mixed]).settings)
    assert "data" in (shown := describe(make_job(run, 4)))
    assert shown["data"] == "stream, mixed: 75.0% hub:HuggingFaceFW/fineweb, 25.0% code.jsonl"
    with pytest.raises(ConfigError, match=r"data\.weights: got 1 weights; takes one for each of the 2 paths"):
        parsed(*paths, "--weights", "1")
    with pytest.raises(ConfigError, match=r"data\.weights\.1: got 0"):
        parsed(*paths, "--weights", "1", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*STREAM, "--retries", "-1"), r"data\.retries: got -1"),
        ((*STREAM[:4],), r"data\.tokenizer: got nothing with data\.stream"),
        (("--output_dir", "out"), "--data, --stream or --text: got none"),
        (("--data", "shards"), "--output_dir: got none"),
        ((*STREAM, "--world_size", "8"), "--world_size: got 8; takes .* with --dry_run; a job has the ranks"),
    ],
)
def test_options_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parsed(*arguments)


def test_a_source_takes_the_place_of_the_recipe_s():
    """What the recipe says of its own is gone with it; what is common stays."""
    args = parse_run(make_parser(), ["pretrain", "demo", "--data", "shards"])
    data = read_recipe(args.recipe, args.settings).data
    assert (data.source, data.path, data.text, data.vocab_size, data.seq_length) == ("path", "shards", None, None, 128)


def test_settings_stand_anywhere_and_are_spelt_like_options():
    typed = [
        "pretrain",
        "--sdp.num-subnetworks",
        "4",
        "15m",
        "--length.tokens=1e-3",
        "--deepspeed.optimizer.params.lr",
        "-1",
        "--data",
        "a.b",
        "--compare-dense",
        "--sdp.partition",
        "mlp",
    ]
    args = parse_run(make_parser(), typed)
    assert args.recipe == "15m"
    assert args.settings == [
        ("sdp.num_subnetworks", "4"),
        ("length.tokens", "1e-3"),
        ("data.path", "a.b"),
        ("logging.compare_dense", "true"),
        ("sdp.partition", ["mlp"]),
        ("deepspeed.optimizer.params.lr", "-1"),
    ]
    assert split_settings(["a", "--a.b=1", "--", "--c.d"]) == (["a", "--", "--c.d"], [("a.b", "1")])
    for cut in (["--a.b"], ["--a.b", "--c"]):
        with pytest.raises(ValueError, match=r"--a\.b: got nothing; takes a value"):
            split_settings(cut)


def test_every_key_is_in_the_help_and_in_the_schema(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    shown = capsys.readouterr().out
    assert main(["recipes", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for name, field in fields():
        assert f"--{name} " in shown
        section, *keys = name.split(".")
        place = schema["properties"][SECTIONS[section]]
        for key in keys:
            # A block that may be absent is one of two.
            block = next(one for one in (place, *place.get("anyOf", ())) if "$ref" in one)
            place = schema["$defs"][block["$ref"].rsplit("/", 1)[1]]["properties"][key]
        assert place["description"] == field.description


@pytest.mark.parametrize("name", recipe_names())
def test_editors_take_the_recipes(name):
    jsonschema.validate(json.loads(recipe_path(name).read_text()), RunSchema.model_json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(recipe_path(name).read_text()), "modle": {}}, RunSchema.model_json_schema())


def test_a_folder_does_not_hide_a_recipe(monkeypatch, tmp_path):
    (tmp_path / "15m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_recipe("15m").model.path == "llama-15m"


def test_of_many_ranks_the_first_shows_the_help(capsys, monkeypatch):
    for rank, shown in ((0, True), (1, False)):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as ended:
            main(["--local_rank=0", "pretrain", "--help"])
        assert (ended.value.code, "RECIPE" in capsys.readouterr().out) == (0, shown)


def test_a_setting_of_another_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--model", "llama-15m", "--sdp.coverage", "1/2"])
    assert "unrecognized arguments: --sdp.coverage" in capsys.readouterr().err


@pytest.fixture
def dry_run(monkeypatch, capfd):
    """What ``deepspeed-sdp pretrain 15m --dry_run ARGUMENTS`` prints, in this process."""
    for variable in RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments):
        try:
            code = main(["pretrain", "15m", *arguments, "--dry_run", "--verbose"])
        except SystemExit as error:
            code = error.code
        return code, capfd.readouterr()

    return run


@pytest.mark.parametrize(("arguments", "ranks"), [((), 4), (("--world_size", "8"), 8), (("--world_size=16",), 16)])
def test_a_recipe_on_any_number_of_ranks(dry_run, arguments, ranks):
    code, said = dry_run(*arguments)
    assert code == 0
    assert f"ranks        {ranks}, global batch 64" in said.out
    assert "SDP, forward masking by neuron, 4 subnetworks" in said.out


def test_a_method_by_options(dry_run):
    _, said = dry_run("--sdp.masking", "backward", "--sdp.granularity", "layer", "--sdp.coverage", "3/4")
    assert "SDP, backward masking by layer, 4 subnetworks, coverage 0.75" in said.out
    changed = "--sdp.masking backward --sdp.granularity layer --sdp.coverage 3/4"
    assert f"run          15m {changed}\n" in said.out, "a report says how it was made"
    assert "dense" in dry_run("--sdp.enabled", "false")[1].out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world_size", "6"), "train_batch_size: got 64 with 6 ranks"),
        (("--world_size", "2"), "num_subnetworks: got 4 with a world size of 2"),
        (("--world_size", "0"), "--world_size: got 0; takes a number from 1 on, with --dry_run"),
        (("--deepspeed.zero_optimization.stage", "7"), "zero_optimization.stage: got 7"),
        (("--sdp.checkpoint.copies", "3"), "checkpoint.copies: got 3 with 2 owners per unit"),
        (("--data", "no/where"), "no/where"),
        (("--data", "x", "--retries", "3"), "data.retries: got 3 with data.path"),
    ],
)
def test_it_finds_what_a_job_would(arguments, message):
    from deepspeed_sdp.errors import SDPError
    from deepspeed_sdp.pretraining.run import dry_run

    args = parse_run(make_parser(), ["pretrain", "15m", "--dry_run", "--verbose", *arguments])
    with pytest.raises(SDPError) as raised:
        dry_run(args, lambda args: read_recipe(args.recipe, args.settings))
    assert message in str(raised.value)


@pytest.mark.parametrize(("rank", "said"), [(0, 1), (1, 0)])
def test_of_several_ranks_the_first_tells(rank, said):
    environment = rank_environment(RANK=rank, WORLD_SIZE=8)
    command = [sys.executable, "-m", "deepspeed_sdp.cli", "--local_rank=0", "pretrain", "15m", "--dry_run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("ranks        8, global batch")) == (0, said), done.stderr


def run(place, *arguments, seconds=240):
    """The command as a user types it, in an empty folder and without a launcher."""
    mark = f"TEST_JOB=pretrain-{os.getpid()}"
    environment = rank_environment(**dict([mark.split("=")]))
    for variable in RANK_VARIABLES:
        environment.pop(variable, None)
    empty = place.folder / "empty"
    empty.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "deepspeed_sdp.cli", *arguments]
    try:
        return subprocess.run(command, env=environment, cwd=empty, capture_output=True, text=True, timeout=seconds)
    finally:
        kill(marked(mark))


def test_it_starts_its_ranks_itself_and_ends_with_their_error(tmp_path):
    place = RecipePlace(tmp_path)
    job = run(place, *place.arguments("--steps", "2", script=()))
    assert job.returncode == 0, job.stdout + job.stderr
    assert "ranks        2, global batch 16" in job.stdout
    assert (place.output / "hf" / "model.safetensors").is_file()
    bad = run(place, *place.arguments("--data", "nowhere", script=()))
    assert bad.returncode != 0
    assert (bad.stdout + bad.stderr).count("error: nowhere") == 1
    # Before any rank is started.
    for switches, changes, message in (
        (["--gpus", "3"], {}, "error: train_batch_size: got 16 with 3 ranks"),
        ([], {"sdp.coverage": 0.3}, "coverage: got 0.3 with 2 subnetworks"),
        ([], {"sdp.coverag": 0.5}, "coverag: unknown key"),
        (
            [],
            {"sdp.schedule.sync_interval": 2, "deepspeed.zero_optimization.stage": 1},
            "error: DeepSpeed config: zero_optimization.stage: got 1 with local steps",
        ),
    ):
        early = run(place, *place.arguments(*switches, script=(), **changes), seconds=60)
        assert (early.returncode, early.stderr.count(message)) == (1, 1), early.stderr


class Started(BaseException):
    """In place of a program that takes over."""


def test_it_finds_the_launcher_where_no_script_of_it_is(monkeypatch):
    """A package may lie in a folder that is on PYTHONPATH alone."""

    def take_over(*command):
        raise Started(command)

    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(os, "execv", take_over)
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Started) as started:
        main(["pretrain", "demo", "--gpus", "2", "--sdp.num_subnetworks", "2", "--output_dir", "out"])
    program, arguments = started.value.args[0]
    assert program == sys.executable
    found = subprocess.run(
        [*arguments[:3], "--help"], env=rank_environment(), capture_output=True, text=True, timeout=120
    )
    assert "--num_accelerators" in found.stdout


def test_recipes_travel_in_the_wheel(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    import zipfile

    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name for name in names if "/recipes/" in name} == {
        f"deepspeed_sdp/recipes/{size}.json" for size in recipe_names()
    }
