"""Text, tokenizer and packed sequences of a run, prepared once and reloaded after."""

import hashlib
import json
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from deepspeed_sdp.data import manifest as manifests
from deepspeed_sdp.data.builtin_text import builtin_documents
from deepspeed_sdp.data.packing import Tokens, pack, tokenize_documents, unigram_loss
from deepspeed_sdp.data.split import split_documents
from deepspeed_sdp.data.text_files import read_documents
from deepspeed_sdp.data.tokenizer import load_tokenizer, train_tokenizer
from deepspeed_sdp.errors import DataError, OutputError
from deepspeed_sdp.files import begin_folder, replace_folder
from deepspeed_sdp.schemas import Schema, read_object

# Changes with what is made of the same text, or with how it is stored.
_FORMAT = 3
_MANIFEST = "manifest.json"


class _Manifest(Schema):
    fingerprint: str
    unigram_val_loss: float
    files: list[manifests.File]


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
    staging = None
    try:
        if _is_prepared(folder, fingerprint):
            with suppress(OSError):  # it may be there to be read alone
                begin_folder(folder).rmdir()
            return load_corpus(folder)
        staging = begin_folder(folder)
        # What was interrupted is put back there.
        if not _is_prepared(folder, fingerprint):
            _build(staging, spec, fingerprint, progress)
            if folder.exists():
                _check_replaceable(folder)
            replace_folder(staging, folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"data.cache: cannot write {folder}: {error.strerror or error}") from None
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
        manifest = read_object(folder / _MANIFEST, _Manifest, DataError)
        train, heldout = (_load(folder / name) for name in ("train.npy", "heldout.npy"))
        if train.shape[1] != heldout.shape[1]:
            raise DataError(f"sequences of {train.shape[1]} and {heldout.shape[1]} tokens")
    except Exception as error:  # damaged arrays raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data.cache: {folder} holds no prepared text on this node: {reason}") from None
    return Corpus(folder / "tokenizer", train, heldout, float(manifest["unigram_val_loss"]))


def _load(path: Path) -> Tokens:
    sequences: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(sequences, np.memmap) or sequences.dtype != np.int32 or sequences.ndim != 2:
        raise DataError(f"{path} holds no sequences of int32")
    return sequences


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
        "files": manifests.list_files(staging),
    }
    (staging / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _is_prepared(folder: Path, fingerprint: str) -> bool:
    """Whether all that a corpus of this fingerprint needs is there, as it was made; reads all of it."""
    try:
        manifest = read_object(folder / _MANIFEST, _Manifest, DataError)
        if manifest["fingerprint"] != fingerprint:
            return False
        there = manifests.list_files(folder)
        load_tokenizer(load_corpus(folder).tokenizer_folder)
    except (OSError, DataError):
        return False
    needed = {file["name"] for file in there if file["name"].startswith(("train.", "heldout.", "tokenizer/"))}
    listed = {file["name"]: file for file in manifest["files"]}
    return needed <= listed.keys() and all(file in there for file in listed.values())


def _check_replaceable(folder: Path) -> None:
    """An outdated corpus is, and nothing that is something else."""
    known = {_MANIFEST, "train.npy", "heldout.npy", "tokenizer"}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in known)
    if foreign:
        raise OutputError(f"data.cache: {folder} holds other files ({foreign[0]}); takes a new or a prepared folder")


def _stat(path: Path) -> list[Any]:
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    except OSError:
        return []  # reported by who reads it
