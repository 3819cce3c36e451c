"""`vrt weights convert`: what it can't take along, it names."""

from pathlib import Path

import pytest
import torch

from vrt import cli
from vrt.checkpoint.weights import read_weights

BOTH = {"params": {"w": torch.zeros(1)}, "params_ema": {"w": torch.ones(1)}}


@pytest.mark.parametrize(
    ("content", "options", "value", "left"),
    [
        (BOTH, [], 1, "'params'; --under params takes those"),
        (BOTH, ["--under", "params"], 0, "'params_ema'; --under params_ema takes those"),
        (BOTH | {"iter": 7}, [], 1, "'params', 'iter'; --under params takes those"),
        ({"params": {"w": torch.zeros(1)}, "epoch": 3, "iter": 7}, [], 0, "'epoch', 'iter'"),
        ({"params_ema": {"w": torch.ones(1)}}, ["--under", "params"], 1, None),
    ],
)
def test_what_lies_beside_the_weights_is_named_when_it_stays_behind(
    content: dict, options: list[str], value: float, left: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    torch.save(content, tmp_path / "G.pth")
    assert cli.main(["weights", "convert", *options, str(tmp_path / "G.pth"), str(tmp_path / "G.safetensors")]) == 0
    found = read_weights(tmp_path / "G.safetensors")
    assert found.tensors["w"].item() == value
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = f"{tmp_path / 'G.safetensors'}: has only what {tmp_path / 'G.pth'} holds under {found.nesting!r}; left out: {left}"
    assert warned == ([] if left is None else [expected])
