"""On ranks: streams of their own lanes."""

from pathlib import Path

import torch.distributed as dist

from deepspeed_sdp.data import SourceSpec, StreamedSequences, load_tokenizer


def stream(folder, tokenizer, state=None, micro=2):
    """Two optimizer steps; the tokens of each, and the gathered state."""
    rank, world = dist.get_rank(), dist.get_world_size()
    one = StreamedSequences(
        SourceSpec((folder,)), load_tokenizer(Path(tokenizer)), 16,
        rank=rank, world_size=world, micro_batch=micro, global_batch=8, num_lanes=4, heldout_fraction=0.0, chunk_rows=4,
    )  # fmt: skip
    if state is not None:
        one.load_state_dict(state)
    rows = [next(one)["input_ids"].tolist() for _ in range(2 * 8 // world // micro)]
    gathered = one.gather_state()
    one.close()
    return rows, gathered
