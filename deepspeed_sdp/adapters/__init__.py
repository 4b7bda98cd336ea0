"""Model families that can be partitioned. A new family is one file here and one line in ``ADAPTERS``."""

from torch import nn

from deepspeed_sdp.adapters.base import Adapter, Block, BlockUnit, Layer, PartitionedModule, PartitionedTensor
from deepspeed_sdp.adapters.gpt2 import GPT2Adapter
from deepspeed_sdp.adapters.gpt_neox import GPTNeoXAdapter
from deepspeed_sdp.adapters.llama import LlamaAdapter
from deepspeed_sdp.errors import ModelError

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Block",
    "BlockUnit",
    "Layer",
    "PartitionedModule",
    "PartitionedTensor",
    "find_adapter",
]

ADAPTERS: tuple[Adapter, ...] = (LlamaAdapter(), GPT2Adapter(), GPTNeoXAdapter())


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter that knows ``model``.

    Raises:
        ModelError: none does; the message lists the known families.
    """
    for adapter in ADAPTERS:
        if adapter.knows(model):
            return adapter
    known = "; ".join(f"{adapter.name} ({', '.join(adapter.families)})" for adapter in ADAPTERS)
    raise ModelError(
        f"model: no adapter knows {type(model).__name__}; known families: {known}. A family is known by the names of "
        "its layers and linears, which must be plain torch.nn.Linear (or transformers' Conv1D)"
    )
