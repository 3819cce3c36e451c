"""`vrt prepare` and `vrt data import`, from the command line's words to files."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vrt.data.cli import add_parser
from vrt.data.clips import PreparedData

REPOSITORY = Path(__file__).parents[2]


def vrt(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(words)
    return args.run(args)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with a folder of 24 frames and params that name the data set `mine`."""
    (tmp_path / "shots").mkdir()
    for number in range(24):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / "shots" / f"{number}.png")
    params = (REPOSITORY / "recipes" / "quickstart.yaml").read_text().replace("dataset: quickstart", "dataset: mine")
    (tmp_path / "params.yaml").write_text(params)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_import_says_what_comes_next(project: Path, capsys: pytest.CaptureFixture):
    assert vrt("data", "import", "shots", "--name", "mine") == 0
    assert (project / "data" / "raw" / "mine" / "dataset.yaml").is_file()
    assert "set data.dataset: mine in params.yaml, run `dvc add data/raw/mine` to version it, and `dvc repro`" in capsys.readouterr().out


def test_prepare_makes_the_data_set_that_the_params_name(project: Path):
    vrt("data", "import", "shots", "--name", "mine")
    assert vrt("prepare") == 0
    data = PreparedData.open(project / "data" / "prepared")
    assert (data.index.dataset, data.clips("test")[0].frames) == ("mine", 8)


def test_prepare_reads_another_params_file(project: Path):
    vrt("data", "import", "shots", "--name", "mine")
    (project / "params.yaml").rename(project / "other.yaml")
    assert vrt("prepare", "--params", "other.yaml") == 0
