"""The files around the package agree: on the version, the supported Pythons, the lowest dependencies and the checks."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from flowdistill import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ["3.11", "3.12", "3.13"]


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def lowest(requirements: list[str]) -> dict[str, set[str]]:
    """Name -> lower bounds of requirements, those of ``flowdistill[...]`` itself left out."""
    found: dict[str, set[str]] = {}
    for requirement in map(Requirement, requirements):
        bounds = {one.version for one in requirement.specifier if one.operator in (">=", "==")}
        if requirement.name != "flowdistill":
            found.setdefault(requirement.name, set()).update(bounds)
    return found


def test_the_newest_release_in_the_changelog_is_this_version() -> None:
    releases = re.findall(r"^## (\S+)(?: - (\S+))?$", text("CHANGELOG.md"), re.M)
    assert releases[0] == ("Unreleased", "") and releases[1][0] == __version__, releases
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in releases[1:]), releases
    versions = [Version(name) for name, _ in releases[1:]]
    assert versions == sorted(versions, reverse=True)
    kinds = re.findall(r"^### (.*)$", text("CHANGELOG.md"), re.M)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}, kinds
    assert text(f"docs/release_notes/{__version__}.md").startswith(f"# flowdistill {__version__}\n")
    citation = yaml.safe_load(text("CITATION.cff"))
    assert (citation["version"], citation["date-released"]) == releases[1]
    assert citation["license"] == PROJECT["license"] and citation["authors"] == PROJECT["authors"]


def test_supported_pythons_are_those_that_are_tested() -> None:
    named = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    assert named == workflow["jobs"]["suite"]["strategy"]["matrix"]["python"] == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_the_workflow_runs_the_scripts_with_few_rights() -> None:
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    assert workflow["permissions"] == {"contents": "read"} and "secrets" not in text(".github/workflows/ci.yml")
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert commands == {"suite": ["bash .ci/run"], "lowest": ["bash .ci/lowest"]}
    for job in workflow["jobs"].values():
        assert "permissions" not in job and job["timeout-minutes"] <= 90
        checkout = job["steps"][0]
        assert checkout["uses"].startswith("actions/checkout@") and checkout["with"] == {"persist-credentials": False}


def test_the_page_of_the_installation_names_every_extra() -> None:
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text("docs/start/install.md"), re.M)))
    assert sorted(set(named) & set(PROJECT["optional-dependencies"])) == sorted(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("script", [".ci/run", ".ci/lowest"])
def test_a_script_of_the_workflow_is_one_that_bash_reads(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert text(script).startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text(script)


def test_the_lowest_dependencies_are_the_lower_bounds() -> None:
    lines = [Requirement(line) for line in text(".ci/lowest.txt").splitlines() if line and not line.startswith("#")]
    tested = {"python_version": PYTHONS[0], "python_full_version": f"{PYTHONS[0]}.0"}
    listed = {one.name: str(one.specifier) for one in lines if one.marker is None or one.marker.evaluate(tested)}
    asked = lowest([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
    for name, bounds in asked.items():
        assert bounds, f"{name} has no lower bound"
        version = Version(listed[name].removeprefix("=="))
        assert version >= max(map(Version, bounds)), f"{name}: make .ci/lowest.txt anew"


def test_the_lowest_dependencies_install_with_the_lowest_python() -> None:
    """Those that are installed here in that version; in the environment of ``.ci/lowest`` they are all."""
    checked = 0
    for line in text(".ci/lowest.txt").splitlines():
        pinned = re.match(r"([\w.-]+)==(\S+)", line)
        if pinned is None:
            continue
        try:
            metadata = importlib.metadata.metadata(pinned[1])
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(metadata["Version"]) == Version(pinned[2]):
            allowed = SpecifierSet(metadata.get("Requires-Python") or "")
            assert f"{PYTHONS[0]}.0" in allowed, f"{line} needs Python {allowed}"
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("file", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=lambda file: file.stem)
def test_an_issue_template_is_one(file: Path) -> None:
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    if file.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"] and form["description"]
    names = [item["id"] for item in form["body"]]
    assert len(names) == len(set(names)) and all(item["type"] == "textarea" for item in form["body"])


def test_hooks_before_a_commit_are_the_checks_of_ci() -> None:
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is fetched from another place
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "mypy"]
    for hook in repository["hooks"]:
        assert hook["entry"].split(" --")[0] in text(".ci/run").replace(".venv/bin/", "")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md",
                                  "docs/examples/flowdistill-method-example/README.md",
                                  f"docs/release_notes/{__version__}.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text(page))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing
