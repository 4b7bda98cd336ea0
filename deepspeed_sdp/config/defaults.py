"""Numbers that a job takes where nobody says: the same in the engine, in plans and in estimates."""

_MOST_SUBNETWORKS = 8


def default_subnetworks(world_size: int) -> int:
    """``N``: the largest divisor of the world size up to 8."""
    return max(n for n in range(1, _MOST_SUBNETWORKS + 1) if world_size % n == 0)


def default_owner_sets(num_subnetworks: int, backend: str) -> int:
    """Bound of the owner sets of so many subnetworks whose collectives run on ``backend``.

    Each is a communicator, which costs memory, a stream and a thread but on gloo. 16 sets come near the best plan
    for up to 8 workers; more workers are asked for, and get two turns of windows at least.
    """
    return 64 if backend == "gloo" else min(64, max(16, 2 * num_subnetworks))


def default_bucket_numel(backend: str, world_size: int) -> int:
    """Elements of the full model in a round of gradients, or a portion of weights.

    DeepSpeed's own default is larger than most models: nothing would overlap. On a CPU smaller pieces also stay in
    reach of the allocator (measured by benchmarks/engine_speed.py). Above 64 ranks pieces grow with the world, as the
    latency of a ring does (docs/scale.md), up to twice DeepSpeed's default.
    """
    return 5_000_000 if backend == "gloo" else min(10**9, 25_000_000 * max(64, world_size) // 64)
