"""An accelerator that computes on the CPU and writes down what it is asked for, with the collectives in between."""

import contextlib
from unittest import mock

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

COLLECTIVES = (
    "all_gather_object", "all_gather_single", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "barrier",
    "broadcast", "broadcast_object_list", "new_group", "reduce_scatter_single", "reduce_scatter_tensor",
)  # fmt: skip


class RecordingAccelerator(CPU_Accelerator):
    """``log``: calls in their order, as tuples of a name and its arguments."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def set_device(self, device_index):
        self.log.append(("set_device", device_index))

    @property
    def Event(self):
        return lambda enable_timing=False: _Event(self.log, enable_timing)


class _Event:
    """A moment on a device that counts what was recorded on it: a second for each."""

    def __init__(self, log, enable_timing):
        self._log, self._is_timing = log, enable_timing
        self.place = None

    def record(self):
        assert self.place is None, "an event stands for one moment"
        self.place = sum(1 for call in self._log if call[0] == "record")
        self._log.append(("record", self.place))

    def synchronize(self):
        self._log.append(("synchronize", self.place))

    def elapsed_time(self, end):
        assert self._is_timing
        self._log.append(("read", self.place, end.place))
        return 1e3 * (end.place - self.place)


class WorkOfDevice:
    """A ``dist.Work`` as an accelerator's must be treated. ``tensors``: what it reads and writes."""

    def __init__(self, work, name, log, tensors, busy):
        self._work, self._name, self._log = work, name, log
        self._tensors, self._busy = tensors, busy
        self._busy.append(self)

    def wait(self):
        self._log.append(("wait", self._name))
        self._busy.remove(self)
        return self._work.wait()

    def is_completed(self):
        return self._work.is_completed()

    def get_future(self):
        raise AssertionError("a callback on a work's future keeps what the work wrote alive")

    def holds(self, storage):
        return any(tensor.untyped_storage()._cdata == storage._cdata for tensor in self._tensors)


@contextlib.contextmanager
def recorded():
    """Inside, this process has a recording accelerator: its log, and the works that nobody has waited for yet."""
    log, busy = [], []
    before = get_accelerator()

    def wrap(name, original):
        def call(*args, **kwargs):
            log.append((name, *args[:1], *args[2:3]) if name == "new_group" else (name,))
            work = original(*args, **kwargs)
            if not kwargs.get("async_op"):
                return work
            return WorkOfDevice(work, name, log, [a for a in args if hasattr(a, "untyped_storage")], busy)

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, wrap(name, getattr(dist, name))))
        set_accelerator(RecordingAccelerator(log))
        stack.callback(set_accelerator, before)
        yield log, busy
