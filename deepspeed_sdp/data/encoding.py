"""Documents to token ids, for shards and on the fly alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from deepspeed_sdp.data.tokenizer import vocab_size
from deepspeed_sdp.errors import DataError

Ids = npt.NDArray[Any]


class DocumentEncoder:
    """Turns documents into ids, each followed by the end-of-sequence token, and preceded by BOS with ``add_bos``.

    Special tokens that a text spells out are text: the end-of-sequence id stands at the end of documents only.

    Raises:
        DataError: ``add_bos``, and the tokenizer has no such token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos: bool = False) -> None:
        if add_bos and tokenizer.bos_token_id is None:
            raise DataError("--add_bos: the tokenizer has no beginning-of-sequence token")
        self.tokenizer = tokenizer
        self.prefix = [tokenizer.bos_token_id] if add_bos else []
        self.eos_token_id = int(tokenizer.eos_token_id)
        self.vocab_size = vocab_size(tokenizer)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        # Without the wrapper, which makes lists of masks and offsets too.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Ids ``[tokens]`` of each document, in :attr:`dtype`."""
        if not texts:
            return []
        if self._backend is not None:
            encoded = [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        else:
            encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [np.array([*self.prefix, *ids, self.eos_token_id], dtype=self.dtype) for ids in encoded]
