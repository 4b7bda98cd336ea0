"""Start the ranks of a benchmark, each in a network namespace of its own where that is allowed.

    python benchmarks/systems/launch.py --ranks 4 benchmarks/systems/run.py --quick

Every rank then sends over an interface of its own, a virtual Ethernet link to one bridge, so that the kernel counts the
bytes it really sends, and ``tc`` can give it a rate (``link.py``). It takes Linux with ``unshare``, ``nsenter``, ``ip``
and ``tc``, and root or user namespaces; nothing outside of them is touched, and they end with the processes.
Where that is not to be had, or with ``--loopback``, ranks share the loopback, and there are neither figures nor rates.
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND = "SYSTEMS_COMMAND"
INSIDE = "SYSTEMS_INSIDE_NAMESPACE"
DEVICE = "eth0"
NETWORK = "10.77.0."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--loopback", action="store_true", help="no namespaces")
    parser.add_argument("--time_limit", type=float, default=3600.0, help="seconds after which all ranks are ended")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    os.environ.setdefault(COMMAND, shlex.join(["python", *sys.argv]))
    # Nothing that anyone could act on: names of hosts without names, and a profiler that starts and stops.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if INSIDE not in os.environ and not args.loopback:
        into = _into_namespace()
        if into:
            sys.stdout.flush()
            os.environ[INSIDE] = "1"
            os.execvp(into[0], [*into, sys.executable, __file__, *sys.argv[1:]])
        print("launch.py: no network namespaces here: ranks share the loopback, no rates, no bytes on the wire")
    command = [sys.executable, args.script, *args.arguments]
    is_inside = INSIDE in os.environ and not args.loopback
    # DeepSpeed names shared memory after the port, so jobs need different ones, though the network is their own.
    port = 10_000 + os.getpid() % 50_000 if is_inside else _free_port()
    start = _start_linked if is_inside else _start_plain
    return _wait(start(command, args.ranks, port), port, time.monotonic() + args.time_limit)


def _into_namespace() -> list[str]:
    """The command that enters a namespace with all that is needed; empty if there is none."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        return []
    enter = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    probe = (
        "ip link add probe0 type veth peer name probe1 && ip link add probe2 type bridge && unshare --net true && "
        "tc qdisc add dev probe0 root tbf rate 8mbit burst 131072 limit 1000000"
    )
    found = subprocess.run([*enter, "sh", "-c", probe], capture_output=True, timeout=30)
    return enter if found.returncode == 0 else []


def _environment(rank: int, ranks: int, address: str, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _start_plain(command: Sequence[str], ranks: int, port: int) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen(command, env=_environment(rank, ranks, "127.0.0.1", port)) for rank in range(ranks)]


def _start_linked(command: Sequence[str], ranks: int, port: int) -> list[subprocess.Popen[bytes]]:
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "switch", "type", "bridge")
    _run("ip", "link", "set", "switch", "up")
    processes = []
    for rank in range(ranks):
        environment = _environment(rank, ranks, f"{NETWORK}1", port)
        environment |= {
            "GLOO_SOCKET_IFNAME": DEVICE,
            "SYSTEMS_INTERFACE": DEVICE,
            "SYSTEMS_SWITCH_PID": str(os.getpid()),
        }
        # It waits until its link is there.
        wait = ["unshare", "--net", "sh", "-c", 'read -r ready && exec "$@" </dev/null', "sh"]
        process = subprocess.Popen([*wait, *command], env=environment, stdin=subprocess.PIPE)
        processes.append(process)
        _connect(process.pid, rank)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"ready\n")
        process.stdin.close()
    return processes


def _connect(pid: int, rank: int) -> None:
    """A link from the namespace of process ``pid`` to the bridge."""
    mine = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + 10
    while os.readlink(f"/proc/{pid}/ns/net") == mine:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} did not enter its namespace")
        time.sleep(0.01)
    port = f"port{rank}"
    _run("ip", "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", str(pid))
    _run("ip", "link", "set", port, "master", "switch", "up")
    inside = ("nsenter", "--target", str(pid), "--net")
    _run(*inside, "ip", "link", "set", "lo", "up")
    _run(*inside, "ip", "address", "add", f"{NETWORK}{rank + 1}/24", "dev", DEVICE)
    _run(*inside, "ip", "link", "set", DEVICE, "up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30)


def _wait(processes: list[subprocess.Popen[bytes]], port: int, deadline: float) -> int:
    """The first failure ends all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while any(process.poll() is None for process in processes):
            failed = next((p.returncode for p in processes if p.returncode), 0)
            if failed:
                return failed
            if time.monotonic() > deadline:
                print("launch.py: time limit", file=sys.stderr)
                return 124
            time.sleep(0.2)
        return next((p.returncode for p in processes if p.returncode), 0)
    finally:
        # A second signal would leave ranks or shared memory behind.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()
        # DeepSpeed leaves its buffers behind when a process is killed.
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
