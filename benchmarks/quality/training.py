"""One simulated training: steps of all workers, phases, schedule, evaluation of the full model."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.apart import Apart, Outer
from benchmarks.quality.ownership import Ownership, dropped_blocks, flops_per_token, make_plan, ownership_of, parse_sdp
from benchmarks.quality.simulated_llama import SimulatedLlama
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.data import RankSampler
from deepspeed_sdp.data.packing import Tokens
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.plan.resample import Resample

WARM_UP, LAST_LR = 0.05, 0.1
CLIP, WEIGHT_DECAY, BETAS = 1.0, 0.1, (0.9, 0.95)
# What the branches of the finished model are multiplied by to see whether they are too loud or too quiet.
CALIBRATION = (0.5, 0.6, 0.7, 0.85, 1.0, 1.15, 1.3)
WRITES = ("o_proj.weight", "down_proj.weight")
_EVALUATION_BATCH = 64
_DENSE = {"coverage": 1.0}


@dataclass(frozen=True)
class Size:
    """A model, its batches and what the dense run takes; ``N`` workers of ``sequences`` sequences each."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    length: int
    workers: int
    sequences: int
    dense_steps: int

    @property
    def tokens_per_step(self) -> int:
        """Of all workers."""
        return self.workers * self.sequences * self.length

    def build(self, seed: int, share: float = 1.0) -> LlamaForCausalLM:
        """The full model with initial weights of ``seed``, or one with a ``share`` of its heads and MLP neurons."""
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocab,
                hidden_size=self.hidden,
                intermediate_size=round(self.intermediate * share),
                num_hidden_layers=self.layers,
                num_attention_heads=round(self.heads * share),
                num_key_value_heads=round(self.heads * share),
                head_dim=self.hidden // self.heads,
                max_position_embeddings=self.length,
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
            )
        )


@dataclass(frozen=True)
class Phase:
    """A part of a training with another block: its share of the budget, the keys that differ, what is trained."""

    share: float
    sdp: dict[str, Any] = field(default_factory=dict)
    only_norms: bool = False


@dataclass(frozen=True)
class Method:
    """What is trained in which way.

    Attributes:
        sdp: the SDP block; ``{"coverage": 1.0}`` is dense.
        same_split: the same teams in every layer, instead of a design.
        resample_interval: steps between two plans, 0: never.
        resample: how: ``"units"`` one by one, or chunks of them as the engine does, ``"rotate"`` or ``"random"``.
        dropout: on what branches add.
        stochastic_depth: probability with which a worker leaves out a branch of the last layer; it rises linearly over
            the layers. What is left out costs no FLOPs.
        first, last: phases at the start and at the end.
        partitioned_lr: factor on the learning rate of partitioned parameters.
        sequences: of a worker in a step; 0: the size's.
        share: of the heads and MLP neurons that the model has at all: a smaller dense model.
        sync_interval: steps that workers train apart before they agree on weights, 0: gradients are averaged instead.
        outer: whether an outer SGD with Nesterov's momentum takes the average change, as in DiLoCo.
        writes: factor on the initial values and the learning rate of linears that write to the residual stream.
    """

    sdp: dict[str, Any] = field(default_factory=lambda: dict(_DENSE))
    same_split: bool = False
    resample_interval: int = 0
    resample: str = "units"
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    first: Phase | None = None
    last: Phase | None = None
    partitioned_lr: float = 1.0
    sequences: int = 0
    writes: float = 1.0
    share: float = 1.0
    sync_interval: int = 0
    outer: bool = False

    def phases(self) -> list[Phase]:
        """All of them in order; shares add up to 1."""
        around = [phase.share for phase in (self.first, self.last) if phase]
        middle = Phase(1.0 - sum(around))
        return [phase for phase in (self.first, middle, self.last) if phase]


def simulate_step(
    simulation: SimulatedLlama,
    optimizer: torch.optim.Optimizer,
    ids_NBT: Tensor,
    ownership: Ownership,
    *,
    clip: float = CLIP,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step of all workers: their losses ``[N]`` and the gradient norm, every unit counted once."""
    optimizer.zero_grad()
    losses = simulation.losses(ids_NBT, ownership, dropout)
    # A parameter's gradient is now the sum over its owners: to the others' losses it adds nothing.
    losses.sum().backward()
    trained = [(n, p) for n, p in simulation.weights.items() if p.grad is not None]
    for name, parameter in trained:
        parameter.grad /= ownership.counts.get(name, float(ownership.num_workers))  # type: ignore[operator]
    norm = nn.utils.clip_grad_norm_([p for _, p in trained], clip or math.inf, foreach=True)
    optimizer.step()
    return losses.detach(), norm


@dataclass
class _Schedule:
    """What of the budget is spent, in FLOPs per worker or in tokens."""

    budget: float
    spent: float = 0.0

    @property
    def progress(self) -> float:
        return self.spent / self.budget

    def lr_factor(self) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if self.progress < WARM_UP:
            return max(self.progress, 1e-3) / WARM_UP
        through = (self.progress - WARM_UP) / (1.0 - WARM_UP)
        return LAST_LR + (1.0 - LAST_LR) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, through)))


class _Owners:
    """The ownership of every step of a phase."""

    def __init__(self, model: nn.Module, method: Method, phase: Phase, size: Size, seed: int) -> None:
        self.model, self.method, self.size, self.seed = model, method, size, seed
        self.sdp: SDPConfig = parse_sdp({**method.sdp, **phase.sdp}, seed=seed, seq_length=size.length)
        self.plan: SubnetworkPlan = make_plan(model, self.sdp, size.workers, same_split=method.same_split)
        self.is_dense = self.plan.owners_per_unit == size.workers
        layers = size.layers
        self.rates = [method.stochastic_depth * (i + 1) / layers for i in range(layers)] if self.is_dense else []
        self.generator = torch.Generator().manual_seed(seed)
        self.static = Ownership(size.workers) if self.is_dense else ownership_of(model, self.plan, self.sdp)

    @property
    def flops(self) -> float:
        """Per token."""
        flops = flops_per_token(self.plan)
        kept = 1.0 - sum(self.rates) / self.size.layers
        return self.plan.shared_flops + (flops - self.plan.shared_flops) * kept

    def at(self, step: int) -> Ownership:
        """Of one step."""
        if any(self.rates):
            return dropped_blocks(self.size.layers, self.size.workers, self.rates, self.generator)
        interval = self.method.resample_interval
        if not interval or self.is_dense or step % interval or not step:
            return self.static
        if self.method.resample != "units":
            plan = self.plan.resampled(step // interval, cast("Resample", self.method.resample))
            self.static = ownership_of(self.model, plan, self.sdp)
        else:
            self.static = ownership_of(self.model, self.plan, self.sdp, shuffle=self.seed * 1_000_000 + step)
        return self.static


def train(
    method: Method, size: Size, train_text: Tokens, heldout: Tokens, *, lr: float, seed: int, equal: str
) -> dict[str, Any]:
    """Train the full model as all workers would, and evaluate it.

    Args:
        method: what is compared.
        size: model and batches.
        train_text, heldout: packed sequences, int32 ``[n, T]``; the last of ``train_text`` serve calibration alone.
        lr: the peak.
        seed: of initial weights, order of the text, and plan.
        equal: ``"flops"`` or ``"tokens"``: the budget is that of ``size.dense_steps`` dense steps.

    Returns:
        A row of figures, JSON-able. Losses are the full model's on ``heldout``, nats per token.
    """
    began, cpu = time.perf_counter(), time.process_time()
    model = size.build(seed, method.share)
    simulation = SimulatedLlama(model)
    calibration, train_text = train_text[-_EVALUATION_BATCH:], train_text[:-_EVALUATION_BATCH]
    dense = _Owners(size.build(seed), Method(), Phase(1.0), size, seed)
    budget = size.dense_steps * size.sequences * size.length
    size = replace(size, sequences=method.sequences or size.sequences)
    per_step = size.sequences * size.length
    cost = {"flops": dense.flops, "tokens": 1.0}[equal]
    schedule = _Schedule(budget * cost)
    phases = [(phase, _Owners(model, method, phase, size, seed)) for phase in method.phases()]
    partitioned = set().union(*(owners.static.counts for _, owners in phases))
    optimizer = _optimizer(simulation, method, partitioned, lr)
    apart = _apart(model, method, phases[0][1], lr) if method.sync_interval else None
    groups = optimizer.param_groups if apart is None else apart.param_groups
    batches = _batches(train_text, size, seed)
    torch.manual_seed(seed)  # of dropout
    step, flops, losses, until = 0, 0.0, [], 0.0
    for phase, owners in phases:
        until += phase.share
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not phase.only_norms or "norm" in name)
        step_cost = per_step * (owners.flops if equal == "flops" else 1.0)
        while schedule.spent + step_cost / 2 < until * schedule.budget:
            for group in groups:
                group["lr"] = group["peak"] * schedule.lr_factor()
            ids = next(batches)
            if apart is not None:
                found = apart.step(ids)
            else:
                found, _ = simulate_step(simulation, optimizer, ids, owners.at(step), dropout=method.dropout)
            losses.append(float(found.mean()))
            schedule.spent += step_cost
            flops += per_step * owners.flops
            step += 1
    if apart is not None:
        apart.agree()
    loss = evaluate(simulation, heldout)
    factor, calibrated = _calibrate(simulation, calibration, heldout)
    return {
        "loss": loss,
        "loss_calibrated": calibrated,
        "calibration": factor,
        "train_loss": float(np.mean(losses[-max(1, len(losses) // 20) :])),
        "steps": step,
        "tokens": step * size.tokens_per_step,
        "flops_per_worker": flops,
        "flop_ratio": flops / (step * per_step * dense.flops),
        "spectral_gap": phases[len(phases) // 2][1].plan.spectral_gap,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def _apart(model: nn.Module, method: Method, owners: _Owners, lr: float) -> Apart:
    outer = Outer() if method.outer else None
    options = {"betas": BETAS, "weight_decay": WEIGHT_DECAY}
    return Apart(model, owners.plan, owners.sdp, method.sync_interval, outer, lr, CLIP, **options)


def _optimizer(simulation: SimulatedLlama, method: Method, partitioned: set[str], lr: float) -> torch.optim.Optimizer:
    by_peak: dict[float, list[Tensor]] = {}
    for name, parameter in simulation.weights.items():
        factor = method.partitioned_lr if name in partitioned else 1.0
        if name.endswith(WRITES) and method.writes != 1.0:
            factor *= method.writes
            with torch.no_grad():
                parameter.mul_(method.writes)
        by_peak.setdefault(lr * factor, []).append(parameter)
    groups = [{"params": parameters, "lr": peak, "peak": peak} for peak, parameters in by_peak.items()]
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def _batches(text: Tokens, size: Size, seed: int) -> Iterator[Tensor]:
    """``[N, B, T]`` token ids, what ``N`` ranks of a job are dealt."""
    sampler = RankSampler(len(text), seed=seed)
    everyone = sampler.batches(0, 1, size.workers * size.sequences)
    for indices in everyone:
        ids = torch.from_numpy(np.asarray(text[indices], dtype=np.int64))
        yield ids.view(size.workers, size.sequences, size.length)


@torch.no_grad()
def evaluate(simulation: SimulatedLlama, text: Tokens) -> float:
    """The full model's loss."""
    total, count = 0.0, 0
    for start in range(0, len(text), _EVALUATION_BATCH):
        ids = torch.from_numpy(np.asarray(text[start : start + _EVALUATION_BATCH], dtype=np.int64))
        total += float(simulation.losses(ids[None], Ownership(1))) * len(ids)
        count += len(ids)
    return total / count


def _calibrate(simulation: SimulatedLlama, calibration: Tokens, heldout: Tokens) -> tuple[float, float]:
    """The best factor on what all branches add, found on ``calibration``, and the loss with it on ``heldout``."""
    found = {factor: _with_factor(simulation, factor, calibration) for factor in CALIBRATION}
    best = min(found, key=lambda factor: found[factor])
    return best, _with_factor(simulation, best, heldout)


@torch.no_grad()
def _with_factor(simulation: SimulatedLlama, factor: float, text: Tokens) -> float:
    writes = [p for n, p in simulation.weights.items() if n.endswith(WRITES)]
    before = [p.clone() for p in writes]
    for parameter in writes:
        parameter.mul_(factor)
    loss = evaluate(simulation, text)
    for parameter, value in zip(writes, before, strict=True):
        parameter.copy_(value)
    return loss


def with_sdp(method: Method, **keys: Any) -> Method:
    """``method`` with other keys in its SDP block."""
    return replace(method, sdp={**method.sdp, **keys})
