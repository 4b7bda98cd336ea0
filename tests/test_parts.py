"""``--part I/N``: the parts are all of the tests, and each test is in one of them."""

import pytest

pytest_plugins = "pytester"
FILES = {
    "engine/test_a.py": "import pytest\n@pytest.mark.parametrize('i', range(25))\ndef test_one(i): pass",
    "data/test_b.py": "import pytest\n@pytest.mark.parametrize('i', range(11))\ndef test_two(i): pass",
    "test_c.py": "def test_three(): pass",
}


@pytest.fixture
def collected(pytester):
    """Names of the tests that ``pytest ARGUMENTS`` takes in a tree with this suite's ``conftest.py``."""
    from tests.support.ranks import ROOT

    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    for name, text in FILES.items():
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def run(*arguments):
        result = pytester.runpytest_inprocess("--collect-only", "-q", *arguments)
        return [line for line in result.outlines if "::" in line]

    return run


def test_parts_are_all_of_the_tests(collected):
    every = collected()
    parts = [collected("--part", f"{i}/3") for i in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(every)
    assert len(every) == 37
    assert max(map(len, parts)) < 20
    of_data = [sum("test_b" in name for name in part) for part in parts]
    assert sorted(of_data) == [0, 0, 11], "what a module made is made once"


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "x/y"])
def test_what_is_no_part_is_refused(pytester, collected, text):
    result = pytester.runpytest_inprocess("--part", text)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
