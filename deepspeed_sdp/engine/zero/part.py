"""ZeRO-3: one range of the model, whose weights are gathered and freed together."""

from collections.abc import Sequence
from enum import Enum, auto

import torch

from deepspeed_sdp.engine.comm.stages import Pending
from deepspeed_sdp.engine.comm.transport import Transport
from deepspeed_sdp.engine.zero.flat_bucket import FlatBucket
from deepspeed_sdp.engine.zero.rounds import Use


class State(Enum):
    """Where the weights of a part are."""

    SHARDED = auto()
    UNSHARDING = auto()
    UNSHARDED = auto()


class Part:
    """The weights of one range of rounds; a parameter that is cut has all its rounds in it.

    Args:
        use: what uses them.
        rounds: its rounds.
        buckets: this rank's buckets in them, in the total order.
    """

    def __init__(self, use: Use, rounds: range, buckets: Sequence[FlatBucket]) -> None:
        self.use, self.modules = use, use.modules
        self.rounds = rounds
        self.buckets = tuple(buckets)
        self.state = State.UNSHARDED
        self._weights = tuple(dict.fromkeys(bucket.weights for bucket in buckets))
        self._pending: Pending | None = None

    def keep_shards(self, device: torch.device, is_pinned: bool) -> None:
        """Keep this rank's shards on ``device``, page-locked if asked, and free the rest."""
        for bucket in self.buckets:
            bucket.keep_shard_only(device, is_pinned)
        self.reshard()

    def unshard(self, transport: Transport, is_kept: bool = True) -> None:
        """Collective. Issue the gather; ``is_kept`` as in :meth:`FlatWeights.allocate`."""
        for weights in self._weights:
            weights.allocate(is_kept)
        self._pending = transport.gather(self.buckets, "weight_gather")
        self.state = State.UNSHARDING

    def wait(self) -> None:
        """Wait for the gather, if one is under way: the parameters have values then."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.finish()
        for weights in self._weights:
            weights.show()
        self.state = State.UNSHARDED

    def reshard(self) -> None:
        """Give the gathered weights back."""
        if self.state is not State.SHARDED:
            for weights in self._weights:
                weights.free()
        self.state = State.SHARDED

    @property
    def is_readable(self) -> bool:
        """Whether all parameters, of which there may be none, have values."""
        return not self.buckets or self.state is State.UNSHARDED
