"""The small files that DVC shows."""

import json
from pathlib import Path

from vrt.stages.reports import write_training_report
from vrt.training.history import History


def test_what_was_adopted_at_the_end_of_its_training_has_a_report_without_the_loss_that_nobody_knows(tmp_path: Path):
    write_training_report(tmp_path, History([{"step": 12, "val/psnr": 30.12345, "val/ssim": 0.912345}]))
    assert json.loads((tmp_path / "training.json").read_text()) == {"step": 12, "val_psnr": 30.123, "val_ssim": 0.9123}
    assert (tmp_path / "loss.csv").read_text() == "step,train/loss,train/lr\n"
    assert (tmp_path / "curves.png").stat().st_size > 1000
