"""The text of a recipe: shards that were prepared."""

from pathlib import Path

import numpy as np

from deepspeed_sdp.data import load_tokenizer, open_shards, unigram_loss, vocab_size
from deepspeed_sdp.errors import DataError
from deepspeed_sdp.pretraining.recipe import Recipe
from deepspeed_sdp.pretraining.text import PackedText, Text

# Enough for the frequencies of tokens.
_COUNTED_SEQUENCES = 4096


def open_text(folder: Path, recipe: Recipe) -> Text:
    """The shards in a folder, as ``deepspeed-sdp data`` leaves them.

    Raises:
        DataError: there are none, fewer tokens than one sequence, or those of another tokenizer.
    """
    about = recipe.about
    shards = open_shards(folder)
    size = vocab_size(load_tokenizer(shards.tokenizer_folder))
    if size != shards.vocab_size:
        raise DataError(f"--data: the manifest of {folder} has {shards.vocab_size} ids; its tokenizer has {size}")
    train = shards.sequences("train", about.seq_length, about.document_reset)
    heldout = shards.sequences("heldout", about.seq_length, about.document_reset)
    stride = max(1, len(train) // _COUNTED_SEQUENCES)
    counted = np.stack([train[i]["input_ids"].numpy() for i in range(0, len(train), stride)])
    measured = np.stack([heldout[i]["input_ids"].numpy() for i in range(min(len(heldout), _COUNTED_SEQUENCES))])
    loss = unigram_loss(counted, measured, shards.vocab_size)
    identity = {
        "shards": shards.manifest["fingerprint"],
        "seq_length": about.seq_length,
        "document_reset": about.document_reset,
    }
    return PackedText(shards.tokenizer_folder, train, heldout, loss, about.seed, identity)
