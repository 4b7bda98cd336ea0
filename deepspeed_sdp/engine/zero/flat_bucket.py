"""A bucket whose weights lie in one flat tensor."""

from collections.abc import Iterator, Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from deepspeed_sdp.engine.comm.groups import Group
from deepspeed_sdp.engine.zero.freed_weight import FreedWeight, nothing_of
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.plan.rounds import Bucket


class FlatBucket(OwnerBucket):
    """Parameters of one owner set as views of one flat tensor.

    The layout of FSDP's flat parameters (``torch.distributed.fsdp``), one per (round, owner set, client group).

    Args:
        parameters: the parameters themselves; their data moves into the flat tensor.

    Attributes:
        flat: ``[padded_numel]``, weights in the dtype they are trained in; zero padding at the end.
        shard: ``[shard_numel]``, this rank's part. A view of :attr:`flat` until :meth:`keep_shard_only`.
    """

    def __init__(
        self,
        bucket: Bucket,
        parameters: Sequence[nn.Parameter],
        ranks: tuple[int, ...],
        rank: int,
        group: Group,
        is_sharded: bool,
    ) -> None:
        super().__init__(bucket, parameters, ranks, rank, group, is_sharded)
        self._is_resident = True
        self._parameters = tuple(parameters)
        self._nothing: tuple[torch.Tensor, ...] = ()
        self.flat = self._kept = torch.zeros(self.padded_numel, dtype=self.dtype, device=self.device)
        for parameter, view in zip(parameters, self.split(self.flat), strict=True):
            view.copy_(parameter.data.reshape(-1))
            parameter.data = view.view(parameter.shape)
        self.shard = self.flat.narrow(0, self.index * self.shard_numel, self.shard_numel)

    def master(self, device: torch.device) -> nn.Parameter:
        if self.shard.dtype == torch.float32 and self.shard.device == device:
            # fp32 training: the weights are their own master copy.
            return nn.Parameter(self.shard)
        return nn.Parameter(self.shard.to(device, torch.float32, copy=True))

    def places(self, master: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if master.data_ptr() != self.shard.data_ptr():
            yield self.shard, master

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.flat[start:stop]

    def write(self, start: int, values: torch.Tensor) -> None:
        self.flat.narrow(0, start, len(values)).copy_(values)

    # -- ZeRO 3: the flat tensor exists only while it is used ---------------------------------------------------------

    def keep_shard_only(self, device: torch.device, is_pinned: bool = False) -> None:
        """Give the shard memory of its own on ``device``, page-locked if asked, and free the rest."""
        shard = self.shard.to(device, copy=True)
        self.shard = get_accelerator().pin_memory(shard) if is_pinned else shard
        self._nothing = tuple(map(nothing_of, self._parameters))
        self.free()

    def free(self) -> None:
        """Give the flat tensor's memory back. Parameters stay the objects that they are, without values."""
        for parameter, nothing in zip(self._parameters, self._nothing, strict=True):
            parameter.data = nothing
            if type(parameter) is nn.Parameter:
                parameter.__class__ = FreedWeight
        self.flat = self._kept
        self.flat.untyped_storage().resize_(0)
        self._is_resident = False

    def allocate(self, is_kept: bool = True) -> None:
        """Give the flat tensor memory, for the transport to fill; parameters have values again after :meth:`show`.

        Args:
            is_kept: fill what autograd saved of the weights before; else take new memory, which is never taken away
                from who holds a view of it.
        """
        if is_kept:
            self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        else:
            self.flat = torch.empty(self.padded_numel, dtype=self.dtype, device=self.device)

    def show(self) -> None:
        """The flat tensor is filled: let the parameters have their values."""
        for parameter, view in zip(self._parameters, self.split(self.flat), strict=True):
            if isinstance(parameter, FreedWeight):
                parameter.__class__ = nn.Parameter  # type: ignore[assignment]
            parameter.data = view.view(parameter.shape)
        self._is_resident = True

    @property
    def is_resident(self) -> bool:
        """Whether the parameters have values."""
        return self._is_resident
