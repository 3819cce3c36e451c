"""The report says what the evaluation found, in files that are whole and in words that are true."""

import csv
import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vrt.evaluation.pictures import CAPTION_HEIGHT
from vrt.evaluation.report import summary_table, verdict, write_report
from vrt.evaluation.run import evaluate


@pytest.fixture
def better(noisy_data, params, shift):
    return evaluate(shift(-0.05), noisy_data, params, "val")


@pytest.fixture
def worse(noisy_data, params, shift):
    return evaluate(shift(0.05), noisy_data, params, "val")


def printed(evaluation) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(evaluation))
    return console.file.getvalue()


def test_metrics_json_holds_the_means_to_four_decimals(better, tmp_path):
    write_report(better, tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found == {name: round(value, 4) for name, value in better.metrics().items()}
    assert found["gain_db"] == pytest.approx(6, abs=0.3)


def test_clips_csv_holds_a_row_per_clip(better, tmp_path):
    write_report(better, tmp_path)
    with (tmp_path / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["clip"] for row in rows] == ["lake", "tree"]
    for row, result in zip(rows, better.rows):
        assert row["frames"] == "5"
        for name, value in result.scores.metrics().items():
            assert float(row[name]) == round(value, 4)


def test_table_md_has_psnr_and_ssim_as_papers_print_them(better, tmp_path):
    write_report(better, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| clip | frames | input | restored | input (Y) | restored (Y) |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| lake", "5"], ["| tree", "5"], ["| **mean**", "10"]]
    found = better.means
    assert lines[-1].split(" | ")[3] == f"{found.restored.psnr:.2f}/{found.restored.ssim:.4f}"
    assert lines[-1].endswith(f" | {found.restored.psnr_y:.2f}/{found.restored.ssim_y:.4f} |")


def test_comparison_png_shows_the_worst_crop_of_every_clip(better, tmp_path):
    write_report(better, tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "comparison.png"))
    truth = better.rows[0].worst_crops.truth
    assert truth.shape == (3, 64, 64)
    upper_left = (truth[:, 0, 0] * 255).round().numpy()
    np.testing.assert_array_equal(pixels[2 * CAPTION_HEIGHT, -3 * 64], upper_left)


def test_the_same_evaluation_writes_the_same_bytes_and_nothing_else(better, tmp_path):
    write_report(better, tmp_path / "deep" / "a")
    write_report(better, tmp_path / "deep" / "b")
    names = sorted(os.listdir(tmp_path / "deep" / "a"))
    assert names == ["clips.csv", "comparison.png", "metrics.json", "table.md"]
    for name in names:
        assert (tmp_path / "deep" / "a" / name).read_bytes() == (tmp_path / "deep" / "b" / name).read_bytes()


def test_a_report_that_fails_leaves_the_old_file_whole(better, worse, tmp_path, monkeypatch):
    write_report(better, tmp_path)
    before = (tmp_path / "metrics.json").read_bytes()

    def full_disk(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError):
        write_report(worse, tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["clips.csv", "comparison.png", "metrics.json", "table.md"]


def test_the_table_has_a_row_per_clip_and_the_mean(better):
    text = printed(better)
    for row in better.rows:
        line = next(line for line in text.splitlines() if row.name in line)
        cells = [f"{row.scores.input.psnr:.2f}", f"{row.scores.restored.psnr:.2f}", f"{row.scores.gain_db:+.2f}"]
        assert [cell for cell in cells if cell in line] == cells
    mean = next(line for line in text.splitlines() if "mean" in line)
    assert f"{better.means.gain_db:+.2f}" in mean and "10" in mean
    assert verdict(better) in " ".join(text.split())


def test_the_verdict_on_a_gain(better):
    before, after = better.means.input.psnr, better.means.restored.psnr
    assert verdict(better) == f"restored clips gain {after - before:.2f} dB PSNR over the noisy input ({before:.2f} -> {after:.2f} dB)"


def test_the_verdict_on_a_loss_says_so(worse):
    before, after = worse.means.input.psnr, worse.means.restored.psnr
    lost = f"restored clips lose {before - after:.2f} dB PSNR against the noisy input ({before:.2f} -> {after:.2f} dB)"
    assert verdict(worse) == f"the network is worse than its input: {lost}"
    assert verdict(worse) in " ".join(printed(worse).split())
