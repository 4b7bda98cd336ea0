"""An elastic run: what it keeps in the memory of its nodes, and how it goes on when a rank is lost."""

import argparse
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from deepspeed_sdp.checkpoint.json_files import Schema, read_as
from deepspeed_sdp.errors import CheckpointError, ConfigError, OutputError, SDPError
from deepspeed_sdp.failures import end_by
from deepspeed_sdp.files import write_text
from deepspeed_sdp.pretraining.fitting import First, check_fits, most_ranks
from deepspeed_sdp.pretraining.members import Members, check_launcher, end_launcher, meet_members
from deepspeed_sdp.pretraining.options import check_job_options
from deepspeed_sdp.pretraining.watch import LEFT, LOST, Watch, note_name
from deepspeed_sdp.processes import process_name_of
from deepspeed_sdp.waits import is_loss

if TYPE_CHECKING:
    from deepspeed_sdp.pretraining.recipe import Run

FILE = "elastic.json"
_STEP = "step"
_WATCH_SECONDS = 2.0


class _Record(Schema):
    """``elastic.json``: which state in the memory of nodes is this run's, and what the run was when it began."""

    run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    ranks: Annotated[int, Field(ge=1, le=1 << 24)]
    steps: Annotated[int, Field(ge=1, le=1 << 60)]


@dataclass(frozen=True)
class Kept:
    """Where a run keeps its state, and how often.

    Attributes:
        folder: of this node.
        interval: optimizer steps.
    """

    folder: Path
    interval: int

    def note_step(self, step: int) -> None:
        """How far this node has come: what is lost is counted from there."""
        with suppress(OSError):
            (self.folder / f"{_STEP}-{os.getpid()}").write_text(str(step), encoding="utf-8")

    def farthest(self) -> int:
        """The last step that a rank of this node has done, in whatever process; 0: none."""
        found = [0]
        for path in self.folder.glob(f"{_STEP}-*"):
            with suppress(OSError, ValueError):
                found.append(int(path.read_text(encoding="utf-8")))
        return max(found)

    def forget_steps(self) -> None:
        """What processes that are gone have done counts no more."""
        for path in self.folder.glob(f"{_STEP}-*"):
            path.unlink(missing_ok=True)

    def remove(self, is_finished: bool) -> None:
        """What was to be saved is saved: free the memory. Of a run that goes on, who was lost stays noted."""
        # All ranks of a node do it at once.
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.is_dir() and (is_finished or path.name != LOST):
                    shutil.rmtree(path, ignore_errors=True)
                elif not path.is_dir():
                    path.unlink(missing_ok=True)
            self.folder.rmdir()


class Elastic:
    """The elastic part of a job, from its start to its end.

    Attributes:
        first: what the run was when it began; ``None`` before it has.
        members: who takes part.
    """

    def __init__(self, args: argparse.Namespace, read: "Callable[[argparse.Namespace], Run]") -> None:
        """Collective over all that ``torchrun`` started. Afterwards the environment is that of the members.

        Raises:
            ConfigError: the run can not go on with other numbers of ranks, or none is left.
        """
        self._watch: Watch | None = None
        self._launcher = os.getppid()
        end_by(self._leave)
        check_launcher()
        run = read(args)
        check_job_options(args, run.data.source)
        check_fits(run)
        self._file = Path(args.output_dir) / FILE
        self._base = Path(args.elastic_folder)
        self._interval: int = args.elastic
        self._name = note_name(process_name_of(self._launcher), int(os.environ["LOCAL_RANK"]))
        # Of which rank 0's counts: a node that has joined may see the file later.
        self._record = self._read()
        if args.restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self._set_aside()
        is_lost = self._record is not None and (self.kept.folder / LOST / self._name).exists()

        def most(ranks: int, said: Any) -> int:
            self._record = said and _Record(**said)
            return ranks if self.first is None else most_ranks(run, self.first, ranks)

        self.members: Members = meet_members(not is_lost, self._record and self._record.model_dump(), most)

    @property
    def first(self) -> First | None:
        """What the run was when it began; ``None`` before it has."""
        return None if self._record is None else First(self._record.ranks, self._record.steps)

    @property
    def kept(self) -> Kept:
        """Where its state is."""
        assert self._record is not None
        return Kept(self._base / f"deepspeed-sdp-{os.getuid()}-{self._record.run}", self._interval)

    @property
    def is_new(self) -> bool:
        """Whether the run is yet to begin: nothing of it could have been kept."""
        return self._record is None

    def begin(self, ranks: int = 0, steps: int = 0) -> Kept:
        """Collective. Watch the node's other ranks from here on; write down what a new run is, of so many ``ranks``.

        Raises:
            OutputError: that cannot be.
        """
        from deepspeed_sdp.agreement import agreed, from_first_rank
        from deepspeed_sdp.processes import place
        from deepspeed_sdp.ranks import gather_objects

        self._record = from_first_rank(lambda: self._record or self._write(ranks, steps))
        kept = self.kept
        agreed(lambda: _own_folder(kept.folder))
        here = (place(), str(kept.folder.resolve()))
        ranks_of = gather_objects((here, self._name, os.getpid()), "finding the ranks of each node")
        peers = {other: pid for where, other, pid in ranks_of if where == here and pid != os.getpid()}
        self._watch = Watch(kept.folder, peers, self._launcher)
        return kept

    def end(self, is_finished: bool) -> None:
        """Collective. What the job was to save is saved: no rank is missed any more, and no state stays in memory."""
        from deepspeed_sdp.ranks import meet

        self._stop_watching()
        meet("the end of an elastic job")
        self.kept.remove(is_finished)
        meet("freeing the memory of an elastic job")
        self.members.say_over()

    def _leave(self, error: BaseException, report: Callable[[], None]) -> int:
        """Where others are gone, the job goes on; where it is told what is wrong with it, it does not."""
        if is_loss(error):
            # If it is a rank of this node, the watch ends this process meanwhile, and knows which one.
            time.sleep(_WATCH_SECONDS if self._watch is not None else 0.0)
            report()
            return LEFT
        self._stop_watching()
        report()
        if isinstance(error, SDPError | KeyboardInterrupt):
            end_launcher(self._launcher)
        return 1

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def _set_aside(self) -> None:
        """A run that begins anew: what is in memory is another one's."""
        if self._record is not None:
            self.kept.remove(is_finished=True)
        self._record = None
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _read(self) -> _Record | None:
        if not self._file.exists():
            return None
        try:
            return read_as(self._file, _Record)
        except CheckpointError as error:
            raise ConfigError(f"--elastic: {error}; takes that of an earlier start, or --restart") from None

    def _write(self, ranks: int, steps: int) -> _Record:
        record = _Record(run=secrets.token_hex(16), ranks=ranks, steps=steps)
        try:
            write_text(self._file, json.dumps(record.model_dump()) + "\n")
        except OSError as error:
            raise OutputError(f"--output_dir: cannot write {self._file}: {error.strerror or error}") from None
        return record


def _own_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_own = folder.stat().st_uid == os.getuid() and not folder.is_symlink()
    except OSError as error:
        raise OutputError(f"--elastic_folder: cannot write {folder}: {error.strerror or error}") from None
    if not is_own:
        raise OutputError(f"--elastic_folder: {folder} is another user's; takes a folder of one's own")
