"""Real jobs of ``deepspeed-sdp pretrain``: a recipe made small, on parquet files with FineWeb's columns."""

import json

import pyarrow as pa
import pyarrow.parquet

from deepspeed_sdp.cli import main
from tests.data.conftest import make_documents
from tests.launch.jobs import MODEL, run_job

PRETRAIN = ("--module", "deepspeed_sdp.cli")
SMALL = {
    "data.seq_length": 32,
    "length.tokens": 4000,
    "logging.log_interval": 2,
    "logging.eval_interval": 4,
    "logging.eval_sequences": 8,
    "logging.checkpoint_interval": 0,
    "deepspeed.train_batch_size": 16,
    "deepspeed.train_micro_batch_size_per_gpu": 2,
    "sdp.num_subnetworks": 2,
    # DeepSpeed's own is compiled on first use, for a CPU too.
    "deepspeed.optimizer.params.torch_adam": True,
}


def write_parquet(folder, count=160):
    """Two files with FineWeb's columns."""
    folder.mkdir()
    rows = [
        {
            "text": text,
            "id": f"<urn:uuid:{number}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.org/{number}",
            "date": "2024-03-01T00:00:00Z",
            "file_path": "s3://commoncrawl/segment.warc.gz",
            "language": "en",
            "language_score": 0.98,
            "token_count": len(text) // 4,
        }
        for number, text in enumerate(make_documents(count))
    ]
    for number in range(2):
        table = pa.Table.from_pylist(rows[number::2])
        pyarrow.parquet.write_table(table, folder / f"00{number}_00000.parquet", row_group_size=5)
    return folder


class RecipePlace:
    """A folder with shards and a small model; ``launch`` runs a recipe on them."""

    def __init__(self, folder, shards=None):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.output = folder / "out"
        self.text: list[str] = []
        (folder / "model.json").write_text(json.dumps(MODEL))
        self.shards = shards or folder / "shards"
        if shards is None:
            source = str(write_parquet(folder / "parquet"))
            arguments = ["--source", source, "--train_tokenizer", "320", "--heldout_fraction", "0.1", "--quiet"]
            assert main(["data", str(self.shards), *arguments]) == 0

    def arguments(self, *switches, recipe="15m", script=PRETRAIN, **changes):
        values = {**SMALL, "model.path": str(self.folder / "model.json"), **changes}
        settings = [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]
        text = self.text or ["--data", str(self.shards)]
        return [*script, "pretrain", recipe, "--output_dir", str(self.output), *text, *settings, *switches]

    def launch(self, *switches, ranks=2, **changes):
        return run_job(self.arguments(*switches, **changes), self.folder, ranks)

    def lines(self):
        return [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]

    def script(self, body):
        """A script that does something to ``loop`` before it runs as ``deepspeed-sdp`` does."""
        file = self.folder / "script.py"
        file.write_text(
            "import os, sys\nfrom deepspeed_sdp.cli import main\n"
            f"from deepspeed_sdp.pretraining import loop\n{body}\nsys.exit(main())\n"
        )
        return [str(file)]
