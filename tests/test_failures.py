"""One job, one message: in one process, and over two ranks that fail in every order."""

import json
import pickle
import subprocess
import sys

import pytest

from deepspeed_sdp.errors import ConfigError, DataError, ModelError, OutputError, PlanError, SDPError
from tests.support.ranks import rank_environment


def run(body, rank=0, grace=0.3):
    code = f"""
import sys
from deepspeed_sdp import failures
from deepspeed_sdp.errors import *
failures._GRACE_SECONDS = {grace}
with failures.one_report():
    {body}
"""
    return subprocess.run(
        [sys.executable, "-c", code], env=rank_environment(RANK=rank), capture_output=True, text=True, timeout=60
    )


def test_what_works_is_left_alone():
    done = run("print('fine')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_an_error_of_the_user_is_its_message_alone():
    done = run("raise DataError('a.txt: holds no text')")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "\nerror: a.txt: holds no text\n")


@pytest.mark.parametrize("kind", [ConfigError, PlanError, ModelError, DataError, OutputError, SDPError])
def test_every_error_of_the_package_is_one_of_the_user(kind):
    assert issubclass(kind, SDPError)
    copy = pickle.loads(pickle.dumps(kind("what, got, takes")))
    assert (type(copy), str(copy)) == (kind, "what, got, takes"), "can be sent to other ranks"


def test_anything_else_comes_with_its_traceback_and_rank():
    done = run("{}['missing']")
    assert done.returncode == 1
    assert done.stderr.startswith("\nrank 0 failed:\nTraceback")
    assert done.stderr.endswith("KeyError: 'missing'\n")


def test_what_was_printed_before_is_not_lost():
    assert run("print('step 1', end=''); raise ValueError").stdout == "step 1"


def test_an_interrupt_is_no_traceback():
    done = run("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (1, "\ninterrupted\n")


def test_a_wanted_exit_keeps_its_code():
    done = run("sys.exit(7)")
    assert (done.returncode, done.stderr) == (7, "")


def test_destructors_and_exit_handlers_do_not_hold_it_up():
    done = run("import atexit, time; atexit.register(time.sleep, 100); raise DataError('x')")
    assert done.returncode == 1


def test_without_torch_nothing_heavy_is_imported_to_fail():
    done = run("import atexit; import os; os._exit = lambda code: print('torch' in sys.modules); raise DataError('x')")
    assert done.stdout == "False\n"


def test_a_rank_that_fails_alone_before_ranks_can_talk_reports_after_a_while():
    """Others report first if they fail alike; but no failure may stay without a word."""
    done = run("raise DataError('only here')", rank=1)
    assert (done.returncode, done.stderr) == (1, "\nerror: only here\n")


UNCAUGHT = """
import sys
{before}
from deepspeed_sdp.failures import report_uncaught
from deepspeed_sdp.errors import *
report_uncaught()
report_uncaught()
{body}
"""


def run_script(body, before=""):
    code = UNCAUGHT.format(before=before, body=body)
    return subprocess.run(
        [sys.executable, "-c", code], env=rank_environment(), capture_output=True, text=True, timeout=60
    )


def test_an_uncaught_error_of_the_user_is_one_line_and_ends_the_script_as_ever():
    done = run_script("import atexit; atexit.register(print, 'cleaned up'); raise ConfigError('x: got 1; takes 2')")
    assert (done.returncode, done.stderr) == (1, "\nerror: x: got 1; takes 2\n")
    assert done.stdout == "cleaned up\n"


def test_other_uncaught_errors_keep_their_traceback():
    done = run_script("{}['missing']")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("KeyError: 'missing'\n")


def test_who_catches_the_error_sees_it():
    done = run_script("try:\n    raise ConfigError('x')\nexcept ValueError as error:\n    print('caught', error)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "caught x\n", "")


@pytest.mark.parametrize(("raised", "lines"), [("ConfigError('x')", ["", "error: x"]), ("KeyError('x')", [])])
def test_a_hook_of_the_user_s_own_is_called_too(raised, lines):
    own = "sys.excepthook = lambda kind, error, trace: print('theirs', kind.__name__)"
    done = run_script(f"raise {raised}", own)
    assert done.stdout == f"theirs {raised.partition('(')[0]}\n"
    assert done.stderr.splitlines() == lines


# Forks two ranks per case from a process that has imported torch, and ends one soon after the other, as launchers do.
TWO_RANKS = """
import json, os, signal, socket, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from deepspeed_sdp.errors import *
from deepspeed_sdp.agreement import from_first_rank
from deepspeed_sdp.failures import one_report, report_uncaught

def same_error(rank):
    raise ConfigError("same")

def same_error_later_on_1(rank):
    time.sleep(0.4 * rank)
    raise ConfigError("same")

def same_error_later_on_0(rank):
    time.sleep(0.4 * (1 - rank))
    raise ConfigError("same")

def unexpected_on_1(rank):
    if rank == 1:
        raise RuntimeError("boom")
    dist.barrier()

def unexpected_on_0(rank):
    if rank == 0:
        raise RuntimeError("boom")
    dist.barrier()

def first_rank_refuses(rank):
    from_first_rank(lambda: (_ for _ in ()).throw(OutputError("cannot write")))

def first_rank_breaks(rank):
    from_first_rank(lambda: 1 / 0)

def first_rank_works(rank):
    value = from_first_rank(lambda: 42)
    print(f"rank {rank} got {value}", file=sys.stderr, flush=True)

def uncaught_on_both(rank):
    raise ConfigError("same")

def uncaught_on_1(rank):
    if rank == 1:
        raise ConfigError("only here")
    dist.barrier()

def uncaught(case, rank):
    # As at the end of a script; torch's own hook stands there too.
    report_uncaught()
    try:
        case(rank)
    except Exception:
        sys.excepthook(*sys.exc_info())
        os._exit(1)

def child(case, rank, log, port):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    if case.__name__.startswith("uncaught"):
        uncaught(case, rank)
    with one_report():
        case(rank)
    dist.barrier()
    os._exit(0)

def run(case):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = Path(case.__name__)
    began = time.monotonic()
    alive, codes = {}, [None, None]
    for rank in range(2):
        pid = os.fork()
        if not pid:
            try:
                child(case, rank, log, port)
            finally:
                os._exit(9)
        alive[pid] = rank
    while alive:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        codes[alive.pop(pid)] = code
        if code and alive:
            time.sleep(1.0)
            for other in alive:
                os.kill(other, signal.SIGKILL)
    return {"log": log.read_text(), "codes": codes, "seconds": time.monotonic() - began}

cases = [same_error, same_error_later_on_1, same_error_later_on_0, unexpected_on_1, unexpected_on_0,
         first_rank_refuses, first_rank_breaks, first_rank_works, uncaught_on_both, uncaught_on_1]
print(json.dumps({case.__name__: run(case) for case in cases}))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-c", TWO_RANKS],
        env=rank_environment(),
        cwd=tmp_path_factory.mktemp("two_ranks"),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["same_error", "same_error_later_on_1", "same_error_later_on_0"])
def test_ranks_that_fail_alike_give_one_message(two_ranks, case):
    result = two_ranks[case]
    assert result["log"].count("error: same") == 1
    assert "Traceback" not in result["log"]
    assert 1 in result["codes"]
    assert 0 not in result["codes"]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_fails_while_the_other_waits_for_it(two_ranks, rank):
    result = two_ranks[f"unexpected_on_{rank}"]
    assert result["log"].count("Traceback") == 1, result["log"]
    assert f"rank {rank} failed:" in result["log"]
    assert "RuntimeError: boom" in result["log"]
    assert result["codes"][rank] == 1
    assert result["seconds"] < 60


def test_what_the_first_rank_refuses_is_refused_by_all_with_one_message(two_ranks):
    result = two_ranks["first_rank_refuses"]
    assert result["log"].count("error: cannot write") == 1
    assert "Traceback" not in result["log"]


def test_what_breaks_on_the_first_rank_is_reported_there(two_ranks):
    result = two_ranks["first_rank_breaks"]
    assert result["log"].count("Traceback") == 1, result["log"]
    assert "rank 0 failed:" in result["log"]
    assert "ZeroDivisionError" in result["log"]


@pytest.mark.parametrize(("case", "message"), [("uncaught_on_both", "same"), ("uncaught_on_1", "only here")])
def test_an_uncaught_error_of_many_ranks_is_one_line_of_one(two_ranks, case, message):
    result = two_ranks[case]
    assert result["log"].count(f"error: {message}") == 1, result["log"]
    # What another rank meets when this one is gone is no error of the user.
    assert result["log"].count("Traceback") <= (case == "uncaught_on_1")
    assert 1 in result["codes"]


def test_what_works_on_the_first_rank_is_returned_everywhere(two_ranks):
    result = two_ranks["first_rank_works"]
    assert sorted(result["log"].split("\n")) == ["", "rank 0 got 42", "rank 1 got 42"]
    assert result["codes"] == [0, 0]


def test_who_was_terminated_and_cannot_know_is_silent():
    """Its launcher ended the job because of another rank, which has reported."""
    done = run("failures.note_termination(); raise DataError('late')", rank=1, grace=100)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_stop_request_does_not_outlive_a_failure():
    noted = "from deepspeed_sdp.stopping import StopRequest; StopRequest().note_termination_too()"
    assert run(f"{noted}; raise DataError('broken')").stderr == "\nerror: broken\n"
