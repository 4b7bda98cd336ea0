"""What a person sees of a job."""

import os
import sys
from collections.abc import Mapping
from typing import Any


def quiet(verbose: bool) -> None:
    """Keep DeepSpeed's and the tokenizers' log off the progress bar. Before torch is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        import logging
        import warnings

        os.environ.setdefault("DS_LOG_LEVEL", "error")
        # Ranks of a job that fails lose each other: torch would warn of it with stacks of C++ calls beside the error.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        from transformers.utils import logging as transformers_logging

        log: Any = transformers_logging
        log.set_verbosity_error()
        log.disable_progress_bar()


def say(rows: Mapping[str, str]) -> None:
    """Print :func:`in_lines`, on rank 0."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(in_lines(rows), flush=True)


def in_lines(rows: Mapping[str, str]) -> str:
    """A ``name  text`` line for each."""
    return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


def progress_bar(steps: int, rank: int, done: int) -> Any:
    """A bar over optimizer steps, of rank 0. In a file it is renewed once a minute."""
    from tqdm import tqdm

    return tqdm(
        total=steps,
        initial=done,
        disable=rank != 0,
        desc="train",
        unit="step",
        dynamic_ncols=True,
        mininterval=1.0 if sys.stderr.isatty() else 60.0,
    )
