"""An engine's checkpoints, with DeepSpeed's signatures."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepspeed.utils import logger

from deepspeed_sdp.agreement import from_first_rank
from deepspeed_sdp.checkpoint import BackgroundWriter, FolderLocks
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.lifetime import while_alive
from deepspeed_sdp.engine.state.checkpointing import load_checkpoint, save_checkpoint
from deepspeed_sdp.errors import ConfigError, OutputError


class CheckpointFace:
    """Part of :class:`SDPEngine`."""

    global_rank: int
    sdp_config: SDPConfig
    _checkpoint_writer: BackgroundWriter
    _checkpoint_locks: FolderLocks
    _stopwatch: Stopwatch

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
        began = time.perf_counter()
        before = self.wait_for_checkpoint()
        saved = self._try_to_save(lambda: save_checkpoint(self, Path(save_dir), tag, client_state, save_latest))
        self._stopwatch.checkpoint_stall = time.perf_counter() - began
        return saved and before

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
