"""When the rounds of a backward pass may be launched. Pure; ``estimate/`` follows it too."""

from collections.abc import Collection, Sequence


class Launches:
    """Rounds leave in their order, each when every gradient in it has come.

    Args:
        rounds: the parameters that this rank trains of each; none where it owns nothing of it.

    Attributes:
        most: rounds under way at a time: flat copies of gradients alive beyond the gradients themselves.
        next: the round that is launched next.
    """

    most = 2

    def __init__(self, rounds: Sequence[Collection[int]]) -> None:
        self._rounds = [frozenset(members) for members in rounds]
        self._rounds_of: dict[int, list[int]] = {}
        for round_, members in enumerate(self._rounds):
            for index in members:
                self._rounds_of.setdefault(index, []).append(round_)
        self.begin()

    def __len__(self) -> int:
        return len(self._rounds)

    def begin(self) -> None:
        """A backward pass begins."""
        self._waiting = [set(members) for members in self._rounds]
        self._unused = {index: len(rounds) for index, rounds in self._rounds_of.items()}
        self.next = 0

    def arrive(self, index: int) -> None:
        """The gradient of parameter ``index`` is whole.

        Raises:
            RuntimeError: it was before, or its round is launched.
        """
        for round_ in self._rounds_of[index]:
            if index not in self._waiting[round_]:
                raise RuntimeError(
                    f"gradient {index} came twice in one backward pass; it may have been reduced already"
                )
            self._waiting[round_].remove(index)

    def launch(self) -> int:
        """The next round, whose gradients are waited for no more."""
        round_, self.next = self.next, self.next + 1
        self._waiting[round_].clear()
        return round_

    def is_used_up(self, index: int) -> bool:
        """One more round has taken its part of gradient ``index``: whether that was the last, and it is free."""
        self._unused[index] -= 1
        return not self._unused[index]

    @property
    def complete(self) -> int:
        """The first round that must wait: after it come incomplete rounds, or ones that this rank owns nothing of.

        The latter are always complete. But taking part in them early could mean to wait for ranks that still need
        something of this one (at ZeRO-3 a gather) to come so far in their backward pass.
        """
        end = self.next
        for round_ in range(self.next, len(self._rounds)):
            if self._waiting[round_]:
                break
            if self._rounds[round_]:
                end = round_ + 1
        return end
