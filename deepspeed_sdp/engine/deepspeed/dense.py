"""The dense baseline: plain DeepSpeed, from the same initial values, behind the methods that a run uses."""

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError
from torch import nn

from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.agreement import agreed, from_first_rank
from deepspeed_sdp.checkpoint import FolderLocks, model_folder
from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.config import BLOCK, SDPConfig
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.deepspeed.memory import model_state_bytes
from deepspeed_sdp.engine.full.evaluation import eval_mode, mean_over_ranks, nothing, sum_of_losses
from deepspeed_sdp.engine.state.universal import SAFE
from deepspeed_sdp.errors import CheckpointError, ConfigError, OutputError, SDPError
from deepspeed_sdp.files import replace_folder
from deepspeed_sdp.patches import patched
from deepspeed_sdp.ranks import object_of_first
from deepspeed_sdp.subnetwork import cut_model, materialize, plan_for

T = TypeVar("T")

_PLAIN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class DenseEngine(DeepSpeedEngine):  # type: ignore[misc]
    """``DeepSpeedEngine`` with the names that :class:`SDPEngine` has for the full model, and times of its phases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(_stopwatch=Stopwatch(), _checkpoint_locks=FolderLocks())
        super().__init__(*args, **kwargs)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        with self._stopwatch.phase("forward"):
            return super().forward(*inputs, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        with self._stopwatch.phase("backward"):
            return super().backward(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> None:
        steps = self.global_steps
        with self._stopwatch.phase("step"):
            super().step(*args, **kwargs)
        if self.global_steps > steps:
            self._stopwatch.end_step()

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Time of the last step's phases; DeepSpeed's communication is inside of them."""
        return dict(self._stopwatch.last_step)

    @property
    def data_rank(self) -> int:
        """This rank's place where samples are dealt."""
        return int(self.global_rank)

    @property
    def bytes_sent(self) -> None:
        """Not counted."""

    def calibrate(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
        """What is trained is the full model: its scale is 1."""
        return 1.0

    @torch.no_grad()
    def evaluate_full(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
        """Collective. Mean loss of a prediction over the batches of all ranks, in nats."""
        total, task = nothing(self.device), find_adapter(self.module).task
        with eval_mode(self.module):
            for batch in batches:
                mine = {name: value.to(self.device) for name, value in batch.items()}
                total += sum_of_losses(self.module(**mine).loss, mine, task)
        return mean_over_ranks(total)

    def save_hf(self, folder: str | Path) -> None:
        """Collective. Write the model as a HuggingFace folder.

        Raises:
            OutputError: the folder cannot be written; on every rank.
        """

        def write() -> None:
            config = self.module.config
            config.use_cache = self._uses_cache
            try:
                with model_folder(Path(folder)) as staging:
                    self.module.save_pretrained(staging)
            except (OSError, SafetensorError) as error:  # the latter is what a full disk gives
                raise OutputError(f"save_hf: cannot write {folder}: {getattr(error, 'strerror', error)}") from None
            finally:
                config.use_cache = False

        from_first_rank(write)

    def save_checkpoint(
        self,
        save_dir: Any,
        tag: str | None = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """DeepSpeed's; complete or not there, as those of :class:`SDPEngine`.

        Raises:
            OutputError: it cannot be written, or another job saves into ``save_dir``; on every rank.
        """
        folder, tag = Path(save_dir), tag or f"global_step{self.global_steps}"
        self.claim_checkpoints(folder)
        staging = folder / from_first_rank(lambda: _written(lambda: folders.begin(folder, tag).name, folder))

        def save() -> bool:
            state, frozen = client_state or {}, exclude_frozen_parameters
            return bool(super(DenseEngine, self).save_checkpoint(str(staging), tag, state, False, frozen))

        saved = agreed(lambda: _written(save, folder))
        from_first_rank(lambda: _written(lambda: _finish(staging, folder / tag, save_latest), folder))
        return saved

    def claim_checkpoints(self, folder: str | Path) -> None:
        """As :meth:`SDPEngine.claim_checkpoints`."""
        from_first_rank(lambda: self._checkpoint_locks.take(Path(folder)))

    def destroy(self) -> None:
        self._checkpoint_locks.release()
        super().destroy()

    def load_checkpoint(self, load_dir: Any, *args: Any, **kwargs: Any) -> tuple[str | None, Any]:
        """DeepSpeed's, which takes the number of ranks that a checkpoint was made on.

        Raises:
            CheckpointError: the ranks are more or fewer, a file is missing or holds more than plain data, or it is an
                SDP engine's; on every rank.
        """
        # Rank 0's view counts: a shared folder may show a file to some later than to others.
        with suppress(OSError):  # a folder that cannot be written can still be read
            if dist.get_rank() == 0:
                folders.recover(Path(load_dir))
        if not object_of_first(Path(load_dir, "latest").is_file(), "finding the latest checkpoint"):
            return None, None

        def load() -> tuple[str | None, Any]:
            try:
                with _plain_data_alone():
                    return super(DenseEngine, self).load_checkpoint(str(load_dir), *args, **kwargs)  # type: ignore[no-any-return]
            except UnpicklingError:
                raise CheckpointError(f"{load_dir}: is refused: its files hold more than plain data") from None
            except Exception as error:  # DeepSpeed asserts, and torch raises almost anything for a damaged file
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise CheckpointError(
                    f"{load_dir}: cannot be loaded by the dense baseline on {dist.get_world_size()} ranks; takes a "
                    f"whole checkpoint of it, made on as many ranks: {reason}"
                ) from None

        return agreed(load)

    def wait_for_checkpoint(self) -> bool:
        """Checkpoints of the baseline are never under way."""
        return True

    def sdp_stats(self) -> dict[str, Any]:
        """As :meth:`SDPEngine.sdp_stats`, without what is not counted here."""
        norm = self.get_global_grad_norm()
        return {
            "subnetwork_index": 0,
            "owned_numel": sum(parameter.numel() for parameter in self.module.parameters()),
            "owner_sets": [0],
            "model_state_bytes": model_state_bytes(self),
            "bytes_sent": None,
            "mean_bytes_sent": None,
            "bytes_sent_by_kind": {},
            "bytes_sent_by_owner_set": {},
            "seconds": self.phase_seconds,
            "grad_norm": None if norm is None else float(norm),
        }


def _written(work: Callable[[], T], folder: Path) -> T:
    try:
        return work()
    except (OSError, RuntimeError) as error:  # the latter is what torch.save makes of a full disk
        if isinstance(error, SDPError):
            raise
        raise OutputError(f"cannot write a checkpoint to {folder}: {error}") from None


def _finish(staging: Path, final: Path, is_latest: bool) -> None:
    """What DeepSpeed wrote below ``staging``: the checkpoint, and scripts that it puts beside all of them."""
    replace_folder(staging / final.name, final)
    if is_latest:
        folders.set_latest(final.parent, final.name)
    for file in staging.iterdir():
        if file.is_file():
            os.replace(file, final.parent / file.name)
    shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _plain_data_alone() -> Iterator[None]:
    """DeepSpeed unpickles whatever stands in its files; torch heeds this variable first, and runs nothing."""
    before = os.environ.get(_PLAIN)
    os.environ[_PLAIN] = "1"
    try:
        with torch.serialization.safe_globals([*SAFE, OrderedDict, fragment_address]):
            yield
    finally:
        os.environ.pop(_PLAIN)
        os.environ.update({} if before is None else {_PLAIN: before})


def initialize_dense(model: nn.Module, config: Mapping[str, Any], seed: int = 0) -> DenseEngine:
    """Collective. Plain DeepSpeed with the full model, whose initial values are those that subnetworks start from.

    Args:
        model: on the meta device.
        config: DeepSpeed's, ZeRO stage 0, 1 or 2; an SDP block in it does not count.
        seed: that of the SDP block.

    Raises:
        ConfigError: another ZeRO stage.
    """
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise ConfigError(f"zero_optimization.stage: got {stage} for the dense baseline; takes 0, 1 or 2")
    settings: Any = model.config
    # Cutting switches it off, as for a subnetwork: training keeps no keys and values, and with a cache transformers
    # would not keep packed documents apart.
    uses_cache = settings.use_cache
    whole = plan_for(model, SDPConfig.parse({"coverage": 1.0, "num_subnetworks": 1}), 1)
    materialize(cut_model(model, whole, 0), get_accelerator().current_device_name(), seed)
    plain = {key: value for key, value in config.items() if key != BLOCK}
    with patched(deepspeed, "DeepSpeedEngine", DenseEngine):
        engine, *_ = deepspeed.initialize(model=model, config=plain, model_parameters=model.parameters())
    engine.__dict__["_uses_cache"] = uses_cache
    return engine  # type: ignore[no-any-return]
