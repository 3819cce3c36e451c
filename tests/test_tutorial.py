"""docs/tutorial.md, word for word: every block is run, in its order, on a video made for it."""

import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from ruamel.yaml import YAML

from tests.documentation import PROJECT, blocks
from tests.footage import moving, write_video

PAGE = PROJECT / "docs" / "tutorial.md"
# The environment of the tests is installed and at work already.
DONE = ("make .venv/.installed", "source .venv/bin/activate")


def with_noise(frames: np.ndarray, sigma: float) -> np.ndarray:
    return (frames + np.random.default_rng(1).normal(0, sigma, frames.shape)).clip(0, 255).astype(np.uint8)


def edits(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from edits(value, f"{prefix}{key}__")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.long
def test_every_command_of_the_tutorial_does_what_it_says(make_workspace):
    workspace = make_workspace("tutorial")
    frames = moving(48, 64, 64)
    write_video(workspace.root / "holiday.mp4", frames)
    write_video(workspace.root / "noisy.mp4", with_noise(frames, 30))
    ran = 0
    for language, content in blocks(PAGE):
        if language == "yaml":
            # To be written into params.yaml.
            workspace.edit(**dict(edits(YAML(typ="safe").load(content))))
            continue
        for command in content.splitlines():
            if command in DONE:
                continue
            ended = subprocess.run(
                ["bash", "-c", command], cwd=workspace.root, env=workspace.environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
            ran += 1
    assert ran >= 12
    for made in ("restored.mp4", "restored-preview.mp4", "by-the-champion.mkv"):
        assert (workspace.root / made).stat().st_size > 0
