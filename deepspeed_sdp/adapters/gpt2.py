"""GPT-2: neurons and heads; queries, keys and values of all heads lie one after the other in one ``Conv1D``."""

import math
from dataclasses import replace
from typing import ClassVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from deepspeed_sdp.adapters.base import PartitionedModule, attention_flops, inputs_of, outputs_of
from deepspeed_sdp.adapters.transformer import DecoderAdapter, attention_of, keeps_output, mlp_of, neurons_of


class GPT2Adapter(DecoderAdapter):
    """See the module."""

    name = "gpt2"
    families = ("GPT2",)
    layers_name = "transformer.h"
    branches: ClassVar = {"attention": ("attn", "ln_1"), "mlp": ("mlp", "ln_2")}
    linears: ClassVar = {"attention": ("c_attn", "c_proj"), "mlp": ("c_fc", "c_proj")}

    def is_known_layer(self, layer: nn.Module) -> bool:
        """Whether it is without cross-attention, with thirds for queries, keys and values, and counts heads by width.

        GPTBigCode and ImageGPT have the same names.
        """
        attention = layer.get_submodule("attn")
        fused = attention.get_submodule("c_attn")
        is_in_thirds = isinstance(fused, Conv1D) and fused.nf == 3 * getattr(attention, "split_size", 0)
        return is_in_thirds and not hasattr(layer, "crossattention") and not hasattr(attention, "_split_heads")

    def attention(self, name: str, index: int, attention: nn.Module, length: int) -> PartitionedModule:
        size = int(attention.head_dim)  # type: ignore[arg-type]
        fused, dense = (attention.get_submodule(linear) for linear in self.linears["attention"])
        tensors = (
            *outputs_of(f"{name}.c_attn", fused, size, groups=3),
            *inputs_of(f"{name}.c_proj", dense, size, is_input_kept=keeps_output(attention)),
        )
        heads = int(attention.num_heads)  # type: ignore[arg-type]
        made = attention_of(name, index, heads, attention, tensors, attention_flops(1, size, length))
        return replace(made, widths=(("split_size", size),))

    def mlp(self, name: str, index: int, mlp: nn.Module) -> PartitionedModule:
        return mlp_of(name, index, mlp, neurons_of(name, mlp, *self.linears["mlp"]))

    def init_scale(self, model: nn.Module, parameter: str) -> float:
        """GPT-2's smaller start of what adds to the residual stream, which is said for the branch as a whole."""
        layers: int = model.config.n_layer  # type: ignore[union-attr,assignment]
        return 1.0 / math.sqrt(2 * layers) if parameter.endswith(".c_proj.weight") else 1.0
