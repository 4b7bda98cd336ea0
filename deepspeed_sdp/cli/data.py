"""``data``: text to shards of tokens, and what such shards hold."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeed_sdp.errors import ConfigError, DataError

if TYPE_CHECKING:
    from deepspeed_sdp.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add what this file holds."""
    data = commands.add_parser("data", help="tokenise a data set into shards, once; or look at such shards")
    data.add_argument("folder", type=Path, nargs="?", metavar="OUT", help="the folder to write")
    look = data.add_argument_group("looking at finished shards")
    look.add_argument("--inspect", type=Path, metavar="FOLDER", help="print the manifest's figures instead")
    look.add_argument("--verify", action="store_true", help="and compare every file with its checksum")
    look.add_argument("--json", action="store_true", help="print the whole manifest")
    source = data.add_argument_group("source")
    source.add_argument(
        "--source", nargs="+", default=(), metavar="PATH",
        help="hub:OWNER/NAME, or .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt and .ds files, folders or patterns of "
        "them, or builtin: Python's own documentation",
    )  # fmt: skip
    source.add_argument("--config", help="of the hub data set, as sample-10BT")
    source.add_argument("--revision", help="branch, tag or commit of the hub data set (default: main)")
    source.add_argument("--split", default="train", help="of the hub data set (default: %(default)s)")
    source.add_argument("--text_column", default="text", metavar="NAME", help="default: %(default)s")
    tokens = data.add_argument_group("tokens")
    tokens.add_argument("--tokenizer", metavar="FOLDER|NAME", help="a HuggingFace tokenizer, local or of the hub")
    tokens.add_argument("--train_tokenizer", type=int, metavar="VOCAB", help="or learn one from the first documents")
    tokens.add_argument("--add_bos", action="store_true", help="begin documents with the tokenizer's BOS token")
    tokens.add_argument("--max_tokens", type=count, metavar="N", help="to train on, as 1e9 (default: all there are)")
    tokens.add_argument(
        "--heldout_fraction", type=float, default=0.005, metavar="F", help="of the documents (default: %(default)s)"
    )
    tokens.add_argument(
        "--max_heldout_tokens", type=count, default=10_000_000, metavar="N", help="default: %(default)s"
    )
    tokens.add_argument("--shard_tokens", type=count, default=100_000_000, metavar="N", help="per file; %(default)s")
    work = data.add_argument_group("work")
    work.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    work.add_argument("--overwrite", action="store_true", help="replace other shards in OUT")
    work.add_argument("--quiet", action="store_true", help="no progress bar")
    faults = data.add_argument_group("faults")
    skip = ("skip", "stop")
    faults.add_argument("--on_broken_row", choices=skip, default="skip", help="default: %(default)s, and count")
    faults.add_argument("--on_broken_file", choices=skip, default="stop", help="default: %(default)s")
    faults.add_argument("--retries", type=int, default=8, metavar="N", help="of a lost connection; %(default)s")
    data.set_defaults(run=_data)


def count(text: str) -> int:
    """A whole number, also as ``1e9``."""
    value = float(text)
    if not math.isfinite(value) or value != int(value):
        raise ValueError
    return int(value) if "e" in text.lower() or "." in text else int(text)


def _data(args: argparse.Namespace) -> None:
    if (args.folder is None) == (args.inspect is None):
        raise ConfigError("data: takes either OUT, the folder to write, or --inspect FOLDER")
    if args.inspect is not None:
        _inspect(args.inspect, args.verify, args.json)
        return
    from deepspeed_sdp.data.faults import FaultPolicy
    from deepspeed_sdp.data.shard_options import ShardOptions
    from deepspeed_sdp.data.shards import Overwrite, prepare_shards
    from deepspeed_sdp.data.source import SourceSpec

    policy = FaultPolicy(args.on_broken_row, args.on_broken_file, args.retries)
    source = SourceSpec(tuple(args.source), args.config, args.revision, args.split, args.text_column, policy)
    options = ShardOptions(
        source, args.tokenizer, args.train_tokenizer, args.max_tokens, args.heldout_fraction, args.max_heldout_tokens,
        args.shard_tokens, args.add_bos,
    )  # fmt: skip
    overwrite: Overwrite = "always" if args.overwrite else "never"
    manifest = prepare_shards(args.folder, options, workers=args.workers, overwrite=overwrite, progress=not args.quiet)
    _print(args.folder, manifest, args.json)


def _inspect(folder: Path, verify: bool, as_json: bool) -> None:
    from deepspeed_sdp.data.manifest import check_files, damaged_files, read_manifest

    manifest = read_manifest(folder)
    _print(folder, manifest, as_json)
    check_files(folder, manifest)
    if verify:
        damaged = [name for name, is_damaged in damaged_files(folder, manifest) if is_damaged]
        if damaged:
            raise DataError(f"{folder}: {', '.join(damaged)} differ from the manifest's checksums")
        # Not among the figures, which may be JSON.
        print(f"all {len(manifest['files'])} files match their checksums", file=sys.stderr)


def _print(folder: Path, manifest: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(manifest, indent=2))
        return
    source, tokenizer = manifest["request"]["source"], manifest["tokenizer"]
    config = f" {source['config']}" if source["config"] else ""
    commit = f" at {manifest['commit']}" if manifest["commit"] else ""
    print(f"{'folder':<12}{folder}")
    print(f"{'source':<12}{', '.join(source['paths'])}{config}{commit} ({len(source['files'])} files)")
    print(f"{'tokenizer':<12}{tokenizer['from']}: {tokenizer['vocab_size']} ids, sha256 {tokenizer['sha256'][:16]}")
    for name, split in manifest["splits"].items():
        print(
            f"{name:<12}{split['tokens']} tokens, {split['documents']} documents, {split['characters']} characters, "
            f"{split['bytes']} bytes of text, {split['shards']} shards"
        )
    print(f"{'seconds':<12}{manifest['seconds']}")
    for reason, about in manifest["skipped"].items():
        print(f"{'skipped':<12}{about['count']} x {reason}, first at {about['first'][0]}")
    if not manifest["skipped"]:
        print(f"{'skipped':<12}nothing")
