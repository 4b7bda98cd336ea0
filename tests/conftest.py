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


# Items of these share no more than pools of ranks; elsewhere a module's items share what it made at a cost.
_DEALT_BY_TENS = ("engine", "plan", "estimate")


def pytest_addoption(parser):
    parser.addoption("--part", metavar="I/N", help="the I-th of N parts of the tests, which take about as long each")


def pytest_collection_modifyitems(config, items):
    part = config.getoption("--part")
    if not part:
        return
    number, of = _part(part)
    units = {}
    for index, item in enumerate(items):
        folder = item.path.parent.name
        units.setdefault((item.path, index // 10 if folder in _DEALT_BY_TENS else 0), []).append(item)
    parts = [[] for _ in range(of)]
    for unit in sorted(units.values(), key=len, reverse=True):
        min(parts, key=len).extend(unit)
    chosen = {id(item) for item in parts[number - 1]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


def _part(text):
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise pytest.UsageError(f"--part: got {text}; takes I/N with I from 1 to N, as 2/4")
    return int(number), int(of)


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
