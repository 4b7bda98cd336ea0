"""A sentencepiece tokenizer, trained on the text at hand and saved as an ordinary HuggingFace tokenizer."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deepspeed_sdp.errors import DataError

# More text does not make a better small vocabulary, only a slower start.
_TRAINING_CHARACTERS = 4_000_000
# sentencepiece passes over longer lines without a word.
_LINE_BYTES = 1 << 16
# An embedding has a row for every id up to the largest, in use or not; what is reserved lies just above the vocabulary.
_MOST_GAPS = 4
_MOST_ENTRIES_ADDED = 1 << 16
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
    "add_prefix_space": False,
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "</s>",
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(documents: Sequence[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerBase:
    """Train a BPE tokenizer with byte fallback and save it into ``folder``; ``decode(encode(text)) == text``.

    The one exception is U+2581, sentencepiece's own sign for a blank, which decodes to a blank.

    Raises:
        DataError: the text does not support so large (or so small) a vocabulary.
    """
    import sentencepiece

    if vocab_size < 1:
        raise DataError(f"--vocab_size: got {vocab_size}; takes a positive number")
    with tempfile.TemporaryDirectory() as staging:
        prefix = Path(staging, "tokenizer")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(documents),
                model_prefix=str(prefix),
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                character_coverage=0.9995,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                add_dummy_prefix=False,
                split_digits=True,
                user_defined_symbols=["\n"],
                max_sentence_length=_LINE_BYTES,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise DataError(f"--vocab_size: got {vocab_size}; {_reason(str(error))}") from None
        prefix.with_suffix(".model").rename(Path(staging, "tokenizer.model"))
        Path(staging, "tokenizer_config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        tokenizer = load_tokenizer(Path(staging))
        tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A HuggingFace tokenizer from a local folder.

    Raises:
        DataError: there is none, it has no vocabulary, or no end-of-sequence token, which separates documents.
    """
    if not folder.is_dir():
        raise DataError(
            f"--tokenizer: {folder} is no folder; takes one with a HuggingFace tokenizer, or OWNER/NAME of the hub"
        )
    return _load(str(folder), local_files_only=True)


def find_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A HuggingFace tokenizer from a local folder, or else by its name on the hub (``OWNER/NAME``).

    Raises:
        DataError: as :func:`load_tokenizer`, or the hub cannot be reached.
    """
    is_of_hub = not Path(name).exists() and _HUB_NAME.fullmatch(name)
    return _load(name) if is_of_hub else load_tokenizer(Path(name))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what turns text into ids, the same whichever folder it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:
        # Left over from the last call, and of no effect on documents.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    state = [rules, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs: one more than the largest id, which ``len(tokenizer)`` is not where ids are left
    out.
    """
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def _load(folder: str, **options: Any) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # damaged files raise almost anything, Rust's errors included
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"--tokenizer: {folder} holds no HuggingFace tokenizer: {reason}") from None
    # transformers makes an empty tokenizer of a folder that lacks the vocabulary.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise DataError(f"--tokenizer: {folder} holds no vocabulary (tokenizer.json or the like)")
    entries, largest = len(tokenizer.get_vocab()), vocab_size(tokenizer)
    if largest > _MOST_GAPS * entries + _MOST_ENTRIES_ADDED:
        raise DataError(f"--tokenizer: {folder} has ids up to {largest - 1} for {entries} entries")
    if tokenizer.eos_token_id is None:
        raise DataError(f"--tokenizer: {folder} has no end-of-sequence token, which separates documents")
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _lines(documents: Sequence[str]) -> Iterator[str]:
    # Evenly spread over the text, whose parts differ.
    stride = max(1, sum(map(len, documents)) // _TRAINING_CHARACTERS)
    for text in documents[::stride]:
        # No single document makes up more than a quarter.
        step = 1 + 4 * len(text) // _TRAINING_CHARACTERS
        yield from islice(_pieces(text), 0, None, step)


def _pieces(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        yield from (line[start : start + _LINE_BYTES // 4] for start in range(0, len(line), _LINE_BYTES // 4))


def _reason(message: str) -> str:
    limit = re.search(r"value <= (\d+)", message)
    if limit:
        return f"the text supports at most {limit[1]}"
    required = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if required:
        return f"the characters of the text alone need {required[1]}; takes at least that"
    if "sentences_.empty" in message:
        return "the text holds no line to learn from"
    return message.strip().splitlines()[-1]
