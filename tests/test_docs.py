"""What the documentation tells people to type is what the command line takes, and the messages it explains are those that they see."""

import re
import shlex
from pathlib import Path

import pytest

from vrt.cli import parser

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
SOURCES = "\n".join(path.read_text() for path in sorted([*PROJECT.glob("vrt/**/*.py"), *PROJECT.glob("pipelines/*.py")]))
# Said by others.
FOREIGN = {"ready twice", "Invalid Host header", "RequestTimeTooSkewed", "Running"}


def commands(page: Path) -> list[str]:
    """Each `vrt ...` of a page, in a line of text or in a block."""
    text = page.read_text()
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [command for command in (*lines, *spans) if command.startswith("vrt ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_documentation_is_one(page: Path, capsys: pytest.CaptureFixture):
    wrong = []
    for command in commands(page):
        arguments = shlex.split(command)[1:]
        # A name of a command alone, as in "`vrt evaluate` ...", is none to be typed.
        try:
            parser().parse_args(arguments)
        except SystemExit as ended:
            said = capsys.readouterr().err
            if ended.code and "the following arguments are required" not in said:
                wrong.append(f"{command}: {said.splitlines()[-1]}")
    assert not wrong, "\n".join(wrong)


def test_the_pages_have_commands():
    assert len([command for page in PAGES for command in commands(page)]) > 30


def test_every_link_between_the_pages_leads_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken, broken


def test_every_message_that_troubleshooting_explains_is_one_of_ours():
    page = (PROJECT / "docs" / "troubleshooting.md").read_text()
    symptoms = [cell for row in page.splitlines() if row.startswith("| ") for cell in re.findall(r"`([^`]+)`", row.split("|")[1])]
    said = re.sub(r"\{[^{}]*\}", "{}", SOURCES)
    unknown = []
    for symptom in symptoms:
        words = re.split(r" ?(?:\bN\b|\bHOST:PORT|\bHOST\b|\b0\b|\.\.\.|\bnan\b) ?", symptom)
        if symptom not in FOREIGN and not symptom.startswith("vrt ") and not all(part in said for part in words):
            unknown.append(symptom)
    assert len(symptoms) > 12
    assert not unknown, unknown
