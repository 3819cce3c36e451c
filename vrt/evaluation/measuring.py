"""Measure a clip against the truth, piece by piece.

Axes: D frames, C channels, H height, W width; lower-case h, w are those of the input.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vrt.evaluation.baseline import baseline
from vrt.evaluation.metrics import Quality, qualities
from vrt.evaluation.pictures import Place, Triple, worst_crop


@dataclass(frozen=True)
class Scores:
    """How good the input is and how good what the network makes of it, each against the truth."""

    input: Quality
    restored: Quality

    @property
    def gain_db(self) -> float:
        """PSNR of the restored less that of the input."""
        return self.restored.psnr - self.input.psnr

    def metrics(self) -> dict[str, float]:
        """A flat mapping: psnr, ssim, psnr_y, ssim_y of the restored, each again as input_..., and gain_db."""
        of_input = {f"input_{name}": value for name, value in asdict(self.input).items()}
        return asdict(self.restored) | of_input | {"gain_db": self.gain_db}


@dataclass(frozen=True)
class ClipResult:
    """One clip: its scores and what to show of it."""

    name: str
    frames: int
    """That were measured."""
    scores: Scores
    worst: Place
    """Where the restoration is furthest from the truth."""
    worst_crops: Triple | None
    """That place of it; kept of some clips only."""
    middle: Triple | None
    """The frame in the middle of the clip; kept of the first clip only, since frames are large."""


class Measuring:
    """Takes a clip's frames as they are restored; holds none of them but what is shown."""

    def __init__(self, name: str, count: int, keep_middle: bool, centre_only: bool):
        """`count` frames are restored; `centre_only`: the one in the middle of them alone is measured."""
        self._name, self._keep_middle, self._middle = name, keep_middle, count // 2
        self._measured = range(count // 2, count // 2 + 1) if centre_only else range(count)
        self._qualities: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._broken: list[int] = []
        self._worst: tuple[float, Place, Triple] | None = None
        self._kept: Triple | None = None

    def add(self, first: int, degraded: Tensor, truth: Tensor, restored: Tensor) -> None:
        """Frames from `first` on: `degraded` (D, C, h, w), `truth` (D, 3, H, W), `restored` (D, 3, H, W).

        Raises ValueError where `restored` has another shape than `truth`.
        """
        if restored.shape != truth.shape:
            found = f"found {tuple(restored.shape)}"
            raise ValueError(f"restored clip {self._name!r}: expected the shape of the truth {tuple(truth.shape)}, {found}; prepare the data again")
        part = slice(max(first, self._measured.start) - first, min(first + len(truth), self._measured.stop) - first)
        degraded, truth, restored = degraded[part], truth[part], restored[part]
        if not len(truth):
            return
        first += part.start
        self._broken += [first + k for k in (~restored.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()]
        if self._broken:
            return
        before = baseline(degraded, *truth.shape[-2:])
        for found, frames in zip(self._qualities, (before, restored)):
            found.append(qualities(frames, truth))
        shown = Triple(before, restored, truth)
        error, place = worst_crop(restored, truth)
        if self._worst is None or error > self._worst[0]:
            self._worst = error, place._replace(frame=first + place.frame), Triple(*(place.cut(frames).clone() for frames in shown))
        if self._keep_middle and first <= self._middle < first + len(truth):
            self._kept = Triple(*(frames[self._middle - first].clone() for frames in shown))

    def result(self) -> ClipResult:
        """Raises ValueError where the network made NaN or infinity of any frame."""
        if self._broken:
            found = f"found NaN or infinity in {len(self._broken)} of {len(self._measured)} frames, first in frame {self._broken[0]}"
            remedy = "the weights are damaged or the training diverged: go back to an earlier checkpoint, or lower optimizer.lr"
            raise ValueError(f"restored clip {self._name!r}: expected finite values, {found}; {remedy}")
        assert self._worst, f"{self._name}: no frame was added"
        scores = Scores(*(Quality(*torch.cat(found).mean(0).tolist()) for found in self._qualities))
        return ClipResult(self._name, len(self._measured), scores, self._worst[1], self._worst[2], self._kept)
