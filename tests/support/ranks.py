"""Persistent gloo ranks: started once per test session, sent one case at a time, killed when a case overruns."""

import importlib
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from deepspeed_sdp.engine.deepspeed import tools
from deepspeed_sdp.engine.deepspeed.start import clear_stale_locks, start_communication

ROOT = Path(__file__).resolve().parents[2]
# Processes are forked off one that has imported what takes seconds, and neither talked nor computed yet.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.preloaded"])


def remove_shared_buffers(port):
    """DeepSpeed's buffers of the job on ``port``. They outlive killed processes: 66 MiB of memory per rank."""
    for leftover in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        leftover.unlink(missing_ok=True)


class RankFailure(AssertionError):
    """A case raised on some rank; the message holds every rank's traceback."""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(**extra):
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "DS_SKIP_CUDA_CHECK": "1",
        # DeepSpeed builds an op with the ninja beside the interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        **{key: str(value) for key, value in extra.items()},
    }


class RankPool:
    """``world_size`` processes joined by gloo. ``run`` gives every rank the same call and returns their results."""

    def __init__(self, world_size, **environment):
        self.world_size = world_size
        self.environment = environment
        self.processes = []
        self.connections = []

    def start(self, timeout=180):
        """Start the ranks and wait until all have joined; RankFailure, with nothing left running, if one does not."""
        # A pool killed while it loaded DeepSpeed's compiled op left its lock.
        clear_stale_locks(patience=0)
        self.log = Path(tempfile.mkdtemp(prefix="ranks-"), "log")
        self.port = free_port()
        deadline = time.monotonic() + timeout
        try:
            for rank in range(self.world_size):
                env = rank_environment(
                    RANK=rank,
                    LOCAL_RANK=rank,
                    WORLD_SIZE=self.world_size,
                    LOCAL_SIZE=self.world_size,
                    LOCAL_WORLD_SIZE=self.world_size,
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=self.port,
                    **self.environment,
                )
                ours, theirs = FORKS.Pipe()
                with theirs:
                    process = FORKS.Process(target=serve, args=(theirs, env, str(self.log)), daemon=True)
                    process.start()
                    self.processes.append(process)
                self.connections.append(ours)
            for rank, connection in enumerate(self.connections):
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise RankFailure(f"rank {rank} did not start in {timeout} s\n{self.tail()}")
                connection.recv()
        except BaseException as error:
            tail = self.tail()
            self.stop()
            if isinstance(error, EOFError | ConnectionError):
                raise RankFailure(f"a rank died at its start\n{tail}") from None
            raise

    def run(self, case, timeout=180, **kwargs):
        """Call ``module:function`` with ``kwargs`` on every rank; the list of its results, or RankFailure."""
        if not self.processes:
            self.start()
        deadline = time.monotonic() + timeout
        results = []
        try:
            for connection in self.connections:
                connection.send((case, kwargs))
            for rank, connection in enumerate(self.connections):
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise RankFailure(f"{case}: rank {rank} gave no answer in {timeout} s\n{self.tail()}")
                results.append(pickle.loads(connection.recv_bytes()))
        except (EOFError, ConnectionError, RankFailure) as error:
            tail = self.tail()
            self.stop()
            raise error if isinstance(error, RankFailure) else RankFailure(f"{case}: a rank died\n{tail}") from None
        failures = [f"--- rank {rank}\n{value}" for rank, (ok, value) in enumerate(results) if not ok]
        if failures:
            # Ranks that failed may have left collectives half done.
            self.stop()
            raise RankFailure("\n".join(failures))
        return [value for _, value in results]

    def tail(self):
        return self.log.read_text(errors="replace")[-4000:]

    def stop(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()
        if self.processes:
            remove_shared_buffers(self.port)
        self.processes, self.connections = [], []


def check_nothing_is_left():
    """An engine that a case leaves alive would show in the next one: it hooks into DeepSpeed."""
    assert not tools._users, f"left {tools._users} engine(s) that nobody destroyed"


def become(environment, log):
    """This process is that of a job from here on: with its environment, and what it prints in a file."""
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)


def serve(connection, environment, log):
    become(environment, log)
    import torch

    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("error", category=category, module="deepspeed_sdp|tests")
    torch.set_num_threads(1)
    # Read when torch is imported.
    torch.distributed.set_debug_level_from_env()
    start_communication()
    connection.send("ready")
    while True:
        try:
            case, kwargs = connection.recv()
        except EOFError:
            return
        try:
            module, function = case.split(":")
            result = pickle.dumps((True, getattr(importlib.import_module(module), function)(**kwargs)))
            check_nothing_is_left()
            connection.send_bytes(result)
        except BaseException:
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
