import pytest

from tests.launch.jobs import Workplace


@pytest.fixture
def workplace(tmp_path):
    return Workplace(tmp_path)
