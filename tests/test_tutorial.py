"""docs/tutorial.md, word for word: every block is run, in its order, on a video made for it."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from ruamel.yaml import YAML

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
# The environment of the tests is installed and at work already.
DONE = ("make .venv/.installed", "source .venv/bin/activate")


def blocks() -> list[tuple[str, str]]:
    """(language, content) of each block: no language is the shell's, yaml is what to write into params.yaml."""
    return re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def write_video(path: Path, noise: float, frames: int = 48) -> None:
    """Frames of a texture that moves, 64 x 64."""
    generator = np.random.default_rng(1)
    texture = generator.integers(0, 256, (16, 40, 3)).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p"
        for number in range(frames):
            frame = np.roll(texture, -number, axis=1)[:, :64] + generator.normal(0, noise, (64, 64, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), "rgb24")))
        container.mux(stream.encode())


def edits(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from edits(value, f"{prefix}{key}__")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.long
def test_every_command_of_the_tutorial_does_what_it_says(make_workspace):
    workspace = make_workspace("tutorial")
    write_video(workspace.root / "holiday.mp4", noise=0)
    write_video(workspace.root / "noisy.mp4", noise=30)
    ran = 0
    for language, content in blocks():
        if language == "yaml":
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
