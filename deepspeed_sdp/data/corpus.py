"""Text, tokenizer and packed sequences of a run, prepared once and reloaded after."""

import hashlib
import json
import os
import platform
import secrets
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from deepspeed_sdp.data.builtin_text import builtin_documents
from deepspeed_sdp.data.packing import Tokens, pack, tokenize_documents, unigram_loss
from deepspeed_sdp.data.split import split_documents
from deepspeed_sdp.data.text_files import read_documents
from deepspeed_sdp.data.tokenizer import load_tokenizer, train_tokenizer
from deepspeed_sdp.errors import DataError, OutputError

# Changes with what is made of the same text.
_FORMAT = 2
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CorpusSpec:
    """What a corpus is made from; a prepared one is reused while this stays the same."""

    text_files: tuple[str, ...]
    tokenizer: str | None
    vocab_size: int
    seq_length: int
    holdout_fraction: float
    max_bytes: int

    def fingerprint(self) -> str:
        """Changes with the arguments, the files behind them, and the packages that the built-in text is from.

        Of a folder only the files directly in it count: a run may write its own below it.
        """
        state: dict[str, Any] = {"format": _FORMAT, **asdict(self)}
        state["files"] = [_stat(Path(path)) for path in (*self.text_files, *filter(None, [self.tokenizer]))]
        if not self.text_files:
            state["python"] = platform.python_version()
            state["packages"] = sorted(f"{d.name} {d.version}" for d in metadata.distributions())
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """A prepared text.

    Attributes:
        tokenizer_folder: a HuggingFace tokenizer.
        train, heldout: packed sequences, int32 ``[n, T]``, mapped from disk.
        unigram_val_loss: entropy baseline on ``heldout``, nats per token.
    """

    tokenizer_folder: Path
    train: Tokens
    heldout: Tokens
    unigram_val_loss: float

    @property
    def train_tokens(self) -> int:
        """Tokens to train on."""
        return int(self.train.size)

    @property
    def heldout_tokens(self) -> int:
        """Tokens held out."""
        return int(self.heldout.size)


def prepare_corpus(folder: Path, spec: CorpusSpec, *, progress: bool = False) -> Corpus:
    """Prepare ``folder``, or reuse what an earlier run left there for the same ``spec``. For one process.

    Raises:
        DataError: unusable text or tokenizer.
        OutputError: ``folder`` cannot be written.
    """
    folder = folder.resolve()
    fingerprint = spec.fingerprint()
    if _is_prepared(folder, fingerprint):
        return load_corpus(folder)
    staging = None
    try:
        staging = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
        staging.mkdir(parents=True)
        _build(staging, spec, fingerprint, progress)
        if folder.exists():
            _remove_prepared(folder)
        os.replace(staging, folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"--data_cache: cannot write {folder}: {error.strerror or error}") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return load_corpus(folder)


def load_corpus(folder: Path) -> Corpus:
    """A corpus that :func:`prepare_corpus` left in ``folder``.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        train = np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False)
        heldout = np.load(folder / "heldout.npy", mmap_mode="r", allow_pickle=False)
        return Corpus(folder / "tokenizer", train, heldout, float(manifest["unigram_val_loss"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise DataError(f"--data_cache: {folder} holds no prepared text on this node: {error}") from None


def _build(staging: Path, spec: CorpusSpec, fingerprint: str, progress: bool) -> None:
    files = [Path(path) for path in spec.text_files]
    documents = read_documents(files) if files else builtin_documents(spec.max_bytes)
    train_documents, heldout_documents = split_documents(documents, spec.holdout_fraction)
    if spec.tokenizer is None:
        tokenizer = train_tokenizer(train_documents, spec.vocab_size, staging / "tokenizer")
    else:
        tokenizer = load_tokenizer(Path(spec.tokenizer))
        tokenizer.save_pretrained(staging / "tokenizer")
    train = pack(tokenize_documents(tokenizer, train_documents, progress=progress), spec.seq_length)
    heldout = pack(
        tokenize_documents(tokenizer, heldout_documents, progress=progress), spec.seq_length, "the held-out part"
    )
    np.save(staging / "train.npy", train)
    np.save(staging / "heldout.npy", heldout)
    manifest = {
        "fingerprint": fingerprint,
        "spec": asdict(spec),
        "documents": {"train": len(train_documents), "heldout": len(heldout_documents)},
        "bytes": sum(len(text.encode()) for text in documents),
        "sequences": {"train": len(train), "heldout": len(heldout)},
        "unigram_val_loss": unigram_loss(train, heldout, len(tokenizer)),
    }
    (staging / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _is_prepared(folder: Path, fingerprint: str) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        corpus = load_corpus(folder)
        load_tokenizer(corpus.tokenizer_folder)
    except (OSError, ValueError, DataError):
        return False
    sizes = {"train": len(corpus.train), "heldout": len(corpus.heldout)}
    return bool(manifest.get("fingerprint") == fingerprint and manifest.get("sequences") == sizes)


def _remove_prepared(folder: Path) -> None:
    """Delete an outdated corpus, and nothing that is something else."""
    known = {_MANIFEST, "train.npy", "heldout.npy", "tokenizer"}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in known)
    if foreign:
        raise OutputError(f"--data_cache: {folder} holds other files ({foreign[0]}); takes a new or a prepared folder")
    shutil.rmtree(folder)


def _stat(path: Path) -> list[Any]:
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    except OSError:
        return []  # reported by who reads it
