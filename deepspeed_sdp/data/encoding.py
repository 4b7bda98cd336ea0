"""Documents to token ids, for shards and on the fly alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from deepspeed_sdp.data.tokenizer import vocab_size
from deepspeed_sdp.errors import DataError

Ids = npt.NDArray[Any]
#: Text, or the ids that it was tokenised to elsewhere.
Document = str | Ids


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

    def __call__(self, documents: Sequence[Document]) -> list[Ids]:
        """Ids ``[tokens]`` of each document, in :attr:`dtype`. Tokenised ones get the BOS and EOS that they lack.

        Raises:
            DataError: an id is past the tokenizer's largest.
        """
        encoded = iter(self._encode([document for document in documents if isinstance(document, str)]))
        return [next(encoded) if isinstance(document, str) else self._whole(document) for document in documents]

    def text(self, document: Document) -> str:
        """A document's text, of which its hash is taken.

        Raises:
            DataError: an id is past the tokenizer's largest.
        """
        if isinstance(document, str):
            return document
        ids = self._checked(document).tolist()
        ids = ids[1:] if ids[0] == self.tokenizer.bos_token_id and len(ids) > 1 else ids
        ids = ids[:-1] if ids[-1] == self.eos_token_id else ids
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _whole(self, ids: Ids) -> Ids:
        begin = self.prefix if ids[0] != self.tokenizer.bos_token_id else []
        end = [self.eos_token_id] if ids[-1] != self.eos_token_id else []
        return np.concatenate([begin, self._checked(ids), end], dtype=self.dtype, casting="unsafe")

    def _checked(self, ids: Ids) -> Ids:
        if ids.max() >= self.vocab_size:
            raise DataError(
                f"--tokenizer: got one of {self.vocab_size} ids, and documents that are tokenised hold {ids.max()}; "
                "takes the one that they were tokenised with"
            )
        return ids

    def _encode(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        if self._backend is not None:
            encoded = [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [np.array([*self.prefix, *ids, self.eos_token_id], dtype=self.dtype) for ids in encoded]
