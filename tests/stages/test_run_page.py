"""What people read in MLflow about a training."""

from typing import get_args

import pytest

from vrt.checkpoint.tracking import LONGEST_DESCRIPTION, Lineage
from vrt.evaluation.run import INPUT_LABELS
from vrt.params import Degradation, load_params
from vrt.stages.recipes import RECIPES
from vrt.stages.run_page import NOT_RECORDED, TASKS, dvc_version, recipe_of, run_page

LINEAGE = Lineage("quickstart", "0123456789abcdef", {"data.digest": "d" * 64})
ABOUT = {"recipe": "quickstart", "data_version": "d" * 64, "dvc_data": "abc.dir"}


@pytest.fixture
def params():
    return load_params(RECIPES / "quickstart.yaml")


def entry(step: int, **measured: str) -> dict[str, str]:
    return {"step": str(step), "bytes": "24800000", "digest": f"{step:064x}", "attempt": "2", "version": str(step // 40)} | measured


def test_the_page_says_what_is_trained_how_to_go_on_and_what_there_is(params):
    page = run_page(params, LINEAGE, ABOUT, [entry(80, val_psnr="21.9", val_ssim="0.49", train_loss="0.08"), entry(40)])
    assert "learns to **remove noise**, on the data set **quickstart** (digest `dddddddddddd`, DVC `abc.dir`), by the recipe **quickstart**" in page
    assert "dvc repro" in page
    assert 'vrt train --resume "fork quickstart-0123456789@80"' in page
    assert "vrt restore INPUT -o OUTPUT --checkpoint quickstart-0123456789@80" in page
    link = "[2](#/models/vrt-quickstart/versions/2)"
    assert f"| 80 | 21.9 | 0.49 | 0.08 | 24.8 MB | 2 | {link} | `000000000000` |" in page
    assert "Older ones" not in page


def test_a_page_that_gets_too_long_for_mlflow_leaves_out_the_oldest(params):
    page = run_page(params, LINEAGE, ABOUT, [entry(40 * number) for number in range(500, 0, -1)])
    assert LONGEST_DESCRIPTION - 200 < len(page) <= LONGEST_DESCRIPTION
    assert "| 20000 | " in page and "| 40 | " not in page
    assert page.endswith("Older ones are versions of [vrt-quickstart](#/models/vrt-quickstart).")


@pytest.mark.parametrize("kind", [kind.model_fields["kind"].annotation for kind in get_args(get_args(Degradation)[0])], ids=str)
def test_every_kind_of_training_says_what_it_learns_and_what_one_has_without_it(kind, params):
    (name,) = get_args(kind)
    degradation = params.degradation.model_construct(kind=name)
    page = run_page(params.model_copy(update={"degradation": degradation}), LINEAGE, ABOUT, [])
    assert f"learns to **{TASKS[name]}**" in page
    assert INPUT_LABELS[name]


def test_before_the_first_checkpoint_there_is_nothing_to_use(params):
    assert "vrt restore" not in run_page(params, LINEAGE, ABOUT, [])


def test_a_recipe_is_recognised_by_what_it_trains(params):
    assert recipe_of(params) == "quickstart"
    assert recipe_of(params.model_copy(update={"name": "mine", "seed": 1})) == "quickstart"
    assert recipe_of(params.model_copy(update={"seed": 2})) == "own"


@pytest.mark.parametrize("content", [None, "", "[", "stages: {}", "stages: {prepare: {outs: [{path: other, md5: x}]}}", "stages: [1]"])
def test_without_dvc_the_version_of_the_data_is_not_recorded(tmp_path, content):
    lock = tmp_path / "dvc.lock"
    if content is not None:
        lock.write_text(content)
    assert dvc_version(lock, tmp_path.__class__("data/prepared")) == NOT_RECORDED


def test_dvcs_version_of_the_data_is_read_from_its_lock(tmp_path):
    lock = tmp_path / "dvc.lock"
    lock.write_text("schema: '2.0'\nstages:\n  prepare:\n    outs:\n    - {path: data/prepared, hash: md5, md5: abc.dir}\n")
    assert dvc_version(lock, tmp_path.__class__("data/prepared")) == "abc.dir"
