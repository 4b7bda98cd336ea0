"""A process that ends, by itself or by an error, while its streams are busy, and counts their threads at the end."""

import atexit
import sys
import threading
from pathlib import Path


def say_what_is_left():
    print("left:", sum(thread.name == "ahead" for thread in threading.enumerate()), flush=True)


# Runs after whatever the package registers below.
atexit.register(say_what_is_left)

from deepspeed_sdp.data import SourceSpec, StreamedSequences, load_tokenizer  # noqa: E402

folder, tokenizer, how = sys.argv[1:]
options = {"rank": 0, "world_size": 1, "micro_batch": 4, "global_batch": 4, "num_lanes": 1, "chunk_rows": 4}
source, tokens = SourceSpec((folder,)), load_tokenizer(Path(tokenizer))
streams = [StreamedSequences(source, tokens, 64, seed=seed, prefetch=10**6, **options) for seed in range(2)]
for stream in streams:
    next(stream)
print("busy:", sum(thread.name == "ahead" for thread in threading.enumerate()), flush=True)
if how == "error":
    raise RuntimeError("of the job")
