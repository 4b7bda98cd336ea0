"""One job, one error message: whichever rank fails first reports, the others end silently.

A launcher (``deepspeed``, ``torchrun``) ends the job when one rank exits with an error, so the rank that reports must
have written its message before any rank exits.
"""

import functools
import inspect
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from deepspeed_sdp.errors import SDPError
from deepspeed_sdp.patches import Undo, patch

_CLAIM = "deepspeed_sdp/failure"
# How long a rank waits for the one that reports; launchers end it earlier.
_GRACE_SECONDS = 10.0
# How long the one that reports waits for the others to have asked whether they should.
_CLAIM_SECONDS = 1.0
_is_terminated = False

Leave = Callable[[BaseException, Callable[[], None]], int]
"""What a rank does that ends with an error: it is given the error, and what reports it; returns the exit code."""


@contextmanager
def one_report() -> Iterator[None]:
    """Turn any exception inside into one message of one rank on stderr and exit code 1 of all ranks.

    An :class:`SDPError` is printed as its message; anything else with its traceback and the rank it came from.
    """
    try:
        yield
    except SDPError as error:
        if error.is_of_another_rank:  # which has the traceback
            time.sleep(_CLAIM_SECONDS)
        _end_job(f"error: {error}", error)
    except KeyboardInterrupt as error:
        _end_job("interrupted", error)
    except Exception as error:
        _end_job(f"rank {_rank()} failed:\n{traceback.format_exc().rstrip()}", error)


def end_by(leave: Leave) -> None:
    """From here on a rank that fails inside :func:`one_report` ends as ``leave`` says."""
    global _leave
    _leave = leave


@functools.cache
def report_uncaught() -> Undo:
    """From here on an :class:`SDPError` that ends a script is one message of one rank instead of a traceback of each.

    All else goes to the hook that stands there; so do these errors too, where it is somebody's own. What is returned
    takes it back.
    """
    before = sys.excepthook
    is_own = not _is_default(before)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        is_ours = isinstance(error, SDPError)
        if is_own or not is_ours:
            before(kind, error, trace)
        if is_ours:
            _report(f"error: {error}")

    return patch(sys, "excepthook", hook)


def _is_default(hook: Any) -> bool:
    """Whether it is the interpreter's, alone or beneath that of torch, which writes the rank in front."""
    if getattr(hook, "__module__", None) == "torch.distributed.distributed_c10d":
        hook = inspect.getclosurevars(hook).nonlocals.get("old_hook")
    return hook is sys.__excepthook__


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def note_termination() -> None:
    """This process was sent SIGTERM and went on: by its launcher, perhaps, because another rank has failed."""
    global _is_terminated
    _is_terminated = True


def _end_job(message: str, error: BaseException) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Not sys.exit: destructors of half-done collectives may wait for ranks that are gone.
    os._exit(_leave(error, functools.partial(_report, message)))


def _report_and_fail(error: BaseException, report: Callable[[], None]) -> int:
    report()
    return 1


def _report(message: str) -> None:
    """Print it on the first rank that comes here; the others wait until that is done."""
    first = _claim()
    if first is None and _is_terminated:
        return
    if not first:
        time.sleep(_GRACE_SECONDS)
    # Who cannot know and is still alive was the only one to fail.
    if first is not False:
        sys.stdout.flush()
        print(f"\n{message}", file=sys.stderr, flush=True)
    if first:
        _wait_for_claims()


def _claim() -> bool | None:
    """Whether this rank is the first to fail; ``None`` if it cannot know.

    Before ranks can talk, most failures are the same everywhere, and rank 0 reports. Later, rank 0 holds the store: if
    that is gone, rank 0 has ended, as a rule with a report.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        return _rank() == 0 or None
    try:
        store = dist.distributed_c10d._get_default_store()
        return bool(store.add(_CLAIM, 1) == 1)
    except Exception:
        return None


def _wait_for_claims() -> None:
    """The store ends with rank 0: who asks it just then cannot know, and torch writes a stack of C++ calls."""
    deadline = time.monotonic() + _CLAIM_SECONDS
    with suppress(Exception):
        dist = sys.modules["torch.distributed"]
        store = dist.distributed_c10d._get_default_store()
        while store.add(_CLAIM, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.05)


_leave: Leave = _report_and_fail
