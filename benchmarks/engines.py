"""What the benchmarks of the engine share: the model, engines to run side by side, and the report."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_sdp
from deepspeed_sdp.engine import start_communication
from deepspeed_sdp.options import OptionParser

Rows = list[dict[str, Any]]


def make_parser(description: str | None, *, hidden_size: int, layers: int, vocab_size: int) -> argparse.ArgumentParser:
    """Options of every benchmark, with the defaults of one."""
    parser = OptionParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--hidden_size", type=int, default=hidden_size)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--vocab_size", type=int, default=vocab_size)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--local_rank", type=int, default=-1)
    return parser


def is_possible(stage: int, sdp: dict[str, Any] | None) -> bool:
    """Whether the engine takes this block at this ZeRO stage."""
    impossible = {0: ("comm", {"transport": "all_to_all"}), 3: ("masking", "backward")}.get(stage)
    return impossible not in (sdp or {}).items()


def start() -> None:
    """Once per process, before the first engine."""
    torch.set_num_threads(1)
    start_communication()
    deepspeed.utils.logger.setLevel("ERROR")


def build_llama(args: argparse.Namespace, head_size: int) -> LlamaForCausalLM:
    """The full model, the same on all ranks."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // head_size,
            num_key_value_heads=args.hidden_size // head_size,
            use_cache=False,
        )
    )


def build_engine(model: LlamaForCausalLM, config: dict[str, Any], sdp: dict[str, Any] | None) -> Any:
    """An engine with Adam: SDP's, or plain DeepSpeed's where ``sdp`` is ``None``."""
    config = {
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        **config,
    }
    if sdp is None:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    else:
        engine, *_ = deepspeed_sdp.initialize(model=model, config=config, sdp_config=sdp)
    return engine


def step(engine: Any, ids: torch.Tensor) -> None:
    """Train on ``ids`` ``[batch, length]``."""
    ids = ids.to(engine.device)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def largest(value: float) -> float:
    """Over the ranks."""
    return _over_ranks(value, dist.ReduceOp.MAX)


def mean(value: float) -> float:
    """Over the ranks."""
    return _over_ranks(value, dist.ReduceOp.SUM) / dist.get_world_size()


def _over_ranks(value: float, op: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(tensor, op=op)
    return float(tensor)


def report(args: argparse.Namespace, rows: Rows, table: Callable[[Rows], str]) -> None:
    """The end: rank 0 prints ``table``, and writes ``rows`` and what they were measured with to ``--output``."""
    if dist.get_rank() == 0:
        print(table(rows))
        if args.output:
            args.output.write_text(json.dumps({"settings": _describe(args), "rows": rows}, indent=1) + "\n")
    # Threads of a group that is still there when the interpreter ends can abort the process.
    dist.destroy_process_group()


def _describe(args: argparse.Namespace) -> dict[str, Any]:
    settings = {
        key: value
        for key, value in vars(args).items()
        if key != "local_rank" and not isinstance(value, Path) and value is not None
    }
    return {
        **settings,
        "ranks": dist.get_world_size(),
        "device": get_accelerator().device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
