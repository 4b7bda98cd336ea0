"""A clean stop: whoever runs the job (Slurm, a person) warns it, and it saves before it ends."""

import os
import signal
from types import FrameType

from deepspeed_sdp.failures import note_termination


class StopRequest:
    """Notes that this process was asked to stop; the job goes on until all ranks ask :meth:`agreed`.

    ``SIGUSR1``, which Slurm's ``--signal=USR1@<seconds>`` sends before a time limit, is noted from the start on. A
    launcher that is gone asks too: of some signals it dies without a word to the ranks, and nobody would end them.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
        self._launchers = _launchers()
        signal.signal(signal.SIGUSR1, self._note)

    def close(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def note_termination_too(self) -> None:
        """From here on ``SIGTERM``, a scheduler's last warning, asks to stop too.

        Not earlier: a job that is still starting has nothing to save, and ends at once when its launcher ends it.
        """
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        if number == signal.SIGTERM:
            note_termination()

    def agreed(self) -> bool:
        """Collective. Whether any rank was asked to stop; the same on all ranks."""
        import torch

        from deepspeed_sdp.ranks import reduce_numbers

        is_asked = self.is_asked or _launchers() != self._launchers
        return bool(reduce_numbers(torch.tensor(int(is_asked)), "asking who was told to stop"))


def _launchers() -> tuple[int, ...]:
    """The processes that started this rank and wait for it; a child whose parent has died gets another.

    ``deepspeed`` is two: one that a user starts, which passes no signal on, and one per node that starts the ranks.
    Others, shells say, may end before their children.
    """
    import psutil

    parent = os.getppid()
    try:
        if "deepspeed.launcher.launch" in psutil.Process(parent).cmdline():
            return parent, psutil.Process(parent).ppid()
    except psutil.Error:
        pass
    return (parent,) if "TORCHELASTIC_RUN_ID" in os.environ else ()
