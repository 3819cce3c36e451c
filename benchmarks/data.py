"""How quickly training samples come from prepared clips, beside OpenCV decoding whole PNG frames and cropping them, as KAIR does.

`python -m benchmarks.data` packs clips of 1280 x 720 pixels, reads 6 frames of 256 x 256 pixels at random places in turns, prints a table, and writes
benchmarks/results/data-MACHINE.json and .md. One core each. Needs `pip install -e ".[bench]"`. Takes two minutes.

`--pictures FOLDER` names photographs of at least 2000 pixels to make the clips of: reduced, they have no traces of compression left.
Without it the clips are made of scikit-learn's two photographs, enlarged, which both ways compress better than real frames.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.machine import describe
from benchmarks.report import show, write
from vrt.data.clips import PreparedData
from vrt.data.synthetic import load_photographs
from vrt.data.writing import writing

HEIGHT, WIDTH, FRAMES = 720, 1280, 12
CROP, WINDOW = 256, 6
AIM_SPEED, AIM_SIZE = 8, 1.25


def clips_of(folder: Path | None) -> dict[str, np.ndarray]:
    """{name: uint8 (FRAMES, HEIGHT, WIDTH, 3)}: a camera that pans over each picture."""
    if folder:
        pictures = {path.stem: Image.open(path).convert("RGB") for path in sorted(folder.iterdir())}
    else:
        pictures = {name.split(".")[0]: Image.fromarray(pixels) for name, pixels in load_photographs().items()}
    clips = {}
    for name, picture in pictures.items():
        whole = np.asarray(ImageOps.fit(picture, (WIDTH + 2 * FRAMES, HEIGHT + FRAMES), Image.Resampling.LANCZOS))
        clips[name] = np.stack([whole[t : t + HEIGHT, 2 * t : 2 * t + WIDTH] for t in range(FRAMES)])
    return clips


def write_pngs(root: Path, clips: dict[str, np.ndarray]) -> int:
    """Frames as the published data sets have them. Returns their bytes."""
    for name, frames in clips.items():
        (root / name).mkdir(parents=True)
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(root / name / f"{number:08}.png")
    return sum(path.stat().st_size for path in root.rglob("*.png"))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(folder: Path | None, rounds: int, scratch: Path) -> dict[str, Any]:
    """Samples per second of both ways, every round's; the median of their ratios; sizes in bytes."""
    clips = clips_of(folder)
    pngs = write_pngs(scratch / "png", clips)

    def pack() -> None:
        with writing(scratch / "prepared", "benchmark") as writer:
            for name, frames in clips.items():
                writer.add("train", name, FRAMES, frames)

    packing = seconds(pack)
    data = PreparedData.open(scratch / "prepared")
    rng = np.random.default_rng(1)
    places = []
    for _ in range(20):
        clip = data.clips("train")[rng.integers(len(clips))]
        places.append((clip, *(int(rng.integers(size)) for size in (FRAMES - WINDOW + 1, HEIGHT - CROP + 1, WIDTH - CROP + 1))))

    def whole_frames(clip: Any, first: int, top: int, left: int) -> np.ndarray:
        frames = [cv2.imread(str(scratch / "png" / clip.name / f"{number:08}.png")) for number in range(first, first + WINDOW)]
        return np.stack([frame[top : top + CROP, left : left + CROP, ::-1] for frame in frames])

    def packed(clip: Any, first: int, top: int, left: int) -> np.ndarray:
        return data.read(clip, first, WINDOW, top, left, CROP, CROP)

    for place in places:
        np.testing.assert_array_equal(whole_frames(*place), packed(*place))
    found: dict[str, list[float]] = {"opencv": [], "packed": []}
    for turn in range(rounds):
        for name, read in (("opencv", whole_frames), ("packed", packed))[:: 1 if turn % 2 else -1]:
            taken = seconds(lambda read=read: [read(*place) for place in places])
            found[name].append(len(places) / taken)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(found["packed"], found["opencv"]))
    sizes = {
        "png_bytes": pngs,
        "packed_bytes": sum(clip.bytes for clip in data.index.clips),
        "raw_bytes": sum(frames.nbytes for frames in clips.values()),
    }
    return (
        found | sizes | {"ratio": ratio, "pack_ms_per_frame": packing * 1000 / FRAMES / len(clips), "clips": len(clips), "own_pictures": bool(folder)}
    )


def rows_of(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, measured, judged) for the table."""

    def spread(name: str) -> str:
        return f"{statistics.median(found[name]):.1f} samples/s ({min(found[name]):.1f} to {max(found[name]):.1f})"

    size = found["packed_bytes"] / found["png_bytes"]
    made_of = "photographs" if found["own_pictures"] else "enlarged photographs"
    return [
        (f"{found['clips']} clips of {WIDTH} x {HEIGHT} made of {made_of}; samples of {WINDOW} x {CROP} x {CROP}, one core", "", ""),
        ("whole PNG frames by OpenCV, cropped", spread("opencv"), ""),
        ("packed clips", spread("packed"), f"{found['ratio']:.1f} times as many (aim: {AIM_SPEED})"),
        ("size of PNG, packed, raw", " / ".join(f"{found[key] / 1e6:.1f} MB" for key in ("png_bytes", "packed_bytes", "raw_bytes")), ""),
        ("packed beside PNG", f"{size:.2f}", f"(aim: at most {AIM_SIZE})"),
        ("packing", f"{found['pack_ms_per_frame']:.0f} ms a frame", ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="folder of photographs to make the clips of (default: scikit-learn's two)")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is read each way (default: 7)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args.pictures, args.rounds, Path(scratch))
    tables = {"reading": [("", "measured", "judged"), *rows_of(found)]}
    show(tables)
    print(f"written to {write('data', 'Training samples from prepared clips', describe(), found, tables)}")


if __name__ == "__main__":
    main()
