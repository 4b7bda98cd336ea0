"""ZeRO-3: in which order the parts of a model are gathered and freed, and their gradients reduced.

Pure. Parts are gathered in one fixed sequence, equal on all ranks whatever they own: forwards, then the layers
backwards; the need for a part issues all that stand before it in the sequence, and ``prefetch`` parts after it. In the
backward pass the reductions of a part are launched when the part before it is needed. So the order of gathers and
reductions together is a property of the model, and a rank that lacks a block, whose hooks can fire in another order or
not at all, takes part all the same.
"""

from collections.abc import Collection, Iterator, Sequence
from enum import Enum


class Action(Enum):
    """What is done with a part."""

    UNSHARD = "issue its gather"
    WAIT = "wait for its gather"
    RESHARD = "free its weights"
    REDUCE = "launch the reductions of all parts after it"


Steps = Iterator[tuple[Action, int]]
"""What an event asks for, in this order; each is to be done before the next one is asked for."""


class Schedule:
    """Follows the events of one rank's passes.

    Args:
        count: parts, in forward order.
        prefetch: parts gathered ahead of the one that computes.
        backward: parts whose backward pass reads weights (that of an embedding does not).
        stays: parts that are gathered in the forward pass and kept to the end of the backward pass, as nothing says
            when in it they are needed.
    """

    def __init__(self, count: int, prefetch: int, backward: Collection[int], stays: Collection[int] = ()) -> None:
        self._count, self._prefetch = count, prefetch
        self._backward, self._stays = frozenset(backward), frozenset(stays)
        self._held: set[int] = set()
        self._pending: set[int] = set()
        self._phase = "idle"
        self._sequence: Sequence[int] = ()
        self._issued = 0
        self._to_visit: list[int] = []

    def begin_forward(self) -> Steps:
        """A forward pass of the whole model."""
        yield from self._free_all()
        self._phase, self._sequence = "forward", range(self._count)

    def before_forward(self, part: int) -> Steps:
        """The forward pass reads the weights of ``part``."""
        yield from self._need(part)

    def after_forward(self, part: int) -> Steps:
        """The forward pass has read them for the last time."""
        if not self._outlasts_forward(part):
            yield from self._free(part)

    def end_forward(self, is_training: bool) -> Steps:
        """The forward pass is over; ``is_training``: a backward pass may follow, which begins with the last parts."""
        yield from self._issue(self._count)
        for part in range(self._count):
            yield from self._wait(part)
            if not is_training or not self._outlasts_forward(part):
                yield from self._free(part)

    def before_backward(self, part: int) -> Steps:
        """The backward pass, which may be a second one through the same graph, reads the weights of ``part``."""
        self._begin_backward()
        if part in self._stays:
            yield from self._need(part)
            return
        yield from self._visit_down_to(part)
        yield from self._need(part)
        for later in range(part + 1, self._count):
            if later not in self._stays | self._pending:
                yield from self._free(later)

    def complete_backward(self) -> Steps:
        """The backward pass is over: what its hooks did not come to, before the last gradients are reduced."""
        self._begin_backward()
        yield from self._visit_down_to(0)
        yield from self._issue(len(self._sequence))

    def end_backward(self) -> Steps:
        """The last gradients are reduced: nothing stays."""
        yield from self._free_all()

    def forget(self, parts: Collection[int]) -> None:
        """Outside of the passes, weights of ``parts`` were gathered, and are freed: a pass gathers them again."""
        self._held.difference_update(parts)
        self._pending.difference_update(parts)

    def _outlasts_forward(self, part: int) -> bool:
        return part in self._stays or part >= self._count - 2

    def _begin_backward(self) -> None:
        if self._phase == "backward":
            return
        self._phase, self._issued = "backward", 0
        # The last parts are still there, unless this is a second backward pass through the same graph.
        absent = self._backward - self._held
        self._sequence = sorted(absent, key=lambda part: (part not in self._stays, -part))
        self._to_visit = sorted(self._backward - self._stays)

    def _visit_down_to(self, part: int) -> Steps:
        """What the backward passes of the parts down to ``part`` issue, in the one order that all ranks share."""
        while self._to_visit and self._to_visit[-1] >= part:
            visited = self._to_visit.pop()
            yield from self._issue(self._place(visited) + 1 + self._prefetch)
            yield Action.REDUCE, visited

    def _need(self, part: int) -> Steps:
        place = self._place(part)
        if self._phase == "forward" or part in self._stays:
            yield from self._issue(place + 1 + self._prefetch)
        for earlier in self._sequence[: max(place, 0)]:
            # What a rank has nothing of is waited for too, or its buffers would pile up.
            yield from self._wait(earlier)
        yield from self._wait(part)

    def _place(self, part: int) -> int:
        return self._sequence.index(part) if part in self._sequence else -1

    def _issue(self, count: int) -> Steps:
        while self._issued < min(count, len(self._sequence)):
            part = self._sequence[self._issued]
            self._issued += 1
            self._held.add(part)
            self._pending.add(part)
            yield Action.UNSHARD, part

    def _wait(self, part: int) -> Steps:
        if part in self._pending:
            self._pending.remove(part)
            yield Action.WAIT, part

    def _free(self, part: int) -> Steps:
        if part in self._held:
            self._held.remove(part)
            yield Action.RESHARD, part

    def _free_all(self) -> Steps:
        for part in range(self._count):
            yield from self._wait(part)
            yield from self._free(part)
        self._phase, self._sequence, self._issued = "idle", (), 0
