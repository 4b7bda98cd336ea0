"""What all ranks do or none: where one of them fails, all raise; and where they must have the same, they compare it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deepspeed_sdp.errors import ConfigError, SDPError
from deepspeed_sdp.ranks import object_of, reduce_numbers

T = TypeVar("T")

_PURPOSE = "agreeing on the job"


def agree(describe: Callable[[], Mapping[str, Any]]) -> None:
    """Collective. Compare what ``describe`` returns over all ranks, key by key: causes should stand before effects.

    Ranks compare digests; only where these differ do two of them say what they have.

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
    rank, world = dist.get_rank(), dist.get_world_size()
    said = _words(sorted(mine.items()) if error is None else _message(error))
    has_failed = error is not None
    lowest = _lowest([rank if has_failed else world, has_failed, *said, *(-word for word in said)])
    first_failed, have_all_failed, words = lowest[0], bool(lowest[1]), lowest[2:]
    are_alike = words[: len(said)] == [-word for word in words[len(said) :]]
    if first_failed < world:
        message = _message(error) if error is not None else None
        is_everywhere = have_all_failed and are_alike
        message = message if is_everywhere else object_of(first_failed, message, _PURPOSE)
        if error is not None and (is_everywhere or not isinstance(error, SDPError)):
            raise error
        raise ConfigError(f"rank {first_failed}: {message}")
    if not are_alike:
        expected: dict[str, str] = object_of(0, mine, _PURPOSE)
        [other] = _lowest([world if mine == expected else rank])
        values: dict[str, str] = object_of(other, mine, _PURPOSE)
        key = next(k for k in [*expected, *values] if expected.get(k) != values.get(k))
        raise ConfigError(
            f"ranks disagree on {key}: rank 0 has {expected.get(key, 'nothing')}, rank {other} has "
            f"{values.get(key, 'nothing')}; give every rank the same configuration"
        )


def _words(value: Any) -> list[int]:
    """A digest, as numbers that have a negative in 64 bits."""
    digest = hashlib.sha256(repr(value).encode()).digest()
    return [int.from_bytes(digest[i : i + 7], "little") for i in range(0, 28, 7)]


def _lowest(numbers: list[int]) -> list[int]:
    told = reduce_numbers(torch.tensor(numbers, dtype=torch.int64), _PURPOSE, dist.ReduceOp.MIN)
    return [int(number) for number in told]


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
    carried: tuple[T, Exception | None] = object_of(0, (made, told), "what rank 0 computes")
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
