"""GPT-NeoX and Pythia: neurons and heads; each head has its queries, keys and values side by side in one linear."""

from typing import ClassVar

from torch import nn

from deepspeed_sdp.adapters.base import PartitionedLinear, PartitionedModule, attention_flops, features_of
from deepspeed_sdp.adapters.decoder import DecoderAdapter, attention_of, keeps_output, mlp_of


class GPTNeoXAdapter(DecoderAdapter):
    """See the module. Whether both branches read the layer's input (``use_parallel_residual``) makes no difference."""

    name = "gpt_neox"
    families = ("GPTNeoX",)
    layers_name = "gpt_neox.layers"
    branches: ClassVar = {"attention": ("attention", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
    linears: ClassVar = {"attention": ("query_key_value", "dense"), "mlp": ("dense_h_to_4h", "dense_4h_to_h")}

    def is_known_layer(self, layer: nn.Module) -> bool:
        return hasattr(layer, "use_parallel_residual")

    def attention(self, name: str, index: int, attention: nn.Module, seq_length: int) -> PartitionedModule:
        size = int(attention.head_size)  # type: ignore[arg-type]
        heads = features_of(attention.get_submodule("dense"))[0] // size
        linears = (
            PartitionedLinear("query_key_value", "out", 3 * size),
            PartitionedLinear("dense", "in", size, is_input_kept=keeps_output(attention)),
        )
        return attention_of(name, index, heads, attention, linears, attention_flops(1, size, seq_length))

    def mlp(self, name: str, index: int, mlp: nn.Module) -> PartitionedModule:
        linears = (PartitionedLinear("dense_h_to_4h", "out", 1), PartitionedLinear("dense_4h_to_h", "in", 1))
        return mlp_of(name, index, mlp, linears)
