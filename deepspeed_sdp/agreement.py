"""What all ranks do or none: where one of them fails, all raise; and where they must have the same, they compare it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from deepspeed_sdp.errors import ConfigError, SDPError
from deepspeed_sdp.ranks import object_of, reduce_numbers

T = TypeVar("T")

_PURPOSE = "agreeing on the job"


def agree(describe: Callable[[], Mapping[str, Any]], group: ProcessGroup | None = None) -> None:
    """Collective. Compare what ``describe`` returns over all ranks, key by key: causes should stand before effects.

    Ranks compare digests; only where these differ do two of them say what they have.

    Args:
        group: of all ranks; default: the package's own.

    Raises:
        SDPError: ``describe`` raised one on some rank; every rank raises it, so that none waits for the others. Of
            any other error, the rank that has it raises that, and the others a ConfigError.
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
    lowest = _lowest([rank if has_failed else world, has_failed, *said, *(-word for word in said)], group)
    first_failed, have_all_failed, words = lowest[0], bool(lowest[1]), lowest[2:]
    are_alike = words[: len(said)] == [-word for word in words[len(said) :]]
    if first_failed < world:
        is_everywhere = have_all_failed and are_alike
        told = error and _told(error, rank)
        told = told if is_everywhere else object_of(first_failed, told, _PURPOSE, group)
        assert told is not None
        raise error if error is not None and (is_everywhere or not isinstance(error, SDPError)) else told
    if not are_alike:
        expected: dict[str, str] = object_of(0, mine, _PURPOSE, group)
        [other] = _lowest([world if mine == expected else rank], group)
        values: dict[str, str] = object_of(other, mine, _PURPOSE, group)
        key = next(k for k in [*expected, *values] if expected.get(k) != values.get(k))
        raise ConfigError(
            f"ranks disagree on {key}: rank 0 has {expected.get(key, 'nothing')}, rank {other} has "
            f"{values.get(key, 'nothing')}; give every rank the same configuration"
        )


def _words(value: Any) -> list[int]:
    """A digest, as numbers that have a negative in 64 bits."""
    digest = hashlib.sha256(repr(value).encode()).digest()
    return [int.from_bytes(digest[i : i + 7], "little") for i in range(0, 28, 7)]


def _lowest(numbers: list[int], group: ProcessGroup | None) -> list[int]:
    told = reduce_numbers(torch.tensor(numbers, dtype=torch.int64), _PURPOSE, dist.ReduceOp.MIN, group)
    return [int(number) for number in told]


def agreed(
    make: Callable[[], T],
    describe: Callable[[T], Mapping[str, Any]] = lambda _: {},
    group: ProcessGroup | None = None,
) -> T:
    """Collective. What ``make`` returns; where it raises on one rank, all raise, and ``describe`` of it is compared.

    Raises:
        SDPError: see :func:`agree`.
    """
    made: list[T] = []

    def work() -> Mapping[str, Any]:
        made.append(make())
        return describe(made[0])

    agree(work, group)
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
    told = error if error is None or isinstance(error, SDPError) else _told(error, 0)
    carried: tuple[T, Exception | None] = object_of(0, (made, told), "what rank 0 computes")
    if error is not None or carried[1] is not None:
        raise error or carried[1]  # type: ignore[misc]
    return carried[0]


def _told(error: Exception, rank: int) -> SDPError:
    """What the other ranks raise for an error of ``rank``."""
    kind = type(error) if isinstance(error, SDPError) else ConfigError
    told = kind(f"rank {rank}: {_message(error)}")
    told.is_of_another_rank = not isinstance(error, SDPError)
    return told


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
