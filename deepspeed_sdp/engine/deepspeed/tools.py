"""What DeepSpeed's own tools come to by a parameter: ``deepspeed.utils.safe_get_*`` and ``safe_set_*``, and
``deepspeed.zero.GatheredParameters``.

They look for ``ds_id`` on a parameter and ask its ``_z3_optimizer``, at every stage; both are put there while the
engine lives. A parameter that this rank does not train has none, and is none to them. What is got or gathered comes
from the shards of all owners, who all call alike, in one order.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from deepspeed_sdp.engine.zero.freed_weight import FreedWeight, give_values, nothing_of, take_values
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer
from deepspeed_sdp.engine.zero.owner_bucket import OwnerBucket
from deepspeed_sdp.errors import ConfigError, StateError
from deepspeed_sdp.patches import Undo, patch
from deepspeed_sdp.subnetwork import Subnetwork

_ATTRIBUTES = ("ds_id", "ds_status", "_z3_optimizer", "__getstate__")


class _Piece(NamedTuple):
    """Elements ``[low, high)`` of this rank's shard of a bucket are those of a parameter from ``start`` on."""

    bucket: OwnerBucket
    low: int
    high: int
    start: int


class ParameterTools:
    """Reads and writes master weights, optimizer state and averaged gradients by parameter.

    Methods have the names that DeepSpeed calls them by; values are flat or of the parameter's shape, and come in fp32.
    """

    def __init__(self, subnetwork: Subnetwork, optimizer: SDPOptimizer) -> None:
        self._subnetwork = subnetwork
        self._optimizer = optimizer
        self._pieces: dict[int, list[_Piece]] = {index: [] for index in optimizer.parameters}
        for bucket in optimizer.masters:
            base, first = bucket.index * bucket.shard_numel, 0
            for index, start, stop in bucket.ranges:
                low = min(max(first, base), base + bucket.shard_numel)
                high = min(max(first + stop - start, base), base + bucket.shard_numel)
                self._pieces[index].append(_Piece(bucket, low - base, high - base, start + low - first))
                first += stop - start
        names = {id(parameter): name for name, parameter in subnetwork.module.named_parameters()}
        positions = subnetwork.positions()
        self._index = {id(parameter): index for index, parameter in optimizer.parameters.items()}
        self._name = {index: names[id(parameter)] for index, parameter in optimizer.parameters.items()}
        in_order = sorted(self._pieces, key=lambda i: (positions[self._name[i]], self._pieces[i][0].bucket.owner_set))
        for number, index in enumerate(in_order):
            parameter: Any = optimizer.parameters[index]
            parameter.ds_id, parameter._z3_optimizer = number, self
            # DeepSpeed's ZeRO-3, once in a process, leaves a linear layer there that asks for it.
            parameter.ds_status = ZeroParamStatus.AVAILABLE
            # Whoever pickles the module gets its parameters as they were.
            parameter.__getstate__ = functools.partial(_without_tools, vars(parameter))
        self._undo = _gathering()

    def close(self) -> None:
        """Take off what was put on the parameters."""
        for parameter in self._optimizer.parameters.values():
            for name in _ATTRIBUTES:
                vars(parameter).pop(name, None)
        self._undo()

    # -- what safe_get_* and safe_set_* call --------------------------------------------------------------------------

    def get_full_hp_param(self, parameter: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor:
        """Collective over the owners. The master weight, or a tensor of the optimizer's state."""
        return self._whole(parameter, self._states(parameter, optim_state_key))

    def get_fp32_grad_for_param(self, parameter: nn.Parameter) -> torch.Tensor:
        """Collective over the owners. The averaged gradient, times the loss scale."""
        return self._whole(parameter, self._gradients(parameter))

    def get_local_fp32_param(self, parameter: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor:
        """What of it is in this rank's shards ``[numel]``."""
        return self._local(parameter, self._states(parameter, optim_state_key))

    def get_local_fp32_grad_for_param(self, parameter: nn.Parameter) -> torch.Tensor:
        """What of the averaged gradient is in this rank's shards ``[numel]``."""
        return self._local(parameter, self._gradients(parameter))

    def set_full_hp_param(
        self, value: torch.Tensor, parameter: nn.Parameter, optim_state_key: str | None = None
    ) -> None:
        """All owners give the whole ``value``; of a master weight the weight follows at once."""
        whole = self._checked(value, parameter, parameter.numel())
        if optim_state_key is None:
            self._check_copies(parameter)
        self._scatter(whole, parameter, self._states(parameter, optim_state_key))
        if optim_state_key is None:
            self._store(parameter, whole)

    def set_fp32_grad_for_param(self, value: torch.Tensor, parameter: nn.Parameter) -> None:
        """All owners give the whole ``value``, which the next step takes for the average, times the loss scale."""
        self._scatter(self._checked(value, parameter, parameter.numel()), parameter, self._gradients(parameter))

    def set_local_hp_param(
        self, value: torch.Tensor, parameter: nn.Parameter, optim_state_key: str | None = None
    ) -> None:
        """Of this rank's shards alone."""
        if optim_state_key is None and self._optimizer.stage < 3:
            raise ConfigError(
                "safe_set_local_fp32_param: at ZeRO stages 0 to 2 the other owners hold this weight too; takes "
                "safe_set_full_fp32_param"
            )
        self._set_local(value, parameter, self._states(parameter, optim_state_key))
        if optim_state_key is None:
            self._store(parameter, None)

    def set_local_grad_for_param(self, value: torch.Tensor, parameter: nn.Parameter) -> None:
        """Of this rank's shards alone."""
        self._set_local(value, parameter, self._gradients(parameter))

    def update_fp32_grad_for_param_vectorized(
        self, update: Callable[[torch.Tensor, nn.Parameter], torch.Tensor], parameters: Sequence[nn.Parameter]
    ) -> None:
        """Collective over the owners. Every averaged gradient becomes what ``update`` makes of it."""
        for parameter in parameters:
            self.set_fp32_grad_for_param(update(self.get_fp32_grad_for_param(parameter), parameter), parameter)

    # -- GatheredParameters --------------------------------------------------------------------------------------------

    def owners(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Ranks that train it, ascending."""
        return tuple(sorted(self._of(parameter)[0].bucket.owners.ranks))

    @torch.no_grad()
    def gather(self, parameter: nn.Parameter) -> bool:
        """Collective over the owners. Give the parameter its values; whether it had none."""
        self._optimizer.refresh.settle()
        if not isinstance(parameter, FreedWeight):
            return False
        give_values(parameter, self.get_full_hp_param(parameter).to(parameter.dtype))
        return True

    @torch.no_grad()
    def spread(self, parameter: nn.Parameter, source: int) -> None:
        """Collective over the owners. The values on rank ``source`` are those of all: weights, and master weights."""
        self._check_copies(parameter)
        value = parameter.data if dist.get_rank() == source else torch.zeros_like(parameter.data)
        value = self._sum(self._of(parameter)[0].bucket, value.float().reshape(-1), is_whole=True)
        states = self._states(parameter, None)
        for piece in self._of(parameter):
            master, new = states[piece.bucket][piece.low : piece.high], value[piece.start :][: piece.high - piece.low]
            # What is not changed keeps the digits that the weight has no room for.
            is_new = master.to(parameter.dtype) != new.to(master.device, parameter.dtype)
            master.copy_(torch.where(is_new, new.to(master.device), master))
        self._store(parameter, value)

    # -- shards --------------------------------------------------------------------------------------------------------

    def _of(self, parameter: nn.Parameter) -> list[_Piece]:
        return self._pieces[self._index[id(parameter)]]

    def _states(self, parameter: nn.Parameter, key: str | None) -> Mapping[OwnerBucket, torch.Tensor]:
        self._optimizer.refresh.settle()
        wanted, found = "master" if key is None else f"optimizer.{key}", {}
        for bucket in {piece.bucket: None for piece in self._of(parameter)}:
            tensors = self._optimizer.tensors_of(bucket)
            if wanted not in tensors:
                known = sorted(name.removeprefix("optimizer.") for name in tensors if name != "master")
                raise StateError(
                    f"optimizer state: got {key!r}; takes {', '.join(known) or 'none before the first step'}"
                )
            found[bucket] = tensors[wanted]
        return found

    def _gradients(self, parameter: nn.Parameter) -> Mapping[OwnerBucket, torch.Tensor]:
        averages = self._optimizer.gradients.averages
        buckets = {piece.bucket: None for piece in self._of(parameter)}
        if any(bucket not in averages for bucket in buckets):
            raise StateError(
                "gradient: got a call at another time; takes one between a backward pass (at ZeRO stages 0 and 1 the "
                "last one before a step) and step(), when there are averages"
            )
        return {bucket: averages[bucket] for bucket in buckets}

    def _whole(self, parameter: nn.Parameter, values: Mapping[OwnerBucket, torch.Tensor]) -> torch.Tensor:
        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=self._optimizer.device)
        for piece in self._of(parameter):
            flat[piece.start :][: piece.high - piece.low] = values[piece.bucket][piece.low : piece.high]
        return self._sum(self._of(parameter)[0].bucket, flat).view(parameter.shape)

    def _sum(self, bucket: OwnerBucket, flat: torch.Tensor, is_whole: bool = False) -> torch.Tensor:
        """Over the owners, of whom one has other values than zero for each element."""
        for group in bucket.owners.sharers.levels if bucket.shards > 1 or is_whole else ():
            with group.waiting("a parameter of all owners") as process_group:
                dist.all_reduce(flat, group=process_group)
        return flat

    def _local(self, parameter: nn.Parameter, values: Mapping[OwnerBucket, torch.Tensor]) -> torch.Tensor:
        local = torch.cat([values[piece.bucket][piece.low : piece.high] for piece in self._of(parameter)])
        return local.to(self._optimizer.device, torch.float32)

    def _set_local(
        self, value: torch.Tensor, parameter: nn.Parameter, values: Mapping[OwnerBucket, torch.Tensor]
    ) -> None:
        pieces = self._of(parameter)
        sizes = [piece.high - piece.low for piece in pieces]
        parts = torch.split(self._checked(value, parameter, sum(sizes)), sizes)
        for piece, part in zip(pieces, parts, strict=True):
            values[piece.bucket][piece.low : piece.high] = part

    def _scatter(
        self, whole: torch.Tensor, parameter: nn.Parameter, values: Mapping[OwnerBucket, torch.Tensor]
    ) -> None:
        for piece in self._of(parameter):
            values[piece.bucket][piece.low : piece.high] = whole[piece.start :][: piece.high - piece.low]

    @torch.no_grad()
    def _store(self, parameter: nn.Parameter, whole: torch.Tensor | None) -> None:
        """Master weights are new: so are the weights, of this rank's shards and of the others that it holds."""
        self._optimizer.store_masters({piece.bucket: None for piece in self._of(parameter)})
        if whole is not None and not isinstance(parameter, FreedWeight):
            parameter.data.copy_(whole.view(parameter.shape))

    def _checked(self, value: torch.Tensor, parameter: nn.Parameter, numel: int) -> torch.Tensor:
        if value.numel() != numel:
            name = self._name[self._index[id(parameter)]]
            raise ConfigError(f"{name}: got a value of {value.numel()} elements; takes {numel}")
        return value.detach().reshape(-1)

    def _check_copies(self, parameter: nn.Parameter) -> None:
        if self._subnetwork.masking == "backward" and len(self.owners(parameter)) < dist.get_world_size():
            raise StateError(
                f"{self._name[self._index[id(parameter)]]}: under backward masking ranks that do not train this weight "
                "compute with it, and would not have what is set; takes load_checkpoint"
            )


def _without_tools(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in _ATTRIBUTES}


class _Gathered:
    """What ``GatheredParameters`` does with parameters of this package.

    Raises:
        ConfigError: of a weight that ``modifier_rank``, a rank of the world, does not train.
    """

    def __init__(self, parameters: Sequence[Any], modifier_rank: int | None, fwd_module: Any) -> None:
        # In the order that all owners share.
        self._parameters = sorted(dict.fromkeys(parameters), key=lambda parameter: parameter.ds_id)
        self._modifier = modifier_rank
        self._filled: list[tuple[Any, int]] = []
        if fwd_module is not None:
            raise ConfigError("GatheredParameters: fwd_module: got a module; takes None with SDP")
        for parameter in self._parameters if modifier_rank is not None else ():
            owners = parameter._z3_optimizer.owners(parameter)
            if modifier_rank not in owners:
                raise ConfigError(
                    f"GatheredParameters: modifier_rank: got {modifier_rank} for a weight of shape "
                    f"{list(parameter.shape)} that it does not train; takes one of its owners, rank(s) "
                    f"{', '.join(map(str, owners))}"
                )

    def enter(self) -> None:
        self._filled = [(p, p.data_ptr()) for p in self._parameters if p._z3_optimizer.gather(p)]

    def exit(self, has_failed: bool) -> None:
        try:
            if self._modifier is not None and not has_failed:
                for parameter in self._parameters:
                    parameter._z3_optimizer.spread(parameter, self._modifier)
        finally:
            for parameter, address in self._filled:
                # A pass inside has freed it, or needs what it has put there.
                if not isinstance(parameter, FreedWeight) and parameter.data_ptr() == address:
                    take_values(parameter, nothing_of(parameter))


_patches = ExitStack()
_users = 0


def _gathering() -> Undo:
    """Teach ``GatheredParameters`` of this package's parameters, as long as any engine needs it."""
    global _users
    if not _users:
        for name, new in (("__init__", _init), ("__enter__", _enter), ("__exit__", _exit)):
            _patches.callback(
                patch(GatheredParameters, name, functools.partialmethod(new, getattr(GatheredParameters, name)))
            )
    _users += 1
    return _forget


def _forget() -> None:
    global _users
    _users -= 1
    if not _users:
        _patches.close()


def _init(
    context: Any,
    original: Any,
    params: Any,
    modifier_rank: int | None = None,
    fwd_module: Any = None,
    enabled: bool = True,
) -> None:
    params = list(params) if isinstance(params, Iterable) and not isinstance(params, torch.Tensor) else [params]
    ours = [parameter for parameter in params if isinstance(getattr(parameter, "_z3_optimizer", None), ParameterTools)]
    context._sdp = _Gathered(ours, modifier_rank, fwd_module) if ours and enabled else None
    original(context, params, modifier_rank, fwd_module, enabled and not ours)


def _enter(context: Any, original: Any) -> Any:
    return original(context) if context._sdp is None else context._sdp.enter()


def _exit(context: Any, original: Any, *exc: Any) -> Any:
    return original(context, *exc) if context._sdp is None else context._sdp.exit(exc[0] is not None)
