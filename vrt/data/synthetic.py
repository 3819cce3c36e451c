"""Clips from photographs: a camera that pans, zooms, turns and shakes over one region, and a cut-out that moves across.

Legend: D frames, H height, W width. A point is (x, y) in pixels. Coordinates of a frame have their origin in its centre.
All arithmetic is in float64, so that rounding to 8 bits hides what differs between processors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import tau

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vrt.data.clips import SPLITS, DataError, Split
from vrt.data.dataset import Synthetic, SyntheticSplit

# Pixels around a point that bicubic sampling looks at.
BICUBIC_SUPPORT = 2
# Width in pixels of a cut-out's soft edge.
EDGE = 2.0


def load_photographs() -> dict[str, np.ndarray]:
    """The photographs that scikit-learn ships: {file name: uint8 (H, W, 3)}."""
    from sklearn.datasets import load_sample_images  # half a second, and only `prepare` needs it

    shipped = load_sample_images()
    return {name.rsplit("/", 1)[-1]: image for name, image in zip(shipped.filenames, shipped.images)}


def cut_regions(dataset: Synthetic, split: Split, photographs: dict[str, np.ndarray]) -> list[Tensor]:
    """The regions of a split, each float64 (1, 3, H, W) in 0 to 255.

    Clips are made of these copies alone: a pixel outside its split's regions can't be reached.
    Raises DataError for an unknown photograph or a region that leaves it.
    """
    regions = []
    for name, (top, left, height, width) in getattr(dataset.splits, split).regions.items():
        key = f"splits.{split}.regions.{name}"
        if name not in photographs:
            raise DataError(f"{key}: found an unknown photograph; expected one of: {', '.join(sorted(photographs))}")
        whole_height, whole_width, _ = photographs[name].shape
        if top + height > whole_height or left + width > whole_width:
            found = f"[{top}, {left}, {height}, {width}] (top, left, height, width)"
            raise DataError(f"{key}: found {found}; expected a region within {whole_height}x{whole_width} pixels")
        pixels = photographs[name][top : top + height, left : left + width]
        regions.append(torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None])
    return regions


@dataclass(frozen=True)
class Path:
    """Where something is in each frame, as a similarity that maps its own coordinates."""

    centres: np.ndarray
    """(D, 2) pixels."""
    angles: np.ndarray
    """(D,) radians."""
    scales: np.ndarray
    """(D,)"""

    def apply(self, frame: int, points: np.ndarray) -> np.ndarray:
        """(..., 2) -> (..., 2)"""
        return points @ _turn(self.angles[frame]).T * self.scales[frame] + self.centres[frame]

    def invert(self, frame: int, points: np.ndarray) -> np.ndarray:
        """(..., 2) -> (..., 2)"""
        return (points - self.centres[frame]) / self.scales[frame] @ _turn(self.angles[frame])


@dataclass(frozen=True)
class Cutout:
    """A soft-edged blob of a region, and its path over the frame."""

    region: Tensor
    anchor: np.ndarray
    """(2,) centre within the region."""
    radius: float
    bumps: np.ndarray
    """(3, 2) amplitude and phase of the outline's 2nd to 4th harmonic."""
    path: Path

    def cover(self, picture: Tensor, frame: int, points: np.ndarray) -> Tensor:
        """`picture` (1, 3, H, W) seen at `points` (H, W, 2), with the cut-out over it."""
        own = self.path.invert(frame, points)
        turns = np.arctan2(own[..., 1], own[..., 0])
        outline = self.radius * (1 + sum(a * np.cos(k * turns + phase) for k, (a, phase) in enumerate(self.bumps, start=2)))
        inside = np.clip((outline - np.hypot(own[..., 0], own[..., 1])) / EDGE + 0.5, 0, 1)
        mask = torch.from_numpy(inside * inside * (3 - 2 * inside))
        return picture + mask * (_sample(self.region, own + self.anchor) - picture)


def render_clip(dataset: Synthetic, split: Split, number: int, regions: list[Tensor]) -> Iterator[np.ndarray]:
    """The frames of the split's clip `number`, each uint8 (H, W, 3); a function of the settings and the number alone.

    Clips take turns at showing the regions; the cut-out comes from the next one.
    Raises DataError where the drawn motion needs more room than the region has.
    """
    settings: SyntheticSplit = getattr(dataset.splits, split)
    rng = np.random.default_rng([dataset.seed, SPLITS.index(split), number])
    background, other = (regions[(number + k) % len(regions)] for k in (0, 1))
    camera = _draw_path(rng, settings.frames, dataset.motion.pan, dataset.motion.zoom, dataset.motion.rotation, dataset.motion.shake)
    points = _frame_points(settings.height, settings.width)
    start = _place(rng, background, np.stack([camera.apply(t, points) for t in range(settings.frames)]), f"{split} clip {number}")
    cutout = _draw_cutout(rng, dataset, settings, other)
    for frame in range(settings.frames):
        picture = cutout.cover(_sample(background, camera.apply(frame, points) + start), frame, points)
        yield picture[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def _draw_path(rng: np.random.Generator, frames: int, pan: float, zoom: float, rotation: float, shake: float) -> Path:
    """Even motion through the origin in mid-clip, and a shake: three sines of 0.05 to 0.3 turns per frame, as a hand's at 30 frames/s."""
    time = np.arange(frames) - (frames - 1) / 2
    direction, speed = rng.uniform(0, tau), pan * rng.uniform(0.4, 1)
    centres = np.outer(time, speed * np.array([np.cos(direction), np.sin(direction)]))
    frequency, phase = rng.uniform(0.05, 0.3, size=(3, 2, 1)), rng.uniform(0, tau, size=(3, 2, 1))
    centres += shake * rng.uniform(0.3, 1) * np.sin(tau * frequency * time + phase).mean(axis=0).T
    angles = np.radians(rotation) * rng.uniform(-1, 1) * time
    return Path(centres, angles, np.exp(np.log1p(zoom) * rng.uniform(-1, 1) * time))


def _draw_cutout(rng: np.random.Generator, dataset: Synthetic, settings: SyntheticSplit, region: Tensor) -> Cutout:
    side = min(settings.height, settings.width)
    radius = dataset.foreground.size * side / 2 * rng.uniform(0.6, 1)
    bumps = np.stack([rng.uniform(0, [0.2, 0.12, 0.08]), rng.uniform(0, tau, size=3)], axis=1)
    # It sweeps through the frame's middle half, turning a little faster than the camera does.
    through = rng.uniform(-0.25, 0.25, size=2) * (settings.width, settings.height)
    swept = _draw_path(rng, settings.frames, dataset.foreground.speed, 0.0, 2 * dataset.motion.rotation, 0.0)
    reach = radius * (1 + bumps[:, 0].sum()) + EDGE
    box = np.array([[-reach, -reach], [reach, reach]])
    anchor = _place(rng, region, box, "the cut-out")
    return Cutout(region, anchor, radius, bumps, Path(swept.centres + through, swept.angles, swept.scales))


def _place(rng: np.random.Generator, region: Tensor, points: np.ndarray, what: str) -> np.ndarray:
    """A random (x, y) to add to `points` (..., 2) so that sampling there stays within the region."""
    size = np.array(region.shape[:1:-1])
    least, most = points.reshape(-1, 2).min(axis=0), points.reshape(-1, 2).max(axis=0)
    room = size - 1 - 2 * BICUBIC_SUPPORT - (most - least)
    if (room < 0).any():
        needs = np.ceil(most - least).astype(int) + 1 + 2 * BICUBIC_SUPPORT
        found = f"motion over {needs[1]}x{needs[0]} pixels, expected at most the region's {size[1]}x{size[0]}"
        raise DataError(f"dataset.yaml: {what}: found {found}; enlarge the region, or lower motion, foreground or the frame size")
    return BICUBIC_SUPPORT - least + rng.uniform(0, 1, size=2) * room


def _sample(region: Tensor, points: np.ndarray) -> Tensor:
    """`region` (1, 3, h, w) at `points` (H, W, 2) -> (1, 3, H, W), bicubic. Scales stay near 1, so nothing aliases."""
    size = np.array(region.shape[:1:-1])
    grid = torch.from_numpy(2 * points / (size - 1) - 1)[None]
    return F.grid_sample(region, grid, mode="bicubic", padding_mode="border", align_corners=True)


def _frame_points(height: int, width: int) -> np.ndarray:
    """(H, W, 2): every pixel's (x, y) from the frame's centre."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    return np.stack([x - (width - 1) / 2, y - (height - 1) / 2], axis=-1)


def _turn(angle: float) -> np.ndarray:
    """(2, 2) rotation."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
