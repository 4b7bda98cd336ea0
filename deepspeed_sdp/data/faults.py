"""What happens to broken rows, broken files and lost connections: skipped and counted, tried again, or the end."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from deepspeed_sdp.data.background import wait
from deepspeed_sdp.errors import ConfigError, DataError

_Result = TypeVar("_Result")

OnBroken = Literal["skip", "stop"]

# Of every reason so many places are kept.
_PLACES = 5
_LONGEST_WAIT = 60.0
# Client libraries whose errors mean that a connection failed. Not all are installed, so they are known by name.
_NETWORK_LIBRARIES = {"aiohttp", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "ssl", "urllib3"}
_REFUSALS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_TEMPORARY_STATUS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class FaultPolicy:
    """How a source deals with faults.

    Attributes:
        on_broken_row: ``skip`` (and count) or ``stop`` at a row without usable text.
        on_broken_file: the same for a file, or the rest of one, that is damaged or cut off.
        retries: attempts after the first, in a row without any progress, when a connection or a read fails.
        first_wait: seconds before the first of them; doubles up to a minute.
    """

    on_broken_row: OnBroken = "skip"
    on_broken_file: OnBroken = "stop"
    retries: int = 8
    first_wait: float = 1.0

    def __post_init__(self) -> None:
        for key in ("on_broken_row", "on_broken_file"):
            if getattr(self, key) not in ("skip", "stop"):
                raise ConfigError(f"--{key}: got {getattr(self, key)!r}; takes skip or stop")
        if self.retries < 0:
            raise ConfigError(f"--retries: got {self.retries}; takes a number from 0 on")


@dataclass
class Skipped:
    """Counts of what was skipped or tried again, by reason, with the first few places of each."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < _PLACES:
            places.append(place)

    def merge(self, other: "Skipped") -> None:
        """Count what another has counted."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            places = self.places.setdefault(reason, [])
            places += other.places[reason][: _PLACES - len(places)]

    def clear(self) -> None:
        """Begin anew."""
        self.counts.clear()
        self.places.clear()

    def row(self, reason: str, place: str, policy: FaultPolicy) -> None:
        """A row without usable text.

        Raises:
            DataError: the policy is to stop.
        """
        if policy.on_broken_row == "stop":
            raise DataError(f"{place}: {reason} (--on_broken_row skip passes over it)")
        self.add(f"row: {reason}", place)

    def file(self, reason: str, place: str, policy: FaultPolicy) -> None:
        """A file, or the rest of one, that cannot be read.

        Raises:
            DataError: the policy is to stop.
        """
        if policy.on_broken_file == "stop":
            raise DataError(f"{place}: {reason} (--on_broken_file skip passes over it)")
        self.add(f"file: {reason.split(':')[0]}", f"{place}: {reason}")

    def to_json(self) -> dict[str, Any]:
        """``{reason: {"count": n, "first": [place, ...]}}``."""
        return {reason: {"count": n, "first": list(self.places[reason])} for reason, n in sorted(self.counts.items())}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Skipped":
        """What :meth:`to_json` made."""
        return cls({r: v["count"] for r, v in saved.items()}, {r: list(v["first"]) for r, v in saved.items()})


class Retry:
    """Waits with exponential back-off after lost connections, and gives up after so many in a row."""

    def __init__(self, place: str, policy: FaultPolicy, skipped: Skipped) -> None:
        self.place = place
        self.policy = policy
        self.skipped = skipped
        self.failures = 0

    def progress(self) -> None:
        """Something was read: the next failure is the first again."""
        self.failures = 0

    def failed(self, error: Exception) -> None:
        """Wait before the next attempt.

        Raises:
            DataError: that was the last.
        """
        if self.failures == self.policy.retries:
            raise DataError(
                f"{self.place}: cannot be read after {self.failures} retries (--retries): {reason_of(error)}"
            ) from None
        wait(min(self.policy.first_wait * 2**self.failures, _LONGEST_WAIT))
        self.failures += 1
        self.skipped.add("retried: connection or read lost", f"{self.place}: {reason_of(error)}")

    def call(self, work: Callable[[], _Result]) -> _Result:
        """``work()``, again and again while connections are lost."""
        while True:
            try:
                result = work()
            except Exception as error:
                if not is_lost(error):
                    raise
                self.failed(error)
            else:
                self.progress()
                return result


def is_lost(error: BaseException) -> bool:
    """Whether the same call may succeed later: a connection or a disk failed, rather than what is in the file."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in _TEMPORARY_STATUS
    if isinstance(error, _REFUSALS):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if any(kind.__module__.split(".")[0] in _NETWORK_LIBRARIES for kind in type(error).__mro__):
        return True
    # Decompressors and pyarrow raise OSErrors too, for damaged data; those carry no number of the system.
    return isinstance(error, OSError) and error.errno is not None


def reason_of(error: BaseException) -> str:
    """One line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}..."
