"""A clean stop: whoever runs the job (Slurm, a person) warns it, and it saves before it ends."""

import signal
from types import FrameType

from deepspeed_sdp.failures import note_termination

# A scheduler's last warning, and the one that Slurm's --signal=USR1@<seconds> sends before it.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notes that a signal asked this process to stop; the job goes on until all ranks ask :meth:`agreed`."""

    def __init__(self) -> None:
        self.is_asked = False
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        if number == signal.SIGTERM:
            note_termination()

    def agreed(self) -> bool:
        """Collective. Whether any rank was asked to stop; the same on all ranks."""
        import torch
        import torch.distributed as dist
        from deepspeed.accelerator import get_accelerator

        asked = torch.tensor(int(self.is_asked), device=get_accelerator().current_device_name())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)
