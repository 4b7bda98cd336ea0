"""Names of processes, by which another one can tell whether they still run."""

import os
import socket
from contextlib import suppress
from pathlib import Path


def process_name() -> str:
    """This process among all that may see the same files: host, PID namespace, PID and start time; a file name."""
    return process_name_of(os.getpid())


def process_name_of(pid: int) -> str:
    """The same of another process that can be seen from here."""
    return f"{place()}-{pid}-{_start_of(pid) or 0}"


def exit_status(pid: int) -> int | None:
    """How a process ended, as ``os.waitstatus_to_exitcode`` has it, while its parent has not asked; else ``None``."""
    with suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] in "ZX" else None
    return None


def is_running(name: str) -> bool | None:
    """Whether the process with that :func:`process_name` runs; ``None`` where it cannot be seen from here."""
    host, _, rest = name.partition("@")
    namespace, _, numbers = rest.partition("-")
    pid, _, start = numbers.partition("-")
    if f"{host}@{namespace}" != place() or not (pid.isdigit() and start.isdigit()):
        return None
    return _start_of(int(pid)) == int(start)


def describe(name: str) -> str:
    """For people."""
    place, _, rest = name.partition("@")
    return f"process {rest.split('-')[1]} on {place}" if rest.count("-") == 2 else f"process {name!r}"


def place() -> str:
    """Host and PID namespace: containers of one host may have its name, and PIDs of their own."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}@{namespace}"


def _start_of(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; ``None`` where it does not run."""
    try:
        # The name of the program stands in brackets, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
