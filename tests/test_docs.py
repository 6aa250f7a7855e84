"""The guides name every flag and every endpoint, and no flag that does not exist."""

import dataclasses
import re

import pytest

from tests.processes import REPOSITORY
from warmroute.config import RouterConfig
from warmroute_worker.args import ALIASES, WorkerArgs

GUIDES = {"router.md": RouterConfig, "worker.md": WorkerArgs}
ELSEWHERE = {
    "--check",
    "--check-config",
    "--kv-events-config",
    "--no-dp-aware",
    "--router-policy",
    "--router-dp-worker-base-port",
    "--dp-size",
    "--model-path",
    "--model",
    *(alias for aliases in ALIASES.values() for alias in aliases),
}
"""launch_server's own, and aliases."""


@pytest.mark.parametrize("name", GUIDES)
def test_flags(name: str) -> None:
    text = (REPOSITORY / "docs" / name).read_text()
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(GUIDES[name])}
    named = set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", text))
    assert flags - named == set()
    assert named - flags - ELSEWHERE == set()


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "docs/router.md", "docs/worker.md", "bench/README.md"]
)
def test_links_lead_somewhere(name: str) -> None:
    page = REPOSITORY / name
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_names_exactly_two_commands() -> None:
    text = (REPOSITORY / "README.md").read_text()
    section = text.split("## Two commands")[1].split("\n## ")[0]
    assert re.findall(r"^    (make \w+)", section, re.MULTILINE) == ["make demo", "make test"]
