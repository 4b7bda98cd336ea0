"""Ranks of a node that watch each other: whoever is gone is noted, and the others end at once, to be started again.

A rank that waits for one that was killed may hang for minutes in a collective on an accelerator. The kernel says when
a process has ended at once.
"""

import os
import select
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from deepspeed_sdp.processes import exit_status, process_name

LOST = "lost"
# Exit code of a rank that ends because others did: it is fit.
LEFT = 75
# Of NCCL's watchdog, which ends a process that waits in vain, and of launchers.
_OF_OTHERS = (LEFT, -signal.SIGABRT, -signal.SIGTERM, -signal.SIGINT)
_WAKE_SECONDS = 1.0


class Watch:
    """From its beginning until :meth:`close`, this process ends when a peer or its launcher does.

    Args:
        folder: of the node, gets ``lost/<name>`` of the peers that ended first.
        peers: by the name under which they are noted, the PIDs of the node's other ranks.
        launcher: PID of the process that starts ranks again; without it this rank ends, as its node would.
    """

    def __init__(self, folder: Path, peers: Mapping[str, int], launcher: int) -> None:
        self._folder = folder / LOST
        self._peers: dict[int, tuple[str, int]] = {}
        self._end = threading.Event()
        for name, pid in peers.items():
            self._add(pid, name)
        self._launcher = self._add(launcher, "")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the others end."""
        self._end.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _add(self, pid: int, name: str) -> int:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            # It was there a moment ago: a descriptor that is readable at once stands for it.
            descriptor, writing = os.pipe()
            os.close(writing)
        self._peers[descriptor] = name, pid
        return descriptor

    def _run(self) -> None:
        poll = select.poll()
        for descriptor in self._peers:
            poll.register(descriptor, select.POLLIN)
        while not self._end.is_set():
            gone = [descriptor for descriptor, _ in poll.poll(_WAKE_SECONDS * 1000)]
            through = [descriptor for descriptor in gone if exit_status(self._peers[descriptor][1]) == 0]
            for descriptor in through:
                poll.unregister(descriptor)
            if len(through) < len(gone) and not self._end.is_set():
                self._leave([descriptor for descriptor in gone if descriptor not in through])
        for descriptor in self._peers:
            os.close(descriptor)

    def _leave(self, gone: list[int]) -> None:
        if self._launcher not in gone:
            with suppress(OSError):
                self._folder.mkdir(exist_ok=True)
                for name, pid in map(self._peers.__getitem__, gone):
                    if exit_status(pid) not in _OF_OTHERS:
                        (self._folder / name).write_text(process_name(), encoding="utf-8")
        # No finalizers: collectives that are half done wait for whoever is gone.
        os._exit(LEFT)


def note_name(launcher: str, local_rank: int) -> str:
    """Under which a rank of a launcher is noted."""
    return f"{launcher}-{local_rank}"
