"""Documents: their links lead somewhere, and the commands that they print are commands."""

import re
import shlex

import pytest

from deepspeed_sdp.cli import make_parser
from deepspeed_sdp.pretraining.options import parse_run
from deepspeed_sdp.pretraining.recipe import read_recipe
from tests.support.ranks import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"\w+://", link)]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands():
    for page in PAGES:
        for block in re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and "=" in words[0]:  # of the environment
                    words.pop(0)
                if words and words[0] == "deepspeed-sdp" and "…" not in words:
                    yield page, words[1:]


def test_commands_can_be_typed_as_they_stand(monkeypatch):
    """Options exist and take what is given them; of a recipe, the keys too."""
    monkeypatch.chdir(ROOT)
    found = list(commands())
    assert len(found) > 20
    assert {words[0] for _, words in found} >= {"pretrain", "data", "estimate", "plan", "inspect", "export", "recipes"}
    for page, words in found:
        try:
            args = parse_run(make_parser(), words)
        except SystemExit:
            pytest.fail(f"{page.name}: deepspeed-sdp {' '.join(words)}")
        if words[0] == "pretrain" and not words[1].endswith(".json"):
            read_recipe(args.recipe, args.settings)
