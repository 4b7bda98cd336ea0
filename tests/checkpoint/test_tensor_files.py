"""Files of tensors: written front to back, by this process or by another one."""

import hashlib
import threading

import pytest
import torch
from safetensors import safe_open

from deepspeed_sdp.checkpoint import Held, Layout, Section, Snapshot, Streamed, file_writer, header, whole
from deepspeed_sdp.errors import OutputError

LAYOUT = Layout(
    [((0,),)],
    [
        Section({"master": torch.bfloat16, "optimizer.sum": torch.float32}, [Held(0, (whole("a", (3, 5)),), 15)]),
        Section({"model": torch.int64}, [Held(0, (whole("b", ()),), 1)]),
    ],
)
VALUES = [torch.arange(15).bfloat16(), torch.arange(15.0) / 3, torch.tensor([2**40])]


def content():
    return [memoryview(header(LAYOUT, 0)), *(memoryview(value.view(torch.uint8).numpy()) for value in VALUES)]


@pytest.mark.parametrize("how", ["streamed", "snapshot"])
def test_a_file_is_what_safetensors_reads(tmp_path, how):
    pieces = content()
    nbytes = sum(map(len, pieces))
    file = Streamed(pieces) if how == "streamed" else Snapshot(pieces)
    described = file.write(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    assert described == {"bytes": nbytes, "sha256": hashlib.sha256(data).hexdigest()}
    assert len(data) == nbytes
    with safe_open(tmp_path / "x", framework="pt") as found:
        for key, value in zip(("0.0.master", "0.0.optimizer.sum", "0.1.model"), VALUES, strict=True):
            assert torch.equal(found.get_tensor(key), value)


def test_a_snapshot_is_of_the_moment_when_it_was_taken(tmp_path):
    value = torch.arange(5.0)
    snapshot = Snapshot([memoryview(value.view(torch.uint8).numpy())])
    value.zero_()
    snapshot.write(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == bytes(torch.arange(5.0).view(torch.uint8).numpy())


@pytest.mark.parametrize("how", ["streamed", "snapshot"])
def test_a_file_that_cannot_be_written_is_an_error_and_its_content_is_made_to_the_end(tmp_path, how):
    pieces = content()
    made = []
    given = (made.append(piece) or piece for piece in pieces)
    file = Streamed(given) if how == "streamed" else Snapshot(given)
    with pytest.raises(OSError, match="No such file"):
        file.write(tmp_path / "missing" / "x")
    assert made == pieces


def test_a_writer_that_is_killed_is_an_error_in_words(tmp_path, monkeypatch):
    (tmp_path / "writer.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(file_writer, "__file__", str(tmp_path / "writer.py"))
    pieces = content()
    with pytest.raises(OutputError, match=r"cannot write .*/x: the process that writes it is killed by signal 9"):
        Snapshot(pieces).write(tmp_path / "x")
    (tmp_path / "writer.py").write_text("raise MemoryError('none left')\n")
    with pytest.raises(OutputError, match="is MemoryError: none left"):
        Snapshot(pieces).write(tmp_path / "x")


def test_the_threads_of_this_process_run_while_the_other_writes(tmp_path):
    """The writer takes no part of the interpreter: what is counted here goes on while megabytes are written."""
    nbytes, counted, done = 64 << 20, 0, threading.Event()
    snapshot = Snapshot([memoryview(bytearray(nbytes))])
    thread = threading.Thread(target=lambda: (snapshot.write(tmp_path / "x"), done.set()))
    thread.start()
    while not done.is_set():
        counted += 1
    thread.join()
    assert counted > 1000
    assert (tmp_path / "x").stat().st_size == nbytes
