"""A process that is killed at a chosen call, without a process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed_sdp import files

_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "exchange"}
_state = {"left": None, "installed": False}


class Killed(BaseException):
    """Nothing catches it, and from then on every call raises it: what would tidy up is dead too."""


def _watch(event, arguments):
    if _state["left"] is None or event not in _EVENTS:
        return
    # Reading changes nothing.
    if event == "open" and isinstance(arguments[1], str) and not set(arguments[1]) & set("wax+"):
        return
    if _state["left"] == 0:
        raise Killed
    _state["left"] -= 1


def crashes(monkeypatch, most=400, stride=1) -> Iterator[object]:
    """Contexts that are killed at the first call that changes files, at the second, and so on to one that is not.

    Args:
        most: calls that there can be.
        stride: only every so many are tried.
    """
    if not _state["installed"]:
        sys.addaudithook(_watch)
        _state["installed"] = True
    exchange = files._exchange

    def audited(one, other):
        sys.audit("exchange", str(one))
        return exchange(one, other)

    monkeypatch.setattr(files, "_exchange", audited)
    survived = []

    @contextmanager
    def killed_at(count):
        _state["left"] = count
        try:
            yield
            survived.append(count)
        except Killed:
            pass
        finally:
            _state["left"] = None

    for count in range(0, most, stride):
        yield killed_at(count)
        if survived:
            return
    raise AssertionError(f"{most} calls are not enough")
