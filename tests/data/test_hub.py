"""A data set of the hub, over real HTTP from this machine, with connections cut in the middle."""

import json
import os
import subprocess
import sys

import pytest

from deepspeed_sdp.data import ShardOptions, SourceSpec, prepare_shards
from tests.data.fineweb import write_jsonl, write_parquet
from tests.support.hub import COMMIT, LocalHub
from tests.support.ranks import rank_environment

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""
# The hub's own client waits up to 8 s between its retries, which come before those of the package.
JOB = """
import json, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
from deepspeed_sdp.cli import main
sys.exit(main(["data", *sys.argv[1:]]))
"""


@pytest.fixture
def hub(tmp_path, documents):
    folder = tmp_path / "hub"
    (folder / "sample" / "10BT").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "README.md").write_text(CARD)
    write_parquet(folder / "sample" / "10BT" / "000_00000.parquet", documents[:30])
    write_jsonl(folder / "sample" / "10BT" / "001_00000.jsonl.gz", documents[30:])
    write_jsonl(folder / "data" / "000.jsonl", ["of another config"] * 3)
    with LocalHub(folder, "HuggingFaceFW/fineweb") as served:
        yield served


def prepare(hub, tmp_path, tokenizer, *arguments, name="out"):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    environment = {**rank_environment(), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / f"home-{name}"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", JOB, str(tmp_path / name), "--source", "hub:HuggingFaceFW/fineweb"]
    command += ["--config", "sample-10BT", "--tokenizer", str(tmp_path / "tokenizer"), "--heldout_fraction", "0.1"]
    command += ["--workers", "1", "--json", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=os.getcwd())


def test_lost_connections_leave_no_trace_but_a_count(hub, tmp_path, tokenizer, documents):
    # Past the first attempts on the footer and on two row groups, and past the retries of the hub's own client.
    hub.spared, hub.cuts = 4, 8
    result = prepare(hub, tmp_path, tokenizer)
    assert result.returncode == 0, result.stderr
    manifest = json.loads(result.stdout)
    assert hub.cut == 8
    assert manifest["commit"] == COMMIT
    # Some versions of the hub's client retry most of them by themselves.
    assert 1 <= manifest["skipped"]["retried: connection or read lost"]["count"] <= 8
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(documents)
    assert [file[0].split("@")[1] for file in manifest["request"]["source"]["files"]] == [
        f"{COMMIT}/sample/10BT/000_00000.parquet", f"{COMMIT}/sample/10BT/001_00000.jsonl.gz",
    ]  # fmt: skip
    spec = SourceSpec((str(hub.folder / "sample"),))
    local = prepare_shards(
        tmp_path / "local", ShardOptions(spec, str(tmp_path / "tokenizer"), heldout_fraction=0.1), workers=1
    )
    assert local["skipped"] == {}
    assert local["files"] == manifest["files"]


@pytest.mark.slow
def test_a_connection_that_stays_lost_and_names_that_do_not_exist(hub, tmp_path, tokenizer):
    hub.cuts = 10**6
    result = prepare(hub, tmp_path, tokenizer, "--retries", "1")
    assert result.returncode == 1
    assert "000_00000.parquet: cannot be read after 1 retries (--retries): peer closed connection" in result.stderr
    hub.cuts = 0
    for arguments, said in ((("--config", "sample-1BT"), "sample-10BT"), (("--split", "test"), "has no split 'test'")):
        result = prepare(hub, tmp_path, tokenizer, *arguments)
        assert result.returncode == 1
        assert said in result.stderr
        assert "Traceback" not in result.stderr
