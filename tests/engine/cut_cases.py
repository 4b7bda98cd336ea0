"""Training with weights that are cut, on ranks."""

import deepspeed_sdp
from deepspeed_sdp.engine.deepspeed.memory import gradient_peak
from tests.engine.cases import build_model, ds_config, run_steps


def flat_copies(ds, sdp, model):
    """Bytes of gradients: the most that were live, that were copied at a time, and that were on their way."""
    engine, *_ = deepspeed_sdp.initialize(model=build_model(model=model), config=ds_config(**ds), sdp_config=sdp)
    path, transport = engine.optimizer.gradients, engine.optimizer.gradients._transport
    reduce, seen = transport.reduce, {"copied": 0, "on_their_way": 0}

    def watch(buckets, grads):
        copied = sum(grad.nbytes for grad in grads)
        pending = reduce(buckets, grads)
        seen["copied"] = max(seen["copied"], copied)
        seen["on_their_way"] = max(seen["on_their_way"], path.in_flight_bytes + pending.nbytes)
        return pending

    transport.reduce = watch
    with gradient_peak(engine) as peak:
        run_steps(engine, 1)
    embedding = engine.module.get_input_embeddings().weight
    seen.update(peak=peak.nbytes, embedding=embedding.numel() * embedding.element_size())
    engine.destroy()
    return seen
