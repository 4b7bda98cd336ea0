"""Real jobs: launch/train.py under the ``deepspeed`` launcher; what they said, how they ended, how long they took."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from deepspeed_sdp.engine.deepspeed.start import clear_stale_locks
from tests.data.conftest import make_documents
from tests.support.ranks import ROOT, free_port, rank_environment, remove_shared_buffers

TRAIN = ROOT / "launch" / "train.py"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A bad job must have ended by then; a machine that does other work besides gets more in proportion.
SECONDS = 30.0
HANGS_AFTER = 240.0

MODEL = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 1_000_000,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
}
SDP = {"num_subnetworks": 2, "coverage": 0.5}


@dataclass
class Job:
    """How a job ended. ``left``: command lines of its processes that were still there after it, now killed."""

    code: int
    output: str
    seconds: float
    left: list[str]
    ranks: int

    @property
    def errors(self):
        return [line for line in self.output.splitlines() if line.startswith("error:")]


class Workplace:
    """A folder with the files of a job; ``launch`` runs it with changes to them."""

    def __init__(self, folder):
        self.folder = folder
        self.output = folder / "out"
        self.write("model.json", json.dumps(MODEL))
        self.write("ds.json", json.dumps(DEEPSPEED))
        self.write("sdp.json", json.dumps(SDP))
        self.write("text.txt", "\n\n\n".join(make_documents(80)))

    def write(self, name, content):
        file = self.folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def launch(self, *switches, script=TRAIN, ranks=2, **changes):
        options = {
            "deepspeed_config": self.folder / "ds.json",
            "sdp_config": self.folder / "sdp.json",
            "model": self.folder / "model.json",
            "text": self.folder / "text.txt",
            "output_dir": self.output,
            "vocab_size": 320,
            "seq_length": 32,
            "steps": 6,
            **changes,
        }
        arguments = [str(part) for key, value in options.items() if value is not None for part in (f"--{key}", value)]
        return run_job([str(script), *arguments, *switches], self.folder, ranks)

    def script(self, body):
        """A script that does something to ``loop`` (the module of the training loop) before launch/train.py runs."""
        return self.write(
            "script.py",
            f"import os, sys\nsys.path.insert(0, {str(TRAIN.parent)!r})\nimport train\n"
            # As main does it, before torch is imported.
            "from deepspeed_sdp.pretraining.console import quiet\nquiet(False)\n"
            f"from deepspeed_sdp.pretraining import loop\n{body}\n"
            "train.main(sys.argv[1:])\n",
        )


def run_job(arguments, cwd, ranks=2):
    """``deepspeed --num_accelerators RANKS ARGUMENTS``; see :func:`run_launcher`."""
    port = free_port()
    return run_launcher("deepspeed", ["--num_accelerators", ranks, "--master_port", port, *arguments], cwd, port, ranks)


def run_launcher(name, arguments, cwd, port, ranks=2):
    """``NAME ARGUMENTS`` with a launcher beside the interpreter, killed with all its processes if it hangs."""
    mark = f"TEST_JOB={uuid.uuid4().hex}"
    environment = rank_environment(**dict([mark.split("=")]))
    for variable in RANK_VARIABLES:
        environment.pop(variable, None)
    # A job killed while it loaded DeepSpeed's compiled op left its lock.
    clear_stale_locks(patience=0)
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        # Ends when the last process that holds the pipe has ended.
        output, _ = process.communicate(timeout=HANGS_AFTER)
    except subprocess.TimeoutExpired:
        kill(marked(mark))
        output, _ = process.communicate()
        output += f"\nkilled: hung for {HANGS_AFTER} s"
    seconds = time.monotonic() - began
    time.sleep(0.2)
    left = marked(mark)
    commands = [command_line(pid) for pid in left]
    kill(left)
    remove_shared_buffers(port)
    return Job(process.returncode, output, seconds, commands, ranks)


def marked(mark):
    """Processes that inherited ``mark`` in their environment, wherever they moved to."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def assert_ended_badly(job, message):
    """The whole job ended in time, with one message that says ``message``, and without a traceback."""
    assert len(job.errors) == 1, job.output
    assert message in job.output, job.output
    assert "Traceback" not in job.output, job.output
    assert_ended_soon(job)


def assert_ended_with_one_traceback(job, rank):
    """The whole job ended in time, with the traceback of ``rank``."""
    assert job.output.count("Traceback") == job.output.count("failed:") == 1, job.output
    assert f"rank {rank} failed:" in job.output
    assert job.errors == []
    assert_ended_soon(job)


def assert_ended_soon(job):
    assert job.code not in (0, None), job.output
    assert "Exception raised from" not in job.output, f"torch's C++ stacks\n{job.output}"
    assert job.left == []
    busy = max(1.0, max(os.getloadavg()[0], job.ranks) / (os.cpu_count() or 1))
    assert job.seconds < SECONDS * busy, f"{job.seconds:.0f} s\n{job.output}"
