"""GPT-NeoX and Pythia: neurons and heads; each head has its queries, keys and values side by side in one linear."""

from typing import ClassVar

from torch import nn

from deepspeed_sdp.adapters.base import PartitionedModule, attention_flops, features_of, inputs_of, outputs_of
from deepspeed_sdp.adapters.transformer import DecoderAdapter, attention_of, keeps_output, mlp_of, neurons_of


class GPTNeoXAdapter(DecoderAdapter):
    """See the module. Whether both branches read the layer's input (``use_parallel_residual``) makes no difference."""

    name = "gpt_neox"
    families = ("GPTNeoX",)
    layers_name = "gpt_neox.layers"
    branches: ClassVar = {"attention": ("attention", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
    linears: ClassVar = {"attention": ("query_key_value", "dense"), "mlp": ("dense_h_to_4h", "dense_4h_to_h")}

    def is_known_layer(self, layer: nn.Module) -> bool:
        return hasattr(layer, "use_parallel_residual")

    def attention(self, name: str, index: int, attention: nn.Module, length: int) -> PartitionedModule:
        size = int(attention.head_size)  # type: ignore[arg-type]
        fused, dense = (attention.get_submodule(linear) for linear in self.linears["attention"])
        tensors = (
            *outputs_of(f"{name}.query_key_value", fused, 3 * size),
            *inputs_of(f"{name}.dense", dense, size, is_input_kept=keeps_output(attention)),
        )
        heads = features_of(dense)[0] // size
        return attention_of(name, index, heads, attention, tensors, attention_flops(1, size, length))

    def mlp(self, name: str, index: int, mlp: nn.Module) -> PartitionedModule:
        return mlp_of(name, index, mlp, neurons_of(name, mlp, *self.linears["mlp"]))
