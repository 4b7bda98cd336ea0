"""What a real step allocates on a rank, of SDP engines and plain DeepSpeed: every block of torch's CPU allocator."""

import gc
import itertools

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_sdp
from deepspeed_sdp.engine import gradient_peak, model_state_bytes
from deepspeed_sdp.report.saved_activations import saved_activations


def measure(config, ds, sdp, batch, length, checkpointing=False):
    """Bytes on this rank: model state, the live gradients' peak, what autograd keeps, and the peak of everything.

    ``config``: of a LLaMA; ``sdp``: ``None`` for plain DeepSpeed.
    """
    gc.collect()
    torch.manual_seed(0)
    with _profiled() as profile:
        # From here on: what is given back must have been seen when it was taken.
        model = LlamaForCausalLM(LlamaConfig(**config))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if sdp is None:
            engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds)
        else:
            engine, *_ = deepspeed_sdp.initialize(model=model, config=ds, sdp_config=sdp)
        ids = torch.randint(0, config["vocab_size"], (batch, length))
        micro_batches = ds.get("gradient_accumulation_steps", 1)
        for _ in range(micro_batches):
            _step(engine, ids)
        gc.collect()
        state = model_state_bytes(engine)
        torch.empty(MARK)
        for _ in range(STEPS):
            for _ in range(micro_batches):
                _step(engine, ids)
            gc.collect()  # or cycles hold buffers of this step into the next, by chance
            torch.empty(MARK)
    peak = _peak(profile)
    with gradient_peak(engine) as gradients, saved_activations(engine.module) as saved:
        for _ in range(micro_batches):
            _step(engine, ids)
    own = {} if sdp is None else _seen(engine, deepspeed_sdp.SDPConfig.of(sdp))
    engine.destroy()
    return {
        **own,
        "weights": state["weights"],
        "optimizer": state["optimizer"],
        "gradients": gradients.nbytes,
        "activations": saved.total // micro_batches,
        **peak,
        "state": state["total"],
    }


def _seen(engine, sdp):
    """What the engine of a rank is made of, and what it sent in its last step."""
    refresh, weights = engine._parts.optimizer.refresh, engine._parts.weights
    sent = dict(engine._traffic.last_step)
    sent.pop("norm_all_reduce", None)
    return {
        "layout": describe(engine._parts.layout, refresh.portions),
        "uses": [] if weights is None else [(part.use.stays, part.use.is_needed_backward) for part in weights._parts],
        "rules": refresh._rules,
        "worker": engine._parts.groups.subnetwork_index,
        "sent": sent,
    }


def describe(rounds, portions):
    """Buckets, rounds, portions and parts of a rank, of the engine or of an estimate, in plain data."""
    return {
        "buckets": [[_bucket(bucket) for bucket in of_round] for of_round in rounds.rounds],
        "copies": [[_bucket(bucket) for bucket in of_round] for of_round in rounds.copies],
        "parts": rounds.parts,
        "portions": [
            (portion.rounds, *([b.key for b in of] for of in (portion.gathered, portion.exchanged)))
            for portion in portions
        ],
    }


def _bucket(bucket):
    shares = [bucket.share_of(rank) for rank in bucket.owners.ranks]
    return (
        bucket.key,
        bucket.numels,
        bucket.padded_numel,
        bucket.shard_numel,
        bucket.shards,
        bucket.owners.ranks,
        shares,
    )


# The peak of a step is the least of so many: threads of gloo let go of a round that is done sooner or later.
STEPS = 5
MARK = 12_345_677


def _profiled():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def _step(engine, ids):
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def _peak(profile):
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    marks = [i for i, size in enumerate(sizes) if size == 4 * MARK]
    levels = list(itertools.accumulate(sizes))
    # A mark is taken and given back.
    steps = [levels[first + 2 : last] for first, last in itertools.pairwise(marks)]
    assert len(steps) == STEPS
    return {"peak": min(map(max, steps)), "base": steps[0][0]}
