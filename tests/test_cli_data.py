"""``deepspeed-sdp data``."""

import json

import pytest

from deepspeed_sdp.cli import main
from deepspeed_sdp.cli.data import count
from tests.data.conftest import make_documents
from tests.data.fineweb import write_parquet


@pytest.fixture
def run(capsys, tmp_path):
    write_parquet(tmp_path / "a.parquet", [None, *make_documents(60)])

    def run(*arguments):
        code = main(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_from_parquet_to_shards_and_what_they_hold(run, tmp_path):
    out, source = tmp_path / "out", ["--source", tmp_path / "a.parquet", "--train_tokenizer", "300"]
    arguments = [out, *source, "--heldout_fraction", "0.1", "--max_tokens", "1e3", "--workers", "1"]
    code, text, bar = run(*arguments)
    assert code == 0
    assert "train       1000 tokens" in text
    assert "1 x row: text is null, first at " in text
    assert "1.00k/1.00k" in bar
    assert "tokens/s" in bar
    _, shown, verified = run("--inspect", out, "--verify")
    assert shown == text
    assert "files match their checksums" in verified
    assert json.loads(run("--inspect", out, "--json")[1])["splits"]["train"]["tokens"] == 1000
    assert run(*arguments, "--quiet") == (0, text, "")
    code, _, error = run(out, *source)
    assert (code, error.count("\n")) == (1, 1)
    assert "another max_tokens, heldout_fraction" in error
    damaged = bytearray((out / "train-00000.bin").read_bytes())
    damaged[5] ^= 1
    (out / "train-00000.bin").write_bytes(damaged)
    code, _, error = run("--inspect", out, "--verify")
    assert code == 1
    assert "train-00000.bin differ from the manifest's checksums" in error
    (out / "train-00000.bin").write_bytes(damaged[:-1])
    code, _, error = run("--inspect", out)
    assert code == 1
    assert "has 1999 bytes; the manifest says 2000" in error


def test_unusable_options_are_one_clear_error(run, tmp_path):
    for arguments, said in (
        ([], "takes either OUT"),
        ([tmp_path / "out"], "--source: got nothing"),
        ([tmp_path / "out", "--source", tmp_path / "a.parquet"], "--tokenizer, --train_tokenizer: got neither"),
        ([tmp_path / "out", "--source", tmp_path / "b.parquet", "--train_tokenizer", "300"], "does not exist"),
        (
            [tmp_path / "out", "--source", tmp_path / "a.parquet", "--train_tokenizer", "300", "--text_column", "body"],
            "no column 'body'",
        ),
        ([tmp_path / "out", "--source", tmp_path / "a.parquet", "--tokenizer", "no/where"], "--tokenizer: no/where"),
        (["--inspect", tmp_path], "holds no finished shards"),
    ):
        code, _, error = run(*arguments)
        assert (code, error.count("\n")) == (1, 1), error
        assert said in error
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--max_tokens", "1.5")
    assert count("1e9") == 10**9
    assert count("123456789012345678") == 123456789012345678
