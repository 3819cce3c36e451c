"""What the documentation tells people to type is what the command line takes, and the messages it explains are those that they see."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.documentation import PAGES, PROJECT, commands
from vrt.cli import parser
from vrt.model.network import VRT
from vrt.params import load_params
from vrt.stages.recipes import all_recipes

SOURCES = "\n".join(path.read_text() for path in sorted([*PROJECT.glob("vrt/**/*.py"), *PROJECT.glob("pipelines/*.py")]))
# Said by others.
FOREIGN = {"ready twice", "Invalid Host header", "RequestTimeTooSkewed", "Running"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_documentation_is_one(page: Path, capsys: pytest.CaptureFixture):
    wrong = []
    for command in commands(page):
        if not command.startswith("vrt "):
            continue
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


def test_the_page_of_recipes_has_them_as_they_are():
    shown = [line for line in (PROJECT / "docs" / "recipes.md").read_text().splitlines() if line.startswith("| `")]
    expected = [
        f"| `{recipe.name.split('_')[0]}` | {recipe.title} | `{recipe.dataset}` | {recipe.frames} x {recipe.side} x {recipe.side} "
        f"| {recipe.parameters / 1e6:.1f} M | {recipe.steps:,} |"
        for recipe in all_recipes()
    ]
    assert shown == expected


def test_the_walk_of_a_clip_has_the_sizes_that_the_network_gives():
    page = (PROJECT / "docs" / "architecture.md").read_text()
    told = {
        name: [int(size) for size in sizes.split(" x ")]
        for name, sizes in re.findall(r"^\| `?(\w+)`? \| (\d+(?: x \d+){3}) \|", page, flags=re.MULTILINE)
    }
    params = load_params(PROJECT / "recipes" / "001_videosr_bi_REDS_6frames.yaml").network
    # Fewer blocks of each kind; none changes a size.
    network = VRT(**params.model_dump() | {"depths": [1] * 13})
    found = {}

    def note(name: str, module, _inputs, output) -> None:
        # The convolutions over single frames have channels first and the frames in the batch.
        shape = output.shape[1:] if output.dim() == 5 else (output.shape[0], *output.shape[2:], output.shape[1])
        found[name] = list(shape)

    parts = {name: network.get_submodule(name) for name in told if name not in ("input", "output", "stage8")}
    for name, module in {**parts, "stage8": network.stage8[-1]}.items():
        module.register_forward_hook(partial(note, name))
    clip = torch.rand(1, 6, 3, 64, 64)
    with torch.no_grad():
        restored = network(clip)
    found |= {"input": [6, 64, 64, 3], "output": [restored.shape[1], *restored.shape[3:], restored.shape[2]]}
    assert len(told) == 13
    assert found == told


def test_the_functions_that_the_architecture_names_are_where_it_says():
    page = (PROJECT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`(\w+)` in \[`([\w/]+\.py)`\]", page)
    assert len(named) >= 5
    assert [(name, path) for name, path in named if f"def {name}(" not in (PROJECT / path).read_text()] == []
