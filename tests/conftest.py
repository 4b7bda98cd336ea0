import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

from tests.support.ranks import RankPool

# Machines under load are slow: time limits are pytest's, and a failure prints what repeats it.
settings.register_profile("sdp", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sdp")


@pytest.fixture(scope="session")
def pools():
    """Pools of ranks by world size, started when first used."""
    made = {}

    def pool(world_size):
        return made.setdefault(world_size, RankPool(world_size))

    yield pool
    for entry in made.values():
        entry.stop()


@pytest.fixture(scope="session")
def ranks4(pools):
    return pools(4)
