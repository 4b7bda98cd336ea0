"""Work made ahead in a thread, which ends before the interpreter does."""

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar

from deepspeed_sdp.errors import DataError
from deepspeed_sdp.waits import seconds_to_wait

_Item = TypeVar("_Item")

# How long the end of the process waits for a thread that hangs in a read, all of them together.
_EXIT_SECONDS = 20.0

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class Stopped(Exception):
    """Nobody wants what this thread makes any more. Never leaves the thread."""


def check_stop() -> None:
    """Between two reads.

    Raises:
        Stopped: in a thread of :class:`Ahead` that is to end.
    """
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise Stopped


def wait(seconds: float) -> None:
    """Sleep.

    Raises:
        Stopped: in a thread of :class:`Ahead` that is to end, at once.
    """
    stop = _stop.get()
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped


class Ahead(Generic[_Item]):
    """The items of an iterator, up to ``count`` of them made ahead.

    A thread inside of pyarrow or a tokenizer while the interpreter is torn down keeps the process from ever ending. So
    it is ended by :meth:`close`, else at exit; and when the iterator's owner, ``owner``, is forgotten.
    """

    def __init__(self, items: Iterator[_Item], count: int, owner: object) -> None:
        self._ready: queue.Queue[_Item | BaseException] = queue.Queue(max(1, count))
        self._stop = threading.Event()
        # The thread knows neither the owner nor this object, so that they can be forgotten.
        self._thread = threading.Thread(
            target=_produce, args=(items, self._ready, self._stop), name="ahead", daemon=True
        )
        _running[self._thread] = self._stop
        self._thread.start()
        weakref.finalize(owner, self._stop.set)

    def take(self) -> _Item:
        """The next item, or the error that the thread met.

        Raises:
            DataError: nothing came within the job's time limit: a read hangs.
        """
        limit = seconds_to_wait()
        try:
            item = self._ready.get(timeout=limit)
        except queue.Empty:
            raise DataError(f"the source: gave no text for {limit:.0f} s; a read of it hangs") from None
        if isinstance(item, BaseException):
            # Met again by whoever asks again.
            self._ready.put(item)
            raise item
        return item

    def close(self) -> None:
        """End the thread: after the document or block of rows that it is at, if the read of that does not hang."""
        self._stop.set()
        self._thread.join(_EXIT_SECONDS)


_running: "weakref.WeakKeyDictionary[threading.Thread, threading.Event]" = weakref.WeakKeyDictionary()


@atexit.register
def _end_all() -> None:
    """Before the interpreter is torn down."""
    threads = list(_running.items())
    for _, stop in threads:
        stop.set()
    for thread, _ in threads:
        thread.join(_EXIT_SECONDS / len(threads))


def _produce(items: Iterator[_Item], ready: "queue.Queue[_Item | BaseException]", stop: threading.Event) -> None:
    _stop.set(stop)
    try:
        while not stop.is_set():
            _put(next(items), ready, stop)
    except Stopped:
        return
    except BaseException as error:
        _put(error, ready, stop)


def _put(item: "_Item | BaseException", ready: "queue.Queue[_Item | BaseException]", stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            return ready.put(item, timeout=0.1)
