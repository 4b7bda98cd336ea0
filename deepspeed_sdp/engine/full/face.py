"""What an engine says of the plan and of the full model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.deepspeed.memory import model_state_bytes
from deepspeed_sdp.engine.full.calibration import calibrated, scales_to_try
from deepspeed_sdp.engine.full.evaluation import evaluate_full
from deepspeed_sdp.engine.full.full_model import full_state_dict, save_hf, skeleton_to_save
from deepspeed_sdp.engine.full.gather import Access
from deepspeed_sdp.engine.full.whole_model import is_too_large, whole_model
from deepspeed_sdp.engine.lifetime import while_alive
from deepspeed_sdp.engine.zero.build import Parts
from deepspeed_sdp.engine.zero.optimizer import SDPOptimizer
from deepspeed_sdp.engine.zero.weights import ShardedWeights
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.subnetwork import Subnetwork


class FullModelFace:
    """Part of :class:`SDPEngine`."""

    device: torch.device
    optimizer: SDPOptimizer
    get_global_grad_norm: Any
    sdp_config: SDPConfig
    _owner_groups: OwnerGroups
    _subnetwork: Subnetwork
    _parts: Parts | None
    full_scale: float
    _traffic: Traffic
    _stopwatch: Stopwatch
    averaged: Any

    @property
    def plan(self) -> SubnetworkPlan:
        """Who owns what."""
        return self._subnetwork.plan

    @property
    def subnetwork_index(self) -> int:
        """``w``: the subnetwork that this rank trains."""
        return self._subnetwork.index

    @property
    def data_rank(self) -> int:
        """This rank's place where samples are dealt: each worker sees the same ones, however many ranks it runs on."""
        return self._owner_groups.data_rank(self._owner_groups.rank)

    @property
    def _weights(self) -> ShardedWeights | None:
        return None if self._parts is None else self._parts.weights

    @property
    def _access(self) -> Access:
        return Access(self.device, self._owner_groups, self._traffic, self.gathered_weights, self.full_scale)

    # -- the full model ----------------------------------------------------------------------------------------------

    @while_alive
    def full_state_dict(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor] | None:
        """Collective. On rank 0 the full model's weights on the CPU under their HuggingFace names, elsewhere ``None``.

        Args:
            dtype: cast floating-point weights; ``None`` keeps the dtype they are trained in.
        """
        with self.averaged():
            return full_state_dict(self._subnetwork, self._access, dtype)

    @while_alive
    def evaluate_full(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
        """Collective. Mean loss of a prediction of the *full* model over the batches of all ranks, in nats.

        Ranks may bring different numbers of batches. Layers are gathered one at a time, so no rank needs more memory
        than its subnetwork, one full layer, and the hidden states of its batches. Under backward masking every rank has
        the full model, and nothing is gathered.
        """
        self.optimizer.refresh.settle()
        with self.averaged(), nullcontext() if self._weights is None else self._weights.paused():
            return evaluate_full(self._subnetwork, batches, self._access)

    @while_alive
    def calibrate(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
        """Collective. Find the full scale: what the full model's writes are multiplied by from now on.

        Under forward masking, and coverage below 1, the sum of all units is louder than what each subnetwork was
        trained with. The scale with the least loss on half of ``batches`` is sought, between the mean of the
        subnetworks and the sum of strangers, and taken if it is better than none on the other half; rank 0 says in
        words if it is not, or is at an end. It takes five evaluations of one half at coverage 1/2, seven at 1/4, and
        two of the other. Training goes on as before; :meth:`evaluate_full`, :meth:`full_model`,
        :meth:`full_state_dict`, :meth:`save_hf` and ``deepspeed-sdp export`` apply the scale, and checkpoints keep it.

        Args:
            batches: as in :meth:`evaluate_full`, two sequences or more over all ranks; of the text that is trained on,
                as what is held out shall judge.

        Returns:
            The scale, of all ranks; 1 where there is nothing to find.
        """
        mine = list(batches)
        if not self._subnetwork.is_louder:
            return 1.0

        def loss(scale: float, part: Iterable[Mapping[str, torch.Tensor]]) -> float:
            self.full_scale = scale
            return self.evaluate_full(part)

        scale = self.full_scale
        try:
            scale = calibrated(loss, mine, scales_to_try(self.plan, self.sdp_config), self._subnetwork.adapter.task)
        finally:
            self.full_scale = scale
        return scale

    @while_alive
    @contextmanager
    def full_model(self, streamed: bool | None = False) -> Iterator[torch.nn.Module]:
        """Collective, between steps. Inside, the full model in evaluation mode: to evaluate, to generate, to look at.

        Its weights are those of now, in part the very ones that are trained: look, do not change them. Afterwards the
        module is empty.

        Args:
            streamed: gather one layer at a time in every call, which is then collective, instead of all weights at
                once on every rank. Such a module can be called, and no more. ``None``: where some rank has no memory
                for all of them.
        """
        self.optimizer.refresh.settle()
        is_sharded = self._weights is not None
        streamed = is_too_large(self._subnetwork, self.device) if streamed is None else streamed
        with self.averaged(), nullcontext() if self._weights is None else self._weights.paused():
            model = whole_model(self._subnetwork, self._access, is_streamed=streamed, is_sharded=is_sharded)
            with model as full:
                yield full

    @while_alive
    def save_hf(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Collective. Write the full model as a HuggingFace folder, which needs nothing of this package to load.

        Raises:
            OutputError: the folder cannot be written; on every rank.
        """
        with self.averaged():
            save_hf(self._subnetwork, Path(folder), self._access, dtype)

    @while_alive
    @contextmanager
    def gathered_weights(self, layer: int | None = None) -> Iterator[None]:
        """Collective, between steps. Inside, this rank's weights of one decoder layer can be read, at any ZeRO stage.

        Under backward masking weights may still be under way after a step; here and in a forward pass they are not.

        Args:
            layer: number of the layer; ``None`` for everything outside of the layers.
        """
        self.optimizer.refresh.settle()
        if self._weights is None:
            yield
            return
        parts = self._weights.outer if layer is None else (layer + 1,)
        with self._weights.gathered(parts):
            yield

    def full_skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        """The full model on the meta device, as ``save_pretrained(folder, state_dict=...)`` takes it."""
        return skeleton_to_save(self._subnetwork, dtype)

    @property
    def worked_numel(self) -> tuple[int, int]:
        """Parameters outside of embeddings that this rank's forward pass uses, and of them those that it trains."""
        return self._subnetwork.worked_numel

    @while_alive
    def sdp_stats(self) -> dict[str, Any]:
        """Figures of the last step on this rank.

        ``model_state_bytes`` (weights, gradients, optimizer; live tensors), ``bytes_sent``, also by kind of collective
        and by owner set, ``mean_bytes_sent`` (of a step, over the last round of local steps), ``seconds`` (forward,
        backward with its reductions, step; ``communication`` from issue of all collectives until they were waited for,
        ``exposed`` the part in which nothing else could run, ``overlapped`` the rest; on an accelerator by its own
        clock, of the step before), ``checkpoint_stall_seconds`` (what the last ``save_checkpoint`` took of the
        training), ``grad_norm``, ``owned_numel``, ``subnetwork_index``, ``owner_sets`` (those this rank belongs to).
        """
        owned = self._subnetwork.fragments.keys() - self._subnetwork.frozen
        sets = {self._subnetwork.owner_set(name) for name in owned}
        norm = self.get_global_grad_norm()
        return {
            "subnetwork_index": self.subnetwork_index,
            "owned_numel": self._subnetwork.owned_numel,
            "owner_sets": sorted(sets),
            "model_state_bytes": model_state_bytes(self),
            "bytes_sent": self._traffic.last_step_bytes,
            "mean_bytes_sent": self._traffic.mean_step_bytes,
            "bytes_sent_by_kind": dict(self._traffic.last_step),
            "bytes_sent_by_owner_set": self._traffic.last_step_by_owner_set,
            "seconds": self._stopwatch.last_step_seconds,
            "checkpoint_stall_seconds": self._stopwatch.checkpoint_stall,
            "grad_norm": None if norm is None else float(norm),
        }
