"""What all ranks do or none: where one of them fails, all raise; and where they must have the same, they compare it."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from deepspeed_sdp.errors import ConfigError, SDPError
from deepspeed_sdp.ranks import gather_objects, object_of_first

T = TypeVar("T")


def agree(describe: Callable[[], Mapping[str, Any]]) -> None:
    """Collective. Compare what ``describe`` returns over all ranks, key by key: causes should stand before effects.

    Raises:
        SDPError: ``describe`` raised one on some rank; every rank raises it, so that none waits for the others.
        ConfigError: ranks differ; the message names the rank, the key and both values.
    """
    error: Exception | None = None
    mine: dict[str, str] = {}
    try:
        mine = flatten(describe())
    except Exception as raised:  # the other ranks wait for word of this one, whatever it is
        error = raised
    reports = gather_objects((mine, None if error is None else _message(error)), "agreeing on the job")
    failures = {rank: message for rank, (_, message) in enumerate(reports) if message is not None}
    is_everywhere = len(failures) == len(reports) and len(set(failures.values())) == 1
    if error is not None and (is_everywhere or not isinstance(error, SDPError)):
        raise error
    if failures:
        rank, message = min(failures.items())
        raise ConfigError(f"rank {rank}: {message}")
    expected = reports[0][0]
    for rank, (values, _) in enumerate(reports[1:], start=1):
        for key in [*expected, *(key for key in values if key not in expected)]:
            if expected.get(key) != values.get(key):
                raise ConfigError(
                    f"ranks disagree on {key}: rank 0 has {expected.get(key, 'nothing')}, rank {rank} has "
                    f"{values.get(key, 'nothing')}; give every rank the same configuration"
                )


def agreed(make: Callable[[], T], describe: Callable[[T], Mapping[str, Any]] = lambda _: {}) -> T:
    """Collective. What ``make`` returns; where it raises on one rank, all raise, and ``describe`` of it is compared.

    Raises:
        SDPError: see :func:`agree`.
    """
    made: list[T] = []

    def work() -> Mapping[str, Any]:
        made.append(make())
        return describe(made[0])

    agree(work)
    return made[0]


def from_first_rank(make: Callable[[], T]) -> T:
    """Collective. What ``make`` returns on rank 0, on every rank: computed once, by one rank, and sent.

    Raises:
        SDPError: what ``make`` raised on rank 0, on every rank; any other error as a ConfigError on the others.
    """
    made: T | None = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            made = make()
        except Exception as raised:  # the other ranks wait for word of it, whatever it is
            error = raised
    told = error
    if error is not None and not isinstance(error, SDPError):
        told = ConfigError(f"rank 0: {_message(error)}")
        told.is_of_another_rank = True
    carried: tuple[T, Exception | None] = object_of_first((made, told), "what rank 0 computes")
    if error is not None or carried[1] is not None:
        raise error or carried[1]  # type: ignore[misc]
    return carried[0]


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, SDPError) else f"{type(error).__name__}: {error}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with JSON values."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = json.dumps(value, sort_keys=True, default=str)
    return flat
