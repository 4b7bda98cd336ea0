"""From raw text to packed training sequences."""

from deepspeed_sdp.data.corpus import Corpus, CorpusSpec, load_corpus, prepare_corpus
from deepspeed_sdp.data.packing import PackedDataset, RankSampler, pack, tokenize_documents, unigram_loss
from deepspeed_sdp.data.text_files import read_documents
from deepspeed_sdp.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "CorpusSpec",
    "PackedDataset",
    "RankSampler",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "prepare_corpus",
    "read_documents",
    "tokenize_documents",
    "train_tokenizer",
    "unigram_loss",
]
