"""A rank's link, where it has one: its rate, set by ``tc`` in the rank's network namespace (see ``launch.py``)."""

import os
import subprocess
from dataclasses import dataclass

import torch.distributed as dist
from traffic import INTERFACE

from deepspeed_sdp.errors import ConfigError

# Process in whose namespace the other end of every rank's link lies.
SWITCH = "SYSTEMS_SWITCH_PID"
SWITCH_PORT = "port{rank}"


@dataclass
class _Link:
    rate: float | None = None


_link = _Link()


def has_link() -> bool:
    """Whether this rank has a link of its own, whose rate can be set."""
    return INTERFACE in os.environ and SWITCH in os.environ


def set_rate(rate: float | None) -> None:
    """Collective. Limit what a rank sends and what it receives to ``rate`` bytes per second each; ``None`` lifts it.

    Raises:
        ConfigError: the ranks have no links of their own.
    """
    if rate == _link.rate:
        return
    if not has_link():
        raise ConfigError("rate: ranks share one interface; takes a start by launch.py where it can make namespaces")
    dist.barrier()
    _limit([], os.environ[INTERFACE], rate)
    switch = ["nsenter", "--target", os.environ[SWITCH], "--net"]
    _limit(switch, SWITCH_PORT.format(rank=dist.get_rank()), rate)
    _link.rate = rate
    dist.barrier()


def _limit(prefix: list[str], device: str, rate: float | None) -> None:
    if rate is None:
        command = ["tc", "qdisc", "del", "dev", device, "root"]
    else:
        # Enough tokens for 4 ms, as timers are coarse, and for one segment as the kernel hands it on (64 KiB). The
        # queue holds 100 ms: a full one makes senders wait for retransmissions.
        burst = max(131_072, int(rate * 0.004))
        limit = max(4 * burst, int(rate * 0.1))
        command = [
            *("tc", "qdisc", "replace", "dev", device, "root", "tbf"),
            *("rate", f"{int(8 * rate)}bit", "burst", str(burst), "limit", str(limit)),
        ]
    subprocess.run([*prefix, *command], check=True, capture_output=True, timeout=30)
