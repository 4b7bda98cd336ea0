"""Tensors of an accelerator reach a file through two pinned buffers, one filled while the other is read."""

import torch

from deepspeed_sdp.engine.state import staging

BYTES = 64


class Recorder:
    """An accelerator that notes what it is asked for; its memory is the CPU's."""

    def __init__(self):
        self.calls = []

    def pin_memory(self, tensor):
        self.calls.append("pin")
        return tensor

    def Event(self):
        calls, number = self.calls, sum(call.startswith("record") for call in self.calls)

        class Event:
            def record(self):
                calls.append(f"record {number}")

            def synchronize(self):
                calls.append(f"wait {number}")

        return Event()


def test_two_buffers_are_enough_and_a_piece_is_waited_for_before_it_is_read(monkeypatch):
    accelerator = Recorder()
    monkeypatch.setattr(staging, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(staging, "_BUFFER_BYTES", BYTES)
    tensors = [torch.arange(40.0), torch.arange(7).bfloat16(), torch.empty(0), torch.tensor(3), torch.arange(16.0)]
    pieces = []
    for piece in staging.staged(iter(tensors), torch.device("cuda")):
        accelerator.calls.append(f"read {len(pieces)}")
        pieces.append(bytes(piece))
    assert b"".join(pieces) == b"".join(bytes(t.reshape(-1).view(torch.uint8).numpy()) for t in tensors)
    assert [len(piece) for piece in pieces] == [BYTES] * 3 + [sum(t.nbytes for t in tensors) - 3 * BYTES]
    # The next buffer is being filled when one is waited for.
    assert accelerator.calls == [
        "pin", "pin", "record 0", "record 1", "wait 0", "read 0", "record 2", "wait 1", "read 1", "record 3", "wait 2",
        "read 2", "wait 3", "read 3",
    ]  # fmt: skip


def test_on_cpus_tensors_are_read_where_they_lie():
    value = torch.arange(6.0)
    (piece,) = staging.staged([value], torch.device("cpu"))
    value.zero_()
    assert bytes(piece) == bytes(24)
