"""What the documentation tells people to type is what the command line takes, and the messages it explains are those that they see."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.documentation import PAGES, PROJECT, commands
from vrt.cli import parser
from vrt.model.network import VRT
from vrt.params import load_params
from vrt.stages.recipes import all_recipes

SOURCES = "\n".join(path.read_text() for path in sorted([*PROJECT.glob("vrt/**/*.py"), *PROJECT.glob("pipelines/*.py")]))
# Said by others.
OF_TORCH = (
    "Error(s) in loading state_dict for VRT",
    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
    "Expected to have finished reduction in the prior iteration before starting a new one",
    "Expected to mark a variable ready only once",
    "has been marked as ready twice",
)
FOREIGN = {
    *(*OF_TORCH, "CUDA out of memory. Tried to allocate ...", "object has no attribute '_set_static_graph'"),
    *("Invalid Host header", "RequestTimeTooSkewed", "Running"),
}


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


def test_the_messages_of_torch_are_those_that_it_has(tmp_path):
    class Half(nn.Module):
        """Trains a layer, and has another one."""

        def __init__(self):
            super().__init__()
            self.used, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return checkpoint(self.used, x, use_reentrant=True)

    def train(find_unused_parameters: bool) -> None:
        network = nn.parallel.DistributedDataParallel(Half(), find_unused_parameters=find_unused_parameters)
        for _ in range(2):
            network(torch.ones(1, 2, requires_grad=True)).sum().backward()

    def load_weights() -> None:
        VRT(**load_params(PROJECT / "params.yaml").network.model_dump()).load_state_dict({})

    def load_optimizer() -> None:
        other = torch.optim.Adam(nn.Linear(2, 2, bias=False).parameters())
        torch.optim.Adam(nn.Linear(2, 2).parameters()).load_state_dict(other.state_dict())

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    said = ""
    try:
        for provoke in (load_weights, load_optimizer, lambda: train(False), lambda: train(True)):
            with pytest.raises((RuntimeError, ValueError)) as raised:
                provoke()
            said += f"{raised.value}\n"
    finally:
        dist.destroy_process_group()
    page = (PROJECT / "docs" / "troubleshooting.md").read_text()
    assert [message for message in OF_TORCH if message not in said or f"`{message}`" not in page] == []


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
