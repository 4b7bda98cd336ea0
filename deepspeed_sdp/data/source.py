"""Where documents come from: local files, or a data set of the HuggingFace hub, as a list of files."""

import glob
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from deepspeed_sdp.data import builtin_text, token_file
from deepspeed_sdp.data.faults import FaultPolicy, Retry, Skipped, reason_of
from deepspeed_sdp.errors import ConfigError, DataError

HUB = "hub:"
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
_TEXT = ".txt"
_LOCAL_SUFFIXES = (*_SUFFIXES, token_file.SUFFIX)
_TAKES = (
    "takes .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt or .ds files, folders or patterns of them, hub:OWNER/NAME, or "
    f"{builtin_text.NAME}"
)
# Paths asked for in one request to the hub.
_PATHS_PER_REQUEST = 500
_HUB_BLOCK = 4 << 20


Kind = Literal["parquet", "lines", "text", "tokens", "builtin"]


@dataclass(frozen=True)
class SourceSpec:
    """What to read.

    Attributes:
        paths: local files, folders and patterns, ``builtin`` (:mod:`builtin_text`), or one ``hub:OWNER/NAME``.
        config, revision, split: of a hub data set; a split names its files.
        text_column: which column holds the text.
        faults: what happens to broken rows and files, and to lost connections.
        weight: share of the tokens, where several sources are mixed: in any unit.
        option: by which the command line says it, for messages.
    """

    paths: tuple[str, ...]
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    text_column: str = "text"
    faults: FaultPolicy = field(default_factory=FaultPolicy)
    option: str = field(default="--source", compare=False)
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError(f"{self.option}: got nothing; {_TAKES}")
        if any(path.startswith(HUB) for path in self.paths):
            if len(self.paths) > 1:
                raise ConfigError(f"{self.option}: got a hub data set beside others; takes it alone")
        elif self.config is not None or self.revision is not None:
            key = "config" if self.config is not None else "revision"
            raise ConfigError(
                f"{self.option}: got local files with a {key}, {getattr(self, key)!r}; takes it with hub:OWNER/NAME"
            )

    @property
    def hub_name(self) -> str | None:
        """``OWNER/NAME`` of a hub data set."""
        return self.paths[0].removeprefix(HUB) if self.paths[0].startswith(HUB) else None

    def to_json(self) -> dict[str, Any]:
        """Without what changes nothing that is read."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("faults", "option", "weight")}
        return {**kept, "paths": list(self.paths)}


@dataclass(frozen=True)
class DataFile:
    """One file of a source.

    Attributes:
        path: local, or ``hf://datasets/OWNER/NAME@COMMIT/...``.
        size: bytes.
        stamp: changes with its content: time of change in ns, or the hub's checksum.
    """

    path: str
    size: int
    stamp: str

    @property
    def kind(self) -> Kind:
        """What is in it; ``tokens`` are documents that datatrove has tokenised."""
        if builtin_text.megabytes(self.path) is not None:
            return "builtin"
        kinds: dict[str, Kind] = {".parquet": "parquet", _TEXT: "text", token_file.SUFFIX: "tokens"}
        return kinds.get(Path(self.path).suffix.lower(), "lines")

    @property
    def compression(self) -> str | None:
        """Of JSON lines."""
        return {".gz": "gzip", ".zst": "zstd"}.get(Path(self.path).suffix.lower())

    def open(self) -> BinaryIO:
        """For reading at any place."""
        if not self.path.startswith("hf://"):
            return open(self.path, "rb")
        from huggingface_hub import HfFileSystem

        # Parquet is read in ranges that are known beforehand; lines are read ahead.
        cache = "none" if self.kind == "parquet" else "readahead"
        return cast(BinaryIO, HfFileSystem().open(self.path, "rb", block_size=_HUB_BLOCK, cache_type=cache))


@dataclass(frozen=True)
class Source:
    """A source whose files are known. ``commit`` is that of a hub data set."""

    spec: SourceSpec
    files: tuple[DataFile, ...]
    commit: str | None = None

    def identity(self) -> dict[str, Any]:
        """What decides over the documents read, as JSON."""
        stated = replace(self.spec, revision=self.commit or self.spec.revision).to_json()
        return {**stated, "files": [[file.path, file.size, file.stamp] for file in self.files]}


def find_source(spec: SourceSpec, skipped: Skipped) -> Source:
    """List the files of a source.

    Raises:
        DataError: there are none, they cannot be reached, or are of another kind.
    """
    if spec.hub_name is not None:
        return Retry(spec.paths[0], spec.faults, skipped).call(lambda: _hub_source(spec))
    return Source(spec, tuple(file for path in spec.paths for file in _local_files(path, spec.option)))


def _local_files(path: str, option: str) -> list[DataFile]:
    size = builtin_text.megabytes(path)
    if size is not None:
        return [DataFile(path, int(size * 1e6), builtin_text.stamp())]
    return [_local_file(file, option) for file in _expand(path, option)]


def _expand(path: str, option: str) -> list[Path]:
    here = Path(path)
    try:
        if here.is_file():
            if not _is_kind(here, (*_LOCAL_SUFFIXES, _TEXT)):
                raise DataError(f"{option}: {path} is of another kind; {_TAKES}")
            return [here]
        is_folder = here.is_dir()
        inside = here.rglob("*") if is_folder else (Path(name) for name in glob.iglob(path, recursive=True))
        files = sorted(file for file in inside if _is_kind(file, (*_LOCAL_SUFFIXES, _TEXT)) and file.is_file())
    except OSError as error:
        raise DataError(f"{option}: {path} cannot be read: {error.strerror or error}") from None
    # Beside data of another kind a text is their licence or description.
    found = [file for file in files if _is_kind(file, _LOCAL_SUFFIXES)] or files
    if not found:
        what = "holds no such file" if is_folder else "does not exist"
        raise DataError(f"{option}: {path} {what}; {_TAKES}")
    return found


def _is_kind(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def _local_file(path: Path, option: str) -> DataFile:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{option}: {path} cannot be read: {error.strerror or error}") from None
    return DataFile(str(path.resolve()), stat.st_size, str(stat.st_mtime_ns))


def _hub_source(spec: SourceSpec) -> Source:
    """``datasets`` says which files a config and split are, and at which commit. It runs no loading scripts."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.constants import is_offline_mode

    name = spec.hub_name
    assert name is not None
    if is_offline_mode():
        raise DataError(f"{spec.option}: {spec.paths[0]} needs the network, and HF_HUB_OFFLINE is set")
    try:
        builder = load_dataset_builder(name, spec.config, revision=spec.revision)
    except (ValueError, FileNotFoundError) as error:
        # 'datasets' wraps what the connection raised.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, Exception) and not isinstance(cause, FileNotFoundError | ValueError | KeyError):
            raise cause from None
        raise DataError(f"{spec.option}: {spec.paths[0]} (config {spec.config}): {reason_of(error)}") from None
    splits = builder.config.data_files or {}
    if spec.split not in splits:
        has = ", ".join(map(repr, splits)) or "no files"
        raise DataError(f"{spec.option}: {spec.paths[0]} has no split {spec.split!r}; it has {has}")
    urls = [str(url) for url in splits[spec.split]]
    other = [url for url in urls if not url.endswith(_SUFFIXES)]
    if other:
        raise DataError(f"{spec.option}: {spec.paths[0]} holds {other[0]}; takes data sets of parquet or JSON lines")
    prefix, commit = _common_prefix(urls, name, spec.option)
    known: dict[str, DataFile] = {}
    paths = [url.removeprefix(prefix) for url in urls]
    for start in range(0, len(paths), _PATHS_PER_REQUEST):
        part = paths[start : start + _PATHS_PER_REQUEST]
        for info in HfApi().get_paths_info(name, part, revision=commit, repo_type="dataset"):
            assert isinstance(info, RepoFile)
            known[info.path] = DataFile(prefix + info.path, info.size, info.lfs.sha256 if info.lfs else info.blob_id)
    return Source(spec, tuple(known[path] for path in paths), commit)


def _common_prefix(urls: list[str], name: str, option: str) -> tuple[str, str]:
    """``hf://datasets/OWNER/NAME@COMMIT/`` and the commit."""
    start = f"hf://datasets/{name}@"
    commits = {url.removeprefix(start).split("/", 1)[0] for url in urls if url.startswith(start)}
    if len(commits) != 1 or not all(url.startswith(start) for url in urls):
        raise DataError(f"{option}: hub:{name} refers to files of other data sets: {urls[0]}")
    commit = commits.pop()
    return f"{start}{commit}/", commit
