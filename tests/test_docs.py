"""The guides name every flag and every endpoint, and no flag that does not exist."""

import dataclasses
import re

import pytest

from tests.processes import REPOSITORY
from warmroute.config import RouterConfig
from warmroute.launch_server import make_parser
from warmroute_worker.args import WorkerArgs
from warmroute_worker.command_line import ALIASES

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
    "--dry-run",
    *(alias for aliases in ALIASES.values() for alias in aliases),
}
"""launch_server's own, and aliases."""

LAUNCHER = {option for action in make_parser()._actions for option in action.option_strings if option != "-h"}
"""With the router's flags, also those that are refused."""


@pytest.mark.parametrize("name", GUIDES)
def test_flags(name: str) -> None:
    text = (REPOSITORY / "docs" / name).read_text()
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(GUIDES[name])}
    named = set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", text))
    assert flags - named == set()
    assert named - flags - ELSEWHERE == set()


@pytest.mark.parametrize("page", ["docs/launch_server.md", "docs/parallelism.md", "README.md"])
def test_other_pages_name_only_flags_that_exist(page: str) -> None:
    found = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", (REPOSITORY / page).read_text())
    named = {flag for flag in found if not flag.endswith("-")}  # `--router-` is a prefix
    known = {"--" + field.name.replace("_", "-") for kind in GUIDES.values() for field in dataclasses.fields(kind)}
    assert len(named) > 3
    assert named - known - ELSEWHERE - LAUNCHER - {"--check-config"} == set()


def test_the_launcher_has_all_flags_of_the_router_and_the_page_all_of_its_own() -> None:
    router = {"--router-" + field.name.replace("_", "-") for field in dataclasses.fields(RouterConfig)}
    assert router - LAUNCHER == {"--router-host", "--router-port", "--router-worker-urls"}, "it has others for these"
    text = (REPOSITORY / "docs" / "launch_server.md").read_text()
    own = {flag for flag in LAUNCHER - {"--help"} if not re.match("--(no-)?router-", flag)}
    assert {flag for flag in own | {"--router-dp-worker-base-port"} if f"`{flag}`" not in text} == set()


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/router.md",
        "docs/worker.md",
        "docs/launch_server.md",
        "docs/parallelism.md",
        "bench/README.md",
    ],
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
