"""Checkpoints that no job wrote: whole and small, to be changed; and what readers say of them."""

import copy
import functools
import json

import torch
from safetensors.torch import save_file

from deepspeed_sdp.checkpoint import Entry, open_checkpoint, parameter_of, whole
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
    """What is in each file: JSON data, tensors, or what is pickled.

    Both ranks write all of it, the one the first halves and copies of the second, the other the other way round.
    """
    sdp, model = SDPConfig.parse(BLOCK), _model()
    plan = plan_for(model, sdp, RANKS)
    named = list(model.named_parameters())
    runs, halves = [], ([], [])
    for number, (_, value) in enumerate(named):
        rows = len(value) if value.dim() == 2 else 1
        width = value.numel() // rows
        if number % 2 and rows > 1:  # some columns of all rows, as a plan cuts them
            cut = (width + 1) // 2
            runs += [[number, rows, 0, cut, 0, rows * cut], [number, rows, cut, width - cut, 0, rows * (width - cut)]]
            parts = [part.reshape(-1) for part in value.detach().tensor_split([cut], dim=1)]
        else:
            cut = value.numel() // 3
            runs += [[number, rows, 0, width, 0, cut], [number, rows, 0, width, cut, value.numel()]]
            parts = value.detach().reshape(-1).tensor_split([cut])
        for half, part in zip(halves, parts, strict=True):
            half.append(part)
    sizes = [stop - start for *_, start, stop in runs]
    layout = {
        "tensors": {name: list(value.shape) for name, value in named},
        "runs": [runs[2 * n + half] for half in (0, 1) for n in range(len(named))],
        "owners": [[[0, 1], [1, 0]]],
        "sections": [
            {
                "kinds": {"master": "float32", "optimizer.exp_avg": "float32"},
                "buckets": [[0, len(named) * half, len(named), -(-sum(sizes[half::2]) // 2)] for half in (0, 1)],
            }
        ],
    }
    buckets = [torch.cat(half) for half in halves]
    shards = [[bucket[: -(-len(bucket) // 2)], bucket[-(-len(bucket) // 2) :]] for bucket in buckets]
    files = {}
    for rank in range(RANKS):
        tensors = files[f"tensors-{rank:05d}.safetensors"] = {}
        for number in (0, 1):
            flat = torch.cat([of_bucket[rank ^ number] for of_bucket in shards])
            tensors |= {f"{number}.0.master": flat, f"{number}.0.optimizer.exp_avg": 0.5 * flat}
    meta = {
        **dict.fromkeys(("global_steps", "global_samples", "micro_steps", "skipped_steps"), 3),
        "world_size": RANKS,
        "workers": list(range(RANKS)),
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
        **{f"layout-{rank:05d}.json": copy.deepcopy(layout) for rank in range(RANKS)},
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
    described = {name: folders.describe_file(staging / name) for name in files}
    mark = folders.new_mark()
    for rank in range(RANKS):
        of_rank = {name: described.pop(name) for name in folders.files_of(rank) if name in described}
        folders.finish_rank(staging, mark, rank, of_rank)
    folders.finish(staging, folder / tag, folders.Manifest(mark, RANKS, described))
    return folder / tag


def change_manifest(checkpoint, change, name=folders.MANIFEST):
    """Let a manifest say something else; its own checksum holds."""
    body = json.loads((checkpoint / name).read_text())
    del body["sha256"]
    change(body)
    (checkpoint / name).write_text(json.dumps({**body, "sha256": folders._digest(body)}))


def load_tiny(folder):
    """Collective. Its tensors, as a job with one rank reads them."""
    checkpoint = open_checkpoint(folder, None)
    checkpoint.state()
    checkpoint.rank_state(0)
    values = {name: torch.full_like(value, float("nan")) for name, value in tensors().items()}
    entries = [
        Entry(
            logical.removesuffix(f".{parameter_of(logical)}"),
            (whole(parameter_of(logical), value.shape),),
            value.view(-1),
        )
        for logical, value in values.items()
    ]
    checkpoint.read(entries)
    return values
