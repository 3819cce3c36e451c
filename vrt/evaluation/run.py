"""Evaluate a network: restore the clips of a split and measure them, and their input, against the truth, in memory that does not grow with a clip.

Axes: B batch (1), D frames, C channels, H height, W width; lower-case h, w are those of the input.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn

from vrt.data.clips import Clip, PreparedData
from vrt.data.degradations import continue_backwards
from vrt.data.evaluated import EvaluatedClip
from vrt.evaluation.baseline import neighbours_mean
from vrt.evaluation.between import Interpolating, group
from vrt.evaluation.measuring import ClipResult, Measuring, Scores
from vrt.evaluation.metrics import Quality
from vrt.evaluation.pictures import Triple
from vrt.evaluation.tiling import AnySize, Size, Tiling, tile_count
from vrt.observe import progress
from vrt.params import Between, Params

INPUT_LABELS = {
    "noise": "noisy input",
    "bicubic": "bicubic input",
    "blur_down": "enlarged input",
    "motion_blur": "blurred input",
    "recorded": "recorded input",
    "between": "mean of the two neighbours",
}
"""What one has without the network, by the kind of degradation, in a sentence that goes "... over the noisy input"."""

CLIPS_SHOWN = 24
"""Whose worst squares a report shows: those restored worst, by their PSNR."""


@dataclass(frozen=True)
class Evaluation:
    """The clips of a split, in its order, and their means: every clip counts the same, however long."""

    split: str
    input_label: str
    """What the input is called in a sentence, such as "noisy input"."""
    rows: tuple[ClipResult, ...]
    means: Scores

    @property
    def preview_frames(self) -> Triple:
        """The middle frame of the first clip, for `pictures.preview(*evaluation.preview_frames)`; the same at every validation."""
        return self.rows[0].middle

    def metrics(self) -> dict[str, float]:
        """The means under the names of `Scores.metrics`."""
        return self.means.metrics()


def evaluate(
    network: nn.Module, data: PreparedData, params: Params, split: str, limit: int | None = None, after_tile: Callable[[], object] = lambda: None
) -> Evaluation:
    """Restore and measure the first `limit` clips of a split (None: all), on whatever device the network is.

    Uses `params.evaluate` for tiles and `params.network.upscale`. Draws nothing at random and leaves the network as it was. What `after_tile`
    raises, which is called after each, ends it.

    Raises ValueError if there is no clip, or the network returns NaN, infinity or another size than the truth; TooLittleMemory where not even
    the smallest tile fits.
    """
    clips = [EvaluatedClip(data, params, clip) for clip in _chosen_clips(data, split, limit)]
    tile, overlap, upscale = params.evaluate.tile, params.evaluate.overlap, params.network.upscale
    rows: list[ClipResult] = []
    applied = AnySize(Interpolating(network, params.network.img_size[0]) if _interpolates(params) else network, upscale)
    tiling = Tiling(applied, tile, overlap, upscale)

    def advance(name: str) -> None:
        bar.advance(clip=name)
        after_tile()

    with progress(f"evaluate {split}", sum(tile_count(_input_size(clip, params), tile, overlap) for clip in clips), "tiles") as bar:
        for clip in clips:
            given = _Given(clip, params)
            measuring = Measuring(clip.name, clip.count, keep_middle=not rows, centre_only=params.evaluate.measured == "centre")
            pieces = tiling.stream(given.read, _input_size(clip, params), progress=lambda name=clip.name: advance(name))
            for first, piece in pieces:
                restored = piece[0, : max(0, clip.count - first)]
                measuring.add(first, *given.pairs(first, len(restored)), restored)
            rows.append(measuring.result())
            _show_only_the_worst(rows)
    means = Scores(_mean([row.scores.input for row in rows]), _mean([row.scores.restored for row in rows]))
    return Evaluation(split, INPUT_LABELS[params.degradation.kind], tuple(rows), means)


def validate(
    network: nn.Module, data: PreparedData, params: Params, limit: int | None = None, after_tile: Callable[[], object] = lambda: None
) -> Evaluation:
    """`evaluate` on the validation split: what the trainer calls between steps."""
    return evaluate(network, data, params, "val", limit, after_tile)


def _show_only_the_worst(rows: list[ClipResult]) -> None:
    """Of thousands of clips, pictures would take gigabytes, and nobody looks at them all."""
    shown = [number for number, row in enumerate(rows) if row.worst_crops]
    if len(shown) > CLIPS_SHOWN:
        best = max(shown, key=lambda number: rows[number].scores.restored.psnr)
        rows[best] = replace(rows[best], worst_crops=None)


class _Given:
    """What the network gets of a clip, and what it is measured against, of the frames at hand alone.

    A clip shorter than the network's windows is continued backwards, as in training; what is made of those frames is not measured.
    """

    def __init__(self, clip: EvaluatedClip, params: Params):
        self._clip, self._frames, self._between = clip, params.network.img_size[0], _interpolates(params)
        self._first = 0
        self._shown = self._truth = torch.empty(0)
        self._whole: Tensor | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """(1, stop - start, C, h, w)."""
        if self._clip.count < self._frames and not self._between:
            # Few frames, and tiles may be shorter still: what follows the clip's end may be any of them.
            if self._whole is None:
                self._shown, self._truth = self._clip.read(0, self._clip.count)
                self._whole = continue_backwards(self._shown, self._frames)
            return self._whole[None, start:stop]
        degraded, self._truth = self._clip.read(start, min(stop, self._clip.count))
        self._first = start
        if self._between:
            groups = group(degraded[None], self._frames)
            self._shown = neighbours_mean(groups[0], self._frames)
            return groups
        self._shown = degraded
        return degraded[None]

    def pairs(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """What one has without the network of some of the frames read last, (D, C, h, w), and their truth, (D, 3, H, W)."""
        part = slice(first - self._first, first - self._first + count)
        return self._shown[part], self._truth[part]


def _interpolates(params: Params) -> bool:
    return isinstance(params.degradation, Between)


def _input_size(clip: EvaluatedClip, params: Params) -> Size:
    """Frames, height and width of what `_Given` gives for a clip."""
    count = clip.count if _interpolates(params) else max(clip.count, params.network.img_size[0])
    return count, clip.height // params.network.upscale, clip.width // params.network.upscale


def _chosen_clips(data: PreparedData, split: str, limit: int | None) -> tuple[Clip, ...]:
    if limit is not None and limit < 1:
        raise ValueError(f"limit of clips: expected 1 or more, or None for all, found {limit}; raise it")
    clips = data.clips(split)[:limit]
    if not clips:
        raise ValueError(f"split {split!r}: expected at least one clip to evaluate, found none; add clips to it and prepare the data again")
    return clips


def _mean(qualities: list[Quality]) -> Quality:
    return Quality(*(sum(values) / len(values) for values in zip(*map(astuple, qualities))))
