"""``estimate``: what a job would need, on GPUs that need not be there."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeed_sdp.cli.options import coverage, listed, written
from deepspeed_sdp.config import BLOCK, default_subnetworks, read_block, read_json
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.presets import model_path, preset_names

if TYPE_CHECKING:
    from deepspeed_sdp.cli.options import Commands
    from deepspeed_sdp.estimate import Job
    from deepspeed_sdp.estimate.gpu import Cluster
    from deepspeed_sdp.pretraining.recipe import Run


def add_commands(commands: "Commands") -> None:
    """Add what this file holds."""
    own = commands.add_parser(
        "estimate",
        help="memory, FLOPs, traffic and step time of a job before it runs",
        description="Compares plain DeepSpeed and SDP with every combination; narrowed by the options that say which.",
    )
    add = own.add_argument
    add("--model", help="HuggingFace config.json, a folder with one, or a preset: " + ", ".join(preset_names()))
    own_settings = own.add_mutually_exclusive_group()
    own_settings.add_argument("--deepspeed_config", metavar="JSON", help="a job's own settings; its row comes first")
    own_settings.add_argument(
        "--recipe", metavar="RECIPE", help="instead: all of a job, model and length of its sequences too"
    )
    add("--sdp_config", metavar="JSON", help="the SDP block of that job, if not in its DeepSpeed config")
    add("--gpus", type=int, default=8, metavar="N", help="ranks (default: 8)")
    add("--num_subnetworks", type=int, metavar="N", help="workers; default: the largest divisor of the ranks up to 8")
    add("--micro_batch_size", type=int, metavar="B", help="sequences of a rank in one pass (default: 1)")
    add("--seq_length", type=int, metavar="T", help="tokens of a sequence (default: 2048)")
    add("--gradient_accumulation_steps", type=int, metavar="G", help="micro-batches of a step (default: 1)")
    add("--precision", choices=("bf16", "fp16", "fp32"), help="of weights and activations (default: bf16)")
    add(
        "--activation_checkpointing",
        action="store_true",
        help="compare with it alone, not also without: layers are computed again in the backward pass",
    )
    add("--zero", type=listed(int), metavar="S,S,...", help="ZeRO stages to compare (default: 0,1,2,3)")
    add("--coverage", type=listed(coverage), metavar="C,C,...", help="coverages (default: 1/4 to 3/4 in eighths)")
    add("--masking", choices=("forward", "backward"), help="one kind of masking")
    add("--granularity", choices=("neuron", "branch", "layer"), help="one kind of unit (default: neuron and layer)")
    add("--gpu", default="h100", metavar="NAME", help="of the package's table (default: h100)")
    add("--gpu_memory_gb", type=float, metavar="GB", help="instead of the table's")
    add("--gpu_tflops", type=float, metavar="T", help="dense, instead of the table's")
    add("--gpu_bandwidth_gb_s", type=float, metavar="GB/S", help="of its memory, instead of the table's")
    add("--link_gb_s", type=float, metavar="GB/S", help="a GPU sends within a node, instead of the table's")
    add("--network_gb_s", type=float, default=50.0, metavar="GB/S", help="a GPU sends to other nodes (default: 50)")
    add("--gpus_per_node", type=int, default=8, metavar="N", help="(default: 8)")
    add("--mfu", type=float, default=0.4, metavar="F", help="share of its FLOPs that the GPU reaches (default: 0.4)")
    add(
        "--reserved_gb",
        type=float,
        default=2.0,
        metavar="GB",
        help="CUDA context, default group, fragmentation (default: 2)",
    )
    add("--all", action="store_true", help="a row for every ZeRO stage, not the best one alone")
    add("--top", type=int, metavar="N", help="only the N quickest rows that fit")
    add("--json", action="store_true", help="print every estimate as JSON")
    add("--out", type=Path, metavar="FILE", help="write the JSON")
    add("--plot", type=Path, metavar="PNG", help="draw memory by kind, and memory against step time")
    own.set_defaults(run=_estimate)


def _estimate(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from deepspeed_sdp.estimate import (
        Estimator,
        best_stages,
        choice_of,
        compare,
        plot_estimates,
        ranked,
        strategies,
        to_table,
    )
    from deepspeed_sdp.pretraining.recipe import read_recipe
    from deepspeed_sdp.subnetwork import meta_model, read_model_config

    _check(args)
    recipe = read_recipe(args.recipe) if args.recipe else None
    ds_config = recipe.ds_config if recipe else {}
    if args.deepspeed_config:
        ds_config = read_json(args.deepspeed_config, "--deepspeed_config")
    if args.sdp_config:
        ds_config = {**ds_config, BLOCK: read_block(args.sdp_config, "--sdp_config")}
    if not (args.model or recipe):
        raise ConfigError("--model: got none, and no --recipe; takes a config or a preset")
    file = model_path(args.model, "--model") if args.model or not recipe else recipe.model_file
    name = args.model or (recipe.model.path if recipe else "")
    full = meta_model(read_model_config(file, "--model"), "--model")
    cluster = _cluster(args)
    estimator = Estimator(full, cluster)
    job, workers = _job(args, ds_config, recipe)
    checkpointing = (True,) if args.activation_checkpointing else (False, True)
    own = [choice_of(estimator, job, checkpointing)] if ds_config else []
    jobs = list(strategies(replace(job, sdp=None), workers, **_narrowed(args)))
    choices, refused = compare(estimator, _shown_as_they_go(jobs), checkpointing)
    estimates = [estimate for choice in choices for estimate in choice.variants]
    data = {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in full.parameters()),
        "gpu": cluster.gpu.name,
        "job": estimator.estimate(job).to_json() if own else None,
        "estimates": [estimate.to_json() for estimate in estimates],
        "refused": refused,
    }
    shown = ranked(choices if args.all else best_stages(choices))
    if args.top:
        fitting = [choice for choice in shown if choice.fits]
        if not fitting:
            refused.append(f"Nothing fits on a {cluster.gpu.name}; shown is what takes least.")
        shown = (fitting or shown)[: args.top]
    title = _title(name, data["parameters"], job, workers, cluster)
    print(json.dumps(data, indent=2) if args.json else "\n\n".join([title, to_table(shown, own), *refused, _NOTE]))
    if args.out:
        written(args.out, lambda path: path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8"))
    if args.plot:
        bars = [choice.best for choice in (*own, *shown)]
        written(args.plot, lambda path: plot_estimates(bars, [*bars[: len(own)], *estimates], cluster, title, path))


def _shown_as_they_go(jobs: Sequence["Job"]) -> Iterable["Job"]:
    """A bar on a terminal, elsewhere a line; never among the figures."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        print(f"estimating {len(jobs)} strategies ...", file=sys.stderr, flush=True)
    return tqdm(jobs, desc="estimate", unit="strategy", leave=False, disable=None)


_NOTE = (
    "GB per GPU, of the heaviest rank: the most of each kind in a step, and the most of all at one moment (peak). "
    "PFLOP, GB sent and ms per step. ckpt: with activation checkpointing. "
    "What fits comes first, the quickest first; * best of what fits. "
    "Step times are a roofline: docs/estimate.md has what is assumed."
)


def _title(name: str, parameters: Any, job: "Job", workers: int, cluster: "Cluster") -> str:
    return (
        f"{name}, {parameters / 1e9:.2f}B parameters, {job.world_size} x {cluster.gpu.name}, {workers} subnetworks, "
        f"{job.micro_batch} x {job.seq_length} tokens x {job.accumulation}, {str(job.dtype).removeprefix('torch.')}"
        + f", buckets of {job.round_numel:,} elements"
    )


def _check(args: argparse.Namespace) -> None:
    for key in (
        "gpus", "num_subnetworks", "micro_batch_size", "seq_length", "gradient_accumulation_steps", "gpus_per_node",
        "top",
    ):  # fmt: skip
        value = getattr(args, key)
        low = 2 if key == "seq_length" else 1
        if value is not None and value < low:
            raise ConfigError(f"--{key}: got {value}; takes a number from {low} on")
    for key in ("gpu_memory_gb", "gpu_tflops", "gpu_bandwidth_gb_s", "link_gb_s", "network_gb_s", "mfu"):
        value = getattr(args, key)
        if value is not None and not value > 0:
            raise ConfigError(f"--{key}: got {value}; takes a number above 0")
    for stage in args.zero or ():
        if stage not in (0, 1, 2, 3):
            raise ConfigError(f"--zero: got {stage}; takes 0, 1, 2 or 3")
    if args.num_subnetworks is not None and args.gpus % args.num_subnetworks:
        raise ConfigError(
            f"--num_subnetworks: got {args.num_subnetworks}; takes a divisor of --gpus, which is {args.gpus}"
        )


def _cluster(args: argparse.Namespace) -> "Cluster":
    from deepspeed_sdp.estimate.gpu import Cluster, find_gpu

    gpu = find_gpu(
        args.gpu,
        memory_gb=args.gpu_memory_gb,
        tflops=args.gpu_tflops,
        bandwidth_gb_s=args.gpu_bandwidth_gb_s,
        link_gb_s=args.link_gb_s,
    )
    return Cluster(gpu, args.gpus_per_node, 1e9 * args.network_gb_s, args.mfu, reserved=1e9 * args.reserved_gb)


def _job(args: argparse.Namespace, ds_config: dict[str, Any], recipe: "Run | None") -> tuple["Job", int]:
    """The settings that all strategies share, and how many workers there are."""
    from dataclasses import replace

    from deepspeed_sdp.estimate import Job
    from deepspeed_sdp.estimate.job import DTYPES
    from deepspeed_sdp.estimate.job_file import job_of

    is_cpu = args.gpu.lower() == "cpu"
    job = Job(args.gpus, backend="gloo" if is_cpu else "nccl", step_temporaries=2 if is_cpu else 0)
    if recipe:
        checkpointing = recipe.model.activation_checkpointing
        job = replace(job, seq_length=recipe.data.seq_length, checkpointing=checkpointing)
    job = job_of(ds_config, job)
    asked = {
        "micro_batch": args.micro_batch_size,
        "seq_length": args.seq_length,
        "accumulation": args.gradient_accumulation_steps,
        "dtype": DTYPES[args.precision] if args.precision else None,
        "checkpointing": args.activation_checkpointing or None,
    }
    job = replace(job, **{key: value for key, value in asked.items() if value is not None})
    workers = args.num_subnetworks or (job.sdp.num_subnetworks if job.sdp else None) or default_subnetworks(args.gpus)
    if args.gpus % workers:
        raise ConfigError(f"{BLOCK}.num_subnetworks: got {workers}; takes a divisor of --gpus, which is {args.gpus}")
    return job, workers


def _narrowed(args: argparse.Namespace) -> dict[str, Any]:
    chosen = {
        "stages": args.zero,
        "maskings": args.masking and (args.masking,),
        "granularities": args.granularity and (args.granularity,),
        "coverages": args.coverage,
    }
    return {key: value for key, value in chosen.items() if value}
