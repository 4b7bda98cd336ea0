"""Local steps in the simulation: workers train subnetworks of their own, cut by the package, and agree now and then."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import Subnetwork, cut_model


@dataclass(frozen=True)
class Outer:
    """Nesterov's SGD on the owners' average change, as in DiLoCo."""

    lr: float = 0.7
    momentum: float = 0.9


class Apart:
    """All workers of a job.

    Args:
        model: the full model, from which they begin, and which :meth:`agree` makes what they agree on.
        plan, sdp: who owns what; forward masking.
        interval: steps between two agreements.
        outer: what is done with the average; ``None``: it is taken.
        lr, options: of every worker's AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SubnetworkPlan,
        sdp: SDPConfig,
        interval: int,
        outer: Outer | None,
        lr: float,
        clip: float,
        **options: Any,
    ) -> None:
        self._model, self._interval, self._outer, self._clip = model, interval, outer, clip
        self._workers: list[Subnetwork] = [
            cut_model(deepcopy(model), plan, worker, masking="forward", output_scaling=sdp.output_scaling)
            for worker in range(plan.num_subnetworks)
        ]
        self._optimizers = [
            torch.optim.AdamW([{"params": list(of.module.parameters()), "lr": lr, "peak": lr}], fused=True, **options)
            for of in self._workers
        ]
        self._full = dict(model.named_parameters())
        self._momentum = {name: torch.zeros_like(p) for name, p in self._full.items()}
        self._counts = {name: torch.zeros_like(p) for name, p in self._full.items()}
        for _, count, _ in self._parts(self._counts):
            count += 1
        self._steps = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all workers."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self, ids_NBT: Tensor) -> Tensor:
        """One step of all workers: their losses ``[N]``."""
        losses = []
        for of, optimizer, ids in zip(self._workers, self._optimizers, ids_NBT, strict=True):
            optimizer.zero_grad()
            loss = of.module(input_ids=ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(of.module.parameters(), self._clip, foreach=True)
            optimizer.step()
            losses.append(loss.detach())
        self._steps += 1
        if self._steps % self._interval == 0:
            self.agree()
        return torch.stack(losses)

    @torch.no_grad()
    def agree(self) -> None:
        """Make every element what its owners agree on, in the full model and in theirs."""
        totals = {name: torch.zeros_like(p) for name, p in self._full.items()}
        for value, total, _ in self._parts(totals):
            total += value
        for name, agreed in self._full.items():
            average = totals[name] / self._counts[name]
            if self._outer is None:
                agreed.copy_(average)
                continue
            change, momentum = agreed - average, self._momentum[name]
            momentum.mul_(self._outer.momentum).add_(change)
            agreed -= self._outer.lr * (change + self._outer.momentum * momentum)
        for value, new, _ in self._parts({name: p.data for name, p in self._full.items()}):
            value.copy_(new)

    def _parts(self, of_full: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, str]]:
        """Every worker's parameters, and views of what they are parts of."""
        for of in self._workers:
            for name, parameter in of.module.named_parameters():
                fragment = of.fragments[name]
                full = of_full[fragment.full_name]
                is_part = fragment.full_name in of.partitioned and fragment.dim is not None
                view = of.partitioned[fragment.full_name].part_of(full, fragment) if is_part else full
                yield parameter.data, view, name
