"""Names that weights have in HuggingFace folders, where they are not the model's own: GPT-NeoX has ``embed_out``."""

from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from deepspeed_sdp.errors import CheckpointError


def saved_names(model: Any) -> dict[str, str]:
    """Name in the model -> name that ``save_pretrained`` gives it, for a model whose weights are renamed and no more.

    Raises:
        CheckpointError: weights of the family are put together or taken apart on the way.
    """
    names = list(model.state_dict())
    # Sizes that tell them apart; nothing else of them matters.
    marked = {name: torch.empty(size, device="meta") for size, name in enumerate(names)}
    saved = revert_weight_conversion(model, marked)
    if sorted(len(value) for value in saved.values()) != list(range(len(names))):
        raise CheckpointError(f"{type(model).__name__}: its files do not hold the model's weights one by one")
    return {names[len(value)]: name for name, value in saved.items()}
