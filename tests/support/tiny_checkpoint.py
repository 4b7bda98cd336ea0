"""Checkpoints that no job wrote: whole and small, to be changed; and what readers say of them."""

import functools
import json

import torch
from safetensors.torch import save_file

from deepspeed_sdp.checkpoint import Entry, Region, open_checkpoint
from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.subnetwork import plan_for
from tests.support.models import tiny_model

RANKS = 2
BLOCK = {"coverage": 0.5, "num_subnetworks": 2, "output_scaling": "none"}


@functools.cache
def _model():
    torch.manual_seed(0)
    return tiny_model("llama", num_hidden_layers=1, hidden_size=16, vocab_size=23, head_dim=2, intermediate_size=8)


def tensors():
    """The logical tensors that are in it."""
    found = {}
    for name, value in _model().named_parameters():
        found[f"master.{name}"] = value.detach()
        found[f"optimizer.exp_avg.{name}"] = 0.5 * value.detach()
    return found


def content():
    """What is in each file: JSON data, tensors, or what is pickled."""
    sdp, model = SDPConfig.parse(BLOCK), _model()
    plan = plan_for(model, sdp, RANKS)
    index = {}
    files = {f"tensors-{rank:05d}-000.safetensors": {} for rank in range(RANKS)}
    for name, value in tensors().items():
        cut = (len(value) + 1) // 2
        chunks = []
        for number, (start, stop) in enumerate(((0, cut), (cut, len(value)))):
            part = value[start:stop].contiguous()
            places = [{"file": file, "key": f"{name}-{number}"} for file in sorted(files)]
            for place in places:
                files[place["file"]][place["key"]] = part
            first, *copies = places if number == 0 else places[::-1]
            offsets = [start] + [0] * (value.dim() - 1)
            chunks.append({"offsets": offsets, "sizes": list(part.shape), **first, "copies": copies})
        index[name] = {"dtype": "float32", "shape": list(value.shape), "chunks": chunks}
    meta = {
        **dict.fromkeys(("global_steps", "global_samples", "micro_steps", "skipped_steps"), 3),
        "world_size": RANKS,
        "zero_stage": 1,
        "dtype": "float32",
        "optimizer": "AdamW",
        "optimizer_state": ["exp_avg"],
        "plan_hash": plan.hash,
        "subnetwork_data_parallel": sdp.model_dump(mode="json"),
        "model_class": type(model).__name__,
        "model_config": model.config.to_dict(),
        "versions": {"torch": "2", "deepspeed": "0", "transformers": "5"},
    }
    scaler = {"class": "LossScaler", "state": {"cur_scale": 1.0}}
    state = {
        "client_state": {},
        "optimizer_groups": [{"lr": 0.1}],
        "optimizer_scalars": {"step": {"value": 3.0, "dtype": "float32"}},
        "lr_scheduler": None,
        "loss_scaler": scaler,
    }
    return {
        **files,
        **{f"rank-{rank:05d}.pt": {"random": {}} for rank in range(RANKS)},
        "index.json": index,
        "meta.json": json.loads(json.dumps(meta)),
        "plan.json": json.loads(plan.to_json()),
        "state.pt": state,
    }


def write_tiny(folder, tag="t", steps=3, change=lambda files: None):
    """A checkpoint whose checksums hold, whatever ``change`` did to it; text and bytes are written as they are."""
    files = content()
    files["meta.json"]["global_steps"] = steps
    change(files)
    staging = folders.begin(folder, tag)
    for name, value in files.items():
        if isinstance(value, bytes):
            (staging / name).write_bytes(value)
        elif isinstance(value, str):
            (staging / name).write_text(value)
        elif name.endswith(".json"):
            (staging / name).write_text(json.dumps(value))
        elif name.endswith(".pt"):
            torch.save(value, staging / name)
        else:
            save_file(value, staging / name)
    folders.finish(staging, folder / tag, {name: folders.describe_file(staging / name) for name in files})
    return folder / tag


def change_manifest(checkpoint, change):
    """Let the manifest say something else; its own checksum holds."""
    body = json.loads((checkpoint / folders.MANIFEST).read_text())
    del body["sha256"]
    change(body)
    (checkpoint / folders.MANIFEST).write_text(json.dumps({**body, "sha256": folders._digest(body)}))


def load_tiny(folder):
    """Collective. Its tensors, as a job with one rank reads them."""
    checkpoint = open_checkpoint(folder, None)
    checkpoint.state()
    checkpoint.rank_state(0)
    values = {name: torch.full_like(value, float("nan")) for name, value in tensors().items()}
    entries = [
        Entry(name, tuple(value.shape), Region((0,) * value.dim(), tuple(value.shape)), value)
        for name, value in values.items()
    ]
    checkpoint.read(entries)
    return values
