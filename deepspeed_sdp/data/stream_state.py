"""The state of a stream: where its lanes are in each source, as JSON."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from deepspeed_sdp.data.lanes import Position
from deepspeed_sdp.errors import DataError
from deepspeed_sdp.schemas import Count, Schema, check_value

#: Of a lane, in each source.
Places = tuple[Position, ...]

_NUMBERS = len(Position._fields)


class _Lanes(Schema):
    num_lanes: int = Field(ge=1)
    lanes: dict[str, Annotated[list[Count], Field(min_length=_NUMBERS)]]


def lanes_of(state: Mapping[str, Any], sources: int) -> dict[int, Places]:
    """The places of all lanes of a merged state.

    Raises:
        DataError: it lacks lanes, or is of another number of sources.
    """
    check_value(dict(state), _Lanes, DataError, "stream state")
    lanes = state["lanes"]
    if len(lanes) != state["num_lanes"] or set(lanes) != set(map(str, range(len(lanes)))):
        raise DataError(
            f"stream state: has {len(lanes)} of {state['num_lanes']} lanes; takes the merged state of all ranks"
        )
    if any(len(numbers) != _NUMBERS * sources for numbers in lanes.values()):
        raise DataError(f"stream state: has lanes of another length; takes {_NUMBERS} numbers for each source")
    return {int(lane): _places(numbers) for lane, numbers in lanes.items()}


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one.

    Raises:
        DataError: they are not of one stream, or two hold the same lane.
    """
    merged = {**states[0], "lanes": {}}
    for state in states:
        if {**state, "lanes": {}} != {**states[0], "lanes": {}}:
            raise DataError("stream state: those of two ranks are of different streams")
        if merged["lanes"].keys() & state["lanes"].keys():
            raise DataError("stream state: two ranks hold the same lane")
        merged["lanes"] |= state["lanes"]
    merged["lanes"] = {lane: merged["lanes"][lane] for lane in sorted(merged["lanes"], key=int)}
    return merged


def sequences_seen(state: Mapping[str, Any]) -> list[int]:
    """Sequences that the lanes of a state have delivered of each source, in the order given, over all epochs."""
    lanes = [_places(numbers) for numbers in state["lanes"].values()]
    return [sum(place.sequences for place in places) for places in zip(*lanes, strict=True)]


def _places(numbers: Sequence[int]) -> Places:
    return tuple(Position(*numbers[first : first + _NUMBERS]) for first in range(0, len(numbers), _NUMBERS))
