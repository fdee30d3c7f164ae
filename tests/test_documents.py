"""What README.md and the documents beside the code say that can be held against the repository."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from amdp_plugin.cli import main
from amdp_plugin.deepspeed.config import check_places, read_settings
from amdp_plugin.plan import schedules
from amdp_plugin.plan.schedules.options import COMMON
from amdp_plugin.settings import read_schedule

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "amdp_plugin" / "docs"
DOCUMENTS = [ROOT / "README.md", *DOCS.glob("*.md"), ROOT / "patches" / "README.md"]
CONFIGURATIONS = sorted((ROOT / "ds_configs").glob("*.json"))


def anchors(document: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_every_schedule_and_option_is_described() -> None:
    text = (DOCS / "options.md").read_text()
    own = {option for name in schedules.BUILT_IN for option in schedules.options(name)}
    for word in [*schedules.BUILT_IN, *COMMON, *own]:
        assert f"`{word}`" in text, word


def test_every_ready_configuration_is_described() -> None:
    text = (DOCS / "options.md").read_text()
    for path in CONFIGURATIONS:
        assert f"`{path.name}`" in text, path


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_ready_configurations_are_read(path: Path) -> None:
    config = json.loads(path.read_text())
    check_places(config)
    settings = read_settings(config.get("pipeline"))
    assert (settings is None) == path.name.startswith("1f1b")
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] == 16


def test_ready_options_of_megatron_are_read() -> None:
    text = (ROOT / "scripts" / "megatron_error_feedback.json").read_text()
    read_schedule({**json.loads(text), "name": "paci"}, "here")


def commands() -> list[str]:
    found = re.findall(r"^amdp plan [^\n\\]*$", "\n".join(path.read_text() for path in DOCUMENTS), re.MULTILINE)
    return [command.partition("  #")[0] for command in found if "patient" not in command]


@pytest.mark.parametrize("command", commands())
def test_plans_of_the_documents_can_be_made(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert capfdbinary.readouterr().out or list(tmp_path.iterdir())


def test_what_the_plan_says_is_what_the_readme_shows(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    (shown,) = re.findall(r"```text\n(paci: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert main(["plan", "--schedule", "paci", "--stages", "8", "--micro-batches", "8"]) == 0
    assert capfd.readouterr().out.startswith(shown)
