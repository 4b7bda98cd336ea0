"""Who takes part in an elastic job: of the processes that ``torchrun`` starts, again and again, those that are fit.

``torchrun`` starts as many ranks on a node as before, though one of them may have been killed for what its device does.
So they meet before there is a process group, in the store that ``torchrun`` offers them, and those that are left get
ranks without a gap and a store of their own, as of a job that has just begun.
"""

import json
import math
import os
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import psutil

from deepspeed_sdp.errors import ConfigError, WaitError

_KEY = "deepspeed_sdp/elastic"
# Ranks of a node start within seconds of each other; imports on a slow disk take longer.
_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.05
_SPARE_POLL_SECONDS = 1.0
_LAUNCHERS = ("torchrun", "torch.distributed.run", "deepspeed_sdp.cli.elastic_launcher")


@dataclass(frozen=True)
class Members:
    """What :func:`meet_members` found.

    Attributes:
        is_member: whether this process takes part; its ``RANK`` and all else that a launcher sets are new then.
        left_out: how many do not.
    """

    is_member: bool
    left_out: int
    _store: Any
    _over: str

    def say_over(self) -> None:
        """The job has ended: whoever was left out may end too."""
        with suppress(Exception):  # torchrun may be gone by now, and they with it
            self._store.set(self._over, "1")

    def wait_until_over(self) -> None:
        """Until :meth:`say_over`, or until nobody could say it any more."""
        with suppress(Exception):
            while not self._store.check([self._over]):
                time.sleep(_SPARE_POLL_SECONDS)


class _Joined(NamedTuple):
    """What a process says of itself: who it is, on which node, whether it may take part, where it can be reached, and
    what it knows, of which rank 0's counts.
    """

    name: str
    group: int
    is_fit: bool
    address: str
    port: int
    said: Any


def check_launcher() -> None:
    """Whether a process was started by what starts it again.

    Raises:
        ConfigError: it was not.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ConfigError(
            "--elastic: got ranks that torchrun has not started; takes torchrun --max_restarts N -m deepspeed_sdp.cli "
            "pretrain ..., or no launcher, for which the ranks of this machine are started by it"
        )


def end_launcher(pid: int) -> None:
    """Have ``torchrun``, if ``pid`` is that, end the job on this node: it would start again what cannot succeed."""
    with suppress(OSError, psutil.Error):
        if any(name in word for word in psutil.Process(pid).cmdline() for name in _LAUNCHERS):
            os.kill(pid, signal.SIGTERM)


def meet_members(is_fit: bool, said: Any, most: Callable[[int, Any], int]) -> Members:
    """Collective over all processes of ``torchrun``, before there is a process group.

    Args:
        is_fit: whether this one may take part.
        said: JSON, of which rank 0's counts.
        most: how many of so many fit ones can, by what was said.

    Raises:
        ConfigError: none is fit.
        WaitError: one did not come.
    """
    import torch.distributed as dist

    env, rank, world = os.environ, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_offered = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    group = int(env.get("GROUP_RANK", "0"))
    store: Any = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        is_master=not is_offered and rank == 0,
        timeout=timedelta(seconds=_PATIENCE_SECONDS),
        wait_for_workers=False,
    )
    mine = _Joined(uuid.uuid4().hex, group, is_fit, _own_address(address, port, group), _free_port(), said)
    joined, token = _meet(store, rank, world, mine)
    fit = [other for other, of_rank in enumerate(joined) if of_rank.is_fit]
    if not fit:
        raise ConfigError("--elastic: no rank is left that was not killed before; start the job again to go on")
    members = fit[: most(len(fit), joined[0].said)]
    over = f"{_KEY}/{token}/over"
    if rank in members:
        first = joined[members[0]]
        on_node = Counter(joined[member].group for member in members)
        env.update(
            RANK=str(members.index(rank)),
            WORLD_SIZE=str(len(members)),
            # Nodes are runs of as many ranks; where they have different numbers, of what divides all of them.
            LOCAL_WORLD_SIZE=str(math.gcd(*on_node.values())),
            MASTER_ADDR=first.address,
            MASTER_PORT=str(first.port),
            TORCHELASTIC_USE_AGENT_STORE="False",
        )
    return Members(rank in members, world - len(members), store, over)


def _meet(store: Any, rank: int, world: int, mine: _Joined) -> tuple[list[_Joined], str]:
    """What all say, and a name of this meeting.

    The store may be that of an earlier one, with what processes said in it that are gone. So rank 0 publishes what it
    reads until every rank confirms that it is in it.
    """
    store.set(f"{_KEY}/joined/{rank}", json.dumps(mine))
    deadline = time.monotonic() + _PATIENCE_SECONDS
    published, token = "", ""
    while time.monotonic() < deadline:
        if rank == 0:
            found = _read(store, [f"{_KEY}/joined/{other}" for other in range(world)])
            text = json.dumps(found)
            if None not in found and text != published:
                published, token = text, uuid.uuid4().hex
                store.set(f"{_KEY}/all", json.dumps({"token": token, "joined": found}))
        [told] = _read(store, [f"{_KEY}/all"])
        if told and len(told["joined"]) == world and told["joined"][rank][0] == mine.name:
            confirmed = f"{_KEY}/{told['token']}"
            store.set(f"{confirmed}/{rank}", "1")
            # Rank 0 looks whether all have confirmed one publication, the others whether rank 0 has seen that.
            is_met = store.check(
                [f"{confirmed}/{other}" for other in range(world)] if rank == 0 else [f"{confirmed}/met"]
            )
            if is_met:
                store.set(f"{confirmed}/met", "1")
                return [_Joined(*one) for one in told["joined"]], told["token"]
        time.sleep(_POLL_SECONDS)
    missing = [
        other for other, found in enumerate(_read(store, [f"{_KEY}/joined/{o}" for o in range(world)])) if not found
    ]
    raise WaitError(f"--elastic: rank {rank} waited {_PATIENCE_SECONDS:.0f} s for ranks {missing or 'that had come'}")


def _read(store: Any, keys: Sequence[str]) -> list[Any]:
    """Values that are there, and ``None``."""
    return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]


def _own_address(master: str, port: int, group: int) -> str:
    """Where other nodes reach this one: on that of the store, what they reach it by; else whence this one does."""
    if group == 0:
        return master
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, port))
        return str(probe.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
