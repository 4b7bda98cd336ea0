"""The full model's face: evaluation, state dict, HuggingFace folders."""

import contextlib
import ctypes
import resource
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config, face, run_steps


def evaluation_batches(rank, counts, ignored):
    """``counts[rank]`` batches of different sizes; with ``ignored``, half of the labels (all of some rows) are -100."""
    generator = torch.Generator().manual_seed(50 + rank)
    batches = []
    for i in range(counts[rank]):
        ids = torch.randint(0, 97, (1 + i % 3, 6 + 5 * (i % 2)), generator=generator)
        labels = ids.clone()
        if ignored:
            labels[torch.rand(ids.shape, generator=generator) < 0.5] = -100
            if i == 1:
                labels[:] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def evaluate(
    counts, ignored=False, train=True, evaluations=2, ds=None, family="llama", model=None, sdp=None, padding=False
):
    """Train two steps, evaluate, train three more; without ``evaluations`` the same training undisturbed."""
    config = ds_config(**(ds or {}))
    engine, *_ = deepspeed_sdp.initialize(
        model=build_model(family, model), config=config, sdp_config=sdp or {"coverage": 0.5}
    )
    result = run_steps(engine, 2)
    modules = {name: id(module) for name, module in engine.module.named_modules()}
    engine.train(train)
    batches = evaluation_batches(dist.get_rank(), counts, ignored)
    if padding:
        for batch in batches:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][:, -2:] = 0
            batch["labels"][:, -2:] = -100
    full = engine.full_state_dict(torch.float32) if evaluations else None
    values = [engine.evaluate_full(batches) for _ in range(evaluations)]
    flags = {module.training for module in engine.module.modules()}
    same_modules = modules == {name: id(module) for name, module in engine.module.named_modules()}
    engine.train()
    after = run_steps(engine, 3, seed=2)
    result = {
        "values": values,
        "full_then": full,
        "training": flags,
        "same_modules": same_modules,
        "losses": result["losses"] + after["losses"],
        "norms": result["norms"] + after["norms"],
        **face(engine),
    }
    engine.destroy()
    return result


def evaluate_nothing():
    engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=ds_config(), sdp_config={})
    try:
        engine.evaluate_full([])
    except deepspeed_sdp.StateError as error:
        return str(error)
    finally:
        engine.destroy()


def save(folder, dtype=None, steps=1, family="llama", model=None, ds=None, meta=False, seed=1, sdp=None):
    """Train and save; the weights as rank 0 sees them, or the error."""
    config = ds_config(**(ds or {}))
    engine, *_ = deepspeed_sdp.initialize(
        model=build_model(family, model, meta), config=config, sdp_config=sdp or {"coverage": 0.5}
    )
    run_steps(engine, steps, seed)
    error = None
    try:
        engine.save_hf(folder, dtype)
    except deepspeed_sdp.OutputError as raised:
        error = str(raised)
    after = run_steps(engine, 1)
    result = {"full_own_dtype": engine.full_state_dict(), "error": error, "losses": after["losses"], **face(engine)}
    engine.destroy()
    return result


def as_given(folder, ds=None, sdp=None, family="llama", model=None):
    """Loss of a model with a past, as it was given, and of what the engine makes of it before it is trained."""
    module = build_model(family, model)
    module.resize_token_embeddings(103, mean_resizing=False)
    module.get_input_embeddings().requires_grad_(False)
    module.gradient_checkpointing_enable()
    module.enable_input_require_grads()
    module.set_attn_implementation("eager")
    module.config.pad_token_id = 5
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    usual = module.loss_function
    module.loss_function = lambda *args, **kwargs: 2 * usual(*args, **kwargs)
    batch = evaluation_batches(0, [1], False)[0]
    with torch.no_grad():
        given = float(module.eval()(**batch).loss)
    module.train()
    engine, *_ = deepspeed_sdp.initialize(model=module, config=ds_config(**(ds or {})), sdp_config=sdp)
    losses = [given, engine.evaluate_full([batch])]
    for streamed in (False, True):
        with engine.full_model(streamed) as full:
            losses.append(float(full(**batch).loss))
    engine.save_hf(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    losses.append(2 * float(loaded(**batch).loss.detach()))
    run_steps(engine, 1)
    engine.destroy()
    return losses


def gathered_bytes(sdp, stage):
    engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=ds_config(stage), sdp_config=sdp)
    before = engine._traffic.current.copy()
    engine.full_state_dict()
    sent = engine._traffic.current - before
    engine.destroy()
    return sum(nbytes for (kind, _), nbytes in sent.items() if kind == "full_gather")


def save_twice(folder, limit=None):
    """Save, train on, and save again in bf16 while no file may grow past ``limit`` bytes."""
    engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=ds_config(), sdp_config={"coverage": 0.5})
    engine.save_hf(folder)
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()} if dist.get_rank() == 0 else None
    run_steps(engine, 1)
    second = engine.full_state_dict(torch.bfloat16)
    error = None
    with file_size_limit(limit):
        try:
            engine.save_hf(folder, torch.bfloat16)
        except deepspeed_sdp.OutputError as raised:
            error = str(raised)
    engine.destroy()
    return {"error": error, "second": second, "files": files}


@contextlib.contextmanager
def file_size_limit(limit):
    if limit is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def peak_of(what, stage, model):
    """By how many bytes ``what`` ("evaluate_full" or "full_state_dict") raises this rank's peak memory, in bf16."""
    engine, *_ = deepspeed_sdp.initialize(
        model=build_model(model=model, meta=True), config=ds_config(stage, bf16=True), sdp_config={"coverage": 0.5}
    )
    batches = evaluation_batches(dist.get_rank(), [2, 2, 2, 2], False)
    ask = {"evaluate_full": lambda: engine.evaluate_full(batches), "full_state_dict": engine.full_state_dict}[what]
    ask()  # what is loaded and cached at first use stays
    ctypes.CDLL(None).malloc_trim(0)
    # From here on the peak counts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    ask()
    raised = peak_memory() - before
    engine.destroy()
    return raised


def peak_memory():
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def full_model_where_memory_is_short(short):
    """Names of the classes that ``full_model`` gives, where rank 2 has so many bytes free, and the losses of both."""
    engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=ds_config(), sdp_config={"coverage": 0.5})
    run_steps(engine, 1)
    ids = torch.arange(24).view(2, 12)
    accelerator, free = get_accelerator(), get_accelerator().available_memory
    found = []
    for nbytes in (None, short):
        if nbytes is not None and dist.get_rank() == 2:
            accelerator.available_memory = lambda device=None, nbytes=nbytes: nbytes
        try:
            with engine.full_model(streamed=None) as model, torch.no_grad():
                found.append((type(model).__name__, float(model(input_ids=ids, labels=ids).loss)))
        finally:
            accelerator.available_memory = free
    engine.destroy()
    return found
