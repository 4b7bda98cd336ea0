"""An engine's checkpoints, with DeepSpeed's signatures."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.utils import logger

from deepspeed_sdp.agreement import from_first_rank
from deepspeed_sdp.checkpoint import BackgroundWriter, FolderLocks, latest_step, open_newest
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.lifetime import while_alive
from deepspeed_sdp.engine.state.checkpointing import load_checkpoint, save_checkpoint, take_checkpoint
from deepspeed_sdp.errors import ConfigError, OutputError


@dataclass(frozen=True)
class Newest:
    """What :meth:`SDPEngine.load_newest` took up.

    Attributes:
        path: of it, ``None`` where there is nothing.
        client_state: as it was saved.
        is_in_memory: whether nodes kept it.
        problems: why newer ones that they keep are not used.
    """

    path: str | None
    client_state: dict[str, Any] | None
    is_in_memory: bool
    problems: Sequence[str]


class CheckpointFace:
    """Part of :class:`SDPEngine`."""

    global_rank: int
    sdp_config: SDPConfig
    _checkpoint_writer: BackgroundWriter
    _checkpoint_locks: FolderLocks
    _stopwatch: Stopwatch
    _owner_groups: OwnerGroups

    @while_alive
    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Collective. Write a checkpoint that any layout of the same model can load; see docs/checkpoints.md.

        With ``checkpoint.async`` this rank's part is copied to the CPU and written beside the training; an error comes
        with the next call, :meth:`wait_for_checkpoint`, :meth:`load_checkpoint` or :meth:`destroy`.

        Returns:
            ``False`` if it, or the one before that was still under way, cannot be written and ``checkpoint.on_error``
            is ``"continue"``.

        Raises:
            OutputError: it cannot be written, or another job saves into ``save_dir``; on every rank. What was there
                before is untouched.
            CheckpointError: ``client_state`` holds what could not be loaded safely.
        """
        if exclude_frozen_parameters:
            raise ConfigError("exclude_frozen_parameters: got True; takes False, a checkpoint is complete")
        return self._save(lambda: save_checkpoint(self, Path(save_dir), tag, client_state, save_latest))

    @while_alive
    def save_in_memory(self, folder: str | Path, client_state: Mapping[str, Any] | None = None) -> bool:
        """Collective. Keep the state of the training in ``folder`` of every node, below ``/dev/shm`` as a rule.

        Every rank's part is copied there at once. Beside the training it goes to another node too, if there is one, and
        replaces what was kept before when all nodes have theirs. So the state outlives the processes, and the loss of a
        node: :meth:`load_newest` takes it up on those that are left. Errors and return value: see
        :meth:`save_checkpoint`.
        """
        return self._save(lambda: save_checkpoint(self, Path(folder), None, client_state, True, is_in_memory=True))

    @while_alive
    def load_newest(self, folder: str | Path, load_dir: str | Path) -> Newest:
        """Collective. Take up the newest state: what nodes keep in ``folder``, or the latest checkpoint.

        Raises:
            CheckpointError: see :meth:`load_checkpoint`.
        """
        self.wait_for_checkpoint()
        worker = self._owner_groups.subnetwork_index
        kept, problems = open_newest(Path(folder), worker)
        step = -1 if kept is None else int(kept.meta["global_steps"])
        if kept is None or step < from_first_rank(lambda: latest_step(Path(load_dir))):
            path, state = self.load_checkpoint(load_dir)
            return Newest(path, state, False, problems)
        return Newest(*take_checkpoint(self, kept), True, problems)

    @while_alive
    def claim_checkpoints(self, folder: str | Path) -> None:
        """Collective. Be the one job that saves below ``folder``, until :meth:`release_checkpoints`
        or :meth:`destroy`; saving does it by itself.

        Raises:
            OutputError: another job does, or the folder cannot be written; on every rank.
        """
        from_first_rank(lambda: self._checkpoint_locks.take(Path(folder)))

    def release_checkpoints(self) -> None:
        """Let other jobs save into the folders of this one, which saves no more."""
        self._checkpoint_locks.release()

    @while_alive
    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Collective. Take up a checkpoint of this model, whatever layout wrote it.

        Returns:
            its path and the client state; ``(None, None)`` where there is none and no ``tag`` was asked for.

        Raises:
            CheckpointError: it is missing, damaged or of another model; on every rank.
        """
        if custom_load_fn is not None or not load_module_strict:
            raise ConfigError("load_checkpoint: takes load_module_strict=True and no custom_load_fn")
        with_all = not load_module_only
        return load_checkpoint(
            self,
            Path(load_dir),
            tag,
            with_optimizer=with_all and load_optimizer_states,
            with_scheduler=with_all and load_lr_scheduler_states,
        )

    def wait_for_checkpoint(self) -> bool:
        """Collective, with ``checkpoint.async``. Wait for the checkpoint under way.

        Returns:
            ``False`` if it could not be written and ``checkpoint.on_error`` is ``"continue"``.

        Raises:
            OutputError: it could not be written; on every rank.
        """
        return self._try_to_save(self._checkpoint_writer.wait)

    def _save(self, save: Callable[[], None]) -> bool:
        began = time.perf_counter()
        before = self.wait_for_checkpoint()
        saved = self._try_to_save(save)
        self._stopwatch.checkpoint_stall = time.perf_counter() - began
        return saved and before

    def _try_to_save(self, save: Callable[[], None]) -> bool:
        try:
            save()
        except OutputError as error:
            if self.sdp_config.checkpoint.on_error == "stop":
                raise
            if self.global_rank == 0:
                logger.error(f"no checkpoint was saved, the job goes on: {error}")
            return False
        return True
