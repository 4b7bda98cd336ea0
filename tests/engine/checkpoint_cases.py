"""Saving, and loading into whatever layout."""

import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import deepspeed_sdp
from deepspeed_sdp.checkpoint import file_writer
from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.tensor_files import TensorFiles
from deepspeed_sdp.engine import initialize_dense
from tests.engine.cases import build_model, ds_config, face, run_steps
from tests.support.tiny_checkpoint import change_manifest

HALF = {"coverage": 0.5}
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10}}


def start(sdp, ds, model=None, family="llama", seed=0, frozen=(), dropout=0.0, optimizer=None):
    module = build_model(family, {**(model or {}), "attention_dropout": dropout}, frozen=frozen)
    with torch.no_grad():  # what is loaded must not have been there before
        for parameter in module.parameters():
            parameter.add_(0.01 * seed)
    config = ds_config(**ds, scheduler=SCHEDULER)
    if optimizer:
        config.update(optimizer=optimizer, zero_allow_untested_optimizer=True)
    engine, *_ = deepspeed_sdp.initialize(model=module, config=config, sdp_config=sdp)
    return engine


def save_and_go_on(folder, sdp, ds, tag=None, steps=3, more=2, **values):
    """Train, save, train on: what came after the checkpoint."""
    engine = start(sdp, ds, **values)
    run_steps(engine, steps)
    engine.save_checkpoint(folder, tag=tag, client_state={"consumed": 17, "name": "x"})
    draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    result = {**run_steps(engine, more, seed=9), "draws": draws, "lr": engine.get_lr(), **face(engine)}
    engine.destroy()
    return result


def load_and_go_on(folder, sdp, ds, tag=None, more=2, **values):
    """The same from the checkpoint."""
    engine = start(sdp, ds, seed=1, **values)
    path, client_state = engine.load_checkpoint(folder, tag=tag)
    draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    loaded = face(engine)
    result = {**run_steps(engine, more, seed=9), "draws": draws, "lr": engine.get_lr(), **face(engine)}
    result.update(path=path, client_state=client_state, steps=engine.global_steps, loaded=loaded["full"])
    engine.destroy()
    return result


def files_read(folder, sdp, ds):
    """Names of the files that are opened while a checkpoint is loaded."""
    engine, opened = start(sdp, ds, seed=1), set()
    is_watched = [True]

    def watch(event, arguments):
        if is_watched and event == "open" and str(arguments[0]).startswith(folder):
            opened.add(Path(arguments[0]).name)

    sys.addaudithook(watch)
    open_file = TensorFiles._open_file
    TensorFiles._open_file = staticmethod(lambda path: (opened.add(path.name), open_file(path))[1])
    try:
        engine.load_checkpoint(folder)
    finally:
        is_watched.clear()
        TensorFiles._open_file = staticmethod(open_file)
    engine.destroy()
    return opened - {"latest"}


def load_and_save(folder, out, sdp, ds, **values):
    """Into another layout, and out again."""
    engine = start(sdp, ds, seed=1, **values)
    engine.load_checkpoint(folder)
    engine.save_checkpoint(out)
    result = face(engine)
    engine.destroy()
    return result


def from_hf_folder(folder, sdp, ds, **values):
    """A model that was exported, taken up by another layout."""
    engine = start(HALF, {"stage": 1}, **values)
    run_steps(engine, 1)
    engine.save_hf(folder)
    before = engine.full_state_dict()
    engine.destroy()
    engine = start(sdp, ds, seed=1, **values)
    engine.load_checkpoint(folder)
    after = engine.full_state_dict()
    losses = run_steps(engine, 1)["losses"]
    engine.destroy()
    return before, after, losses


def load_error(folder, sdp, ds, tag=None, **values):
    """The message of the refusal, and the loss of a step afterwards."""
    engine = start(sdp, ds, **values)
    message = None
    try:
        engine.load_checkpoint(folder, tag=tag)
    except deepspeed_sdp.SDPError as error:
        message = f"{type(error).__name__}: {error}"
    engine.destroy()
    return message


def change_pickled(checkpoint, name, manifest, *path, value):
    """Let a file say something else at a place; its checksum holds."""
    found = content = torch.load(checkpoint / name, weights_only=True)
    for key in path[:-1]:
        found = found[key]
    before, found[path[-1]] = found[path[-1]], value
    torch.save(content, checkpoint / name)
    described = folders.describe_file(checkpoint / name)
    change_manifest(checkpoint, lambda body: body["files"].update({name: described}), manifest)
    return before


def refused_states(folder, changes):
    """What is said of a checkpoint with each of ``changes``: a file, the places in it, what stands there."""
    engine = start(HALF, {"stage": 1})
    run_steps(engine, 1)
    engine.save_checkpoint(folder)
    messages = []
    for name, manifest, path, value in changes:
        checkpoint = Path(folder) / "global_step1"
        if dist.get_rank() == 0:
            before = change_pickled(checkpoint, name, manifest, *path, value=value)
        dist.barrier()
        try:
            engine.load_checkpoint(folder)
            messages.append(None)
        except deepspeed_sdp.SDPError as error:
            messages.append(f"{type(error).__name__}: {error}")
        dist.barrier()
        if dist.get_rank() == 0:
            change_pickled(checkpoint, name, manifest, *path, value=before)
    dist.barrier()
    engine.load_checkpoint(folder)
    engine.destroy()
    return messages


def save_what_json_cannot_hold(folder):
    """The message of every rank, and a step after it."""
    engine = start(HALF, {"stage": 1})
    run_steps(engine, 1)
    engine._subnetwork.full.config.note = {1, 2}
    try:
        engine.save_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}", run_steps(engine, 1)["losses"]
    finally:
        engine.destroy()
    return None, None


def refused_models():
    """The messages for models that cannot be cut any more."""
    messages = []
    for attribute, value in (
        ("peft_config", {"default": 1}),
        ("is_quantized", True),
        ("hf_device_map", {"a": "cpu", "b": "disk"}),
    ):
        module = build_model()
        setattr(module, attribute, value)
        try:
            deepspeed_sdp.initialize(model=module, config=ds_config(), sdp_config=HALF)
        except deepspeed_sdp.SDPError as error:
            messages.append(str(error))
    return messages


def whole_models():
    """Generation settings of the full model, its text, and what is left of it afterwards."""
    module = build_model()
    module.generation_config.max_new_tokens = 5
    module.generation_config.eos_token_id = 96
    engine, *_ = deepspeed_sdp.initialize(model=module, config=ds_config(), sdp_config=HALF)
    run_steps(engine, 1)
    with engine.full_model() as model:
        text = model.generate(torch.arange(3, 9)[None], do_sample=False)
        settings = (model.generation_config.max_new_tokens, model.generation_config.eos_token_id)
    left = {str(parameter.device) for parameter in model.parameters()}
    losses = run_steps(engine, 1)["losses"]
    engine.destroy()
    return settings, text.shape[1], left, losses


def start_error(sdp, ds):
    """The message of the refusal."""
    try:
        start(sdp, ds).destroy()
    except deepspeed_sdp.SDPError as error:
        return str(error)
    return None


def subnetworks(folder, sdp, model=None, family="llama"):
    """Save, and what each rank's subnetwork says of one batch."""
    engine = start(sdp, {"stage": 1}, model=model, family=family)
    run_steps(engine, 2)
    engine.save_checkpoint(folder)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits = engine.module.eval()(input_ids=ids).logits
    engine.destroy()
    return logits


def save_every_step(folder, steps, **sdp):
    """Save after every step; the tags that are left."""
    engine = start({**HALF, **sdp}, {"stage": 1})
    for _ in range(steps):
        run_steps(engine, 1)
        engine.save_checkpoint(folder)
    engine.save_checkpoint(folder, tag=f"global_step{steps}")  # again
    engine.destroy()
    return sorted(path.name for path in Path(folder).iterdir())


def save_errors(folder, sdp, ds):
    """Saving where it cannot be done, and training on: the messages."""
    engine = start(sdp, ds)
    run_steps(engine, 1)
    messages = []
    blocked = Path(folder) / "file"
    if dist.get_rank() == 0:
        blocked.write_text("")
    dist.barrier()
    for target, state in ((blocked / "inside", {}), (Path(folder) / "ok", {"f": print})):
        try:
            engine.save_checkpoint(target, client_state=state)
            engine.wait_for_checkpoint()
        except deepspeed_sdp.SDPError as error:
            messages.append(f"{type(error).__name__}: {error}")
    losses = run_steps(engine, 1)["losses"]
    engine.save_checkpoint(Path(folder) / "ok")
    engine.destroy()
    return messages, losses


def save_once(folder, is_async):
    """The message of a save that is refused, and what the job does after it."""
    engine = start({**HALF, "checkpoint": {"async": is_async}}, {"stage": 1})
    run_steps(engine, 1)
    message = None
    try:
        engine.save_checkpoint(folder)
        engine.wait_for_checkpoint()
    except deepspeed_sdp.SDPError as error:
        message = f"{type(error).__name__}: {error}"
    losses = run_steps(engine, 1)["losses"]
    engine.destroy()
    return message, losses


def save_with_a_writer_that_is_killed(folder):
    """On rank 2, at the second save: the message, what is in the folder then, and losses before and after a third."""
    engine = start({**HALF, "checkpoint": {"async": True}}, {"stage": 1})
    writer = file_writer.__file__
    killed = Path(folder).with_name("killed.py")
    if dist.get_rank() == 0:
        killed.write_text("import os\nos.kill(os.getpid(), 9)\n")
    dist.barrier()
    losses, message, names = [], None, []
    for number in range(3):
        losses += run_steps(engine, 1)["losses"]
        file_writer.__file__ = str(killed) if number == 1 and dist.get_rank() == 2 else writer
        try:
            engine.save_checkpoint(folder)
            engine.wait_for_checkpoint()
        except deepspeed_sdp.SDPError as error:
            message = f"{type(error).__name__}: {error}"
        names.append(sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith(".")))
        dist.barrier()
    engine.destroy()
    return message, names, losses


def dense_saves(folder):
    """The baseline saves twice under one tag and loads: what is there after each, and whether the last was loaded."""
    engine = initialize_dense(build_model(meta=True), ds_config(stage=1))
    names = []
    for _ in range(2):
        run_steps(engine, 1)
        engine.save_checkpoint(folder, tag="t", client_state={"steps": engine.global_steps})
        names.append(sorted(path.name for path in Path(folder).iterdir()))
    saved = {name: value.clone() for name, value in engine.module.state_dict().items()}
    run_steps(engine, 1)
    _, state = engine.load_checkpoint(folder)
    is_last = all(torch.equal(value, saved[name]) for name, value in engine.module.state_dict().items())
    engine.destroy()
    dist.barrier()
    return names, state["steps"], is_last, sorted(path.name for path in Path(folder).iterdir())
