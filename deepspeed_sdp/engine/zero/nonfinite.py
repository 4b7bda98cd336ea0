"""NaN and Inf in gradients: who had the first one, and what is done about it, on all ranks alike."""

from collections.abc import Sequence
from typing import Literal

import torch.distributed as dist
from deepspeed.utils import logger

from deepspeed_sdp.errors import NonFiniteError
from deepspeed_sdp.ranks import gather_objects

# Steps skipped in a row (without a loss scale that could fall) after which nothing will change any more.
_HOPELESS = 100


class NonFiniteGradients:
    """Counts steps whose gradient is not finite, and reports.

    Args:
        names: full-model name of every parameter of this rank, by its index in the buckets.
        action: ``"skip"`` the step, or ``"stop"`` the job.
        is_apart: whether each worker's step is its own: others are not asked.
    """

    def __init__(self, names: Sequence[str], action: Literal["skip", "stop"], is_apart: bool) -> None:
        self._is_apart = is_apart
        self._names = names
        self._action = action
        self._skipped = 0
        self._step = 0

    def reset(self) -> None:
        """The step was finite."""
        self._skipped = 0
        self._step += 1

    def handle(self, first: tuple[int, float] | None, loss_scale: float, is_scale_dynamic: bool) -> None:
        """Collective. The averaged gradient is not finite: report where that began; raise if so configured.

        Args:
            first: index and norm of this rank's first gradient that is not finite.

        Raises:
            NonFiniteError: on every rank, if the action is ``"stop"`` or no finite step came for long.
        """
        mine = None if first is None else (self._names[first[0]], first[1])
        rank = dist.get_rank()
        reports: dict[int, tuple[str, float] | None] = {rank: mine}
        if not self._is_apart:
            reports = dict(enumerate(gather_objects(mine, "finding NaN and Inf in gradients")))
        self._step += 1
        self._skipped += 1
        found = [(rank, *report) for rank, report in reports.items() if report is not None]
        where = "; ".join(f"rank {rank}: {value} in {name}" for rank, name, value in found)
        message = f"step {self._step}: gradients are not finite ({where or 'their average overflows'})"
        # The search for a loss scale is expected to overflow now and then.
        if not is_scale_dynamic and self._action == "stop":
            raise NonFiniteError(f"{message}; weights are those before the step")
        if not is_scale_dynamic and self._skipped >= _HOPELESS:
            raise NonFiniteError(f"{message}; so were the {_HOPELESS - 1} steps before")
        where = "on this rank" if self._is_apart else "on all ranks"
        if rank == 0 or self._is_apart:
            logger.warning(f"{message}; skipped {f'at loss scale {loss_scale:g}' if is_scale_dynamic else where}")
