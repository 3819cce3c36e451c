"""How tiles are best put together: blended over their overlap, averaged, or cut in its middle, beside restoring the whole clip at once.

`python -m benchmarks.tiling` takes the network that `make demo` left in model/ and the test clips in data/prepared/, prints a table, and writes
benchmarks/results/tiling-MACHINE.json and .md. Takes two minutes.

PSNR is against the truth. The seam is how much more the tiled result differs from the whole one on the pixels where a tile begins or ends than
on all others, in grey levels: 0 is invisible.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vrt.evaluation.tiling as tiling
from benchmarks.machine import describe
from benchmarks.report import show, write
from vrt.data.clips import PreparedData
from vrt.data.evaluated import EvaluatedClip
from vrt.evaluation.metrics import psnr
from vrt.params import load_params
from vrt.stages.evaluate import load_model

TILE, OVERLAPS = 48, (8, 16, 24)
Blend = Callable[[list[tuple[int, int]], int, int], list[Tensor]]


def averaged(spans: list[tuple[int, int]], ramp: int, scale: int) -> list[Tensor]:
    """Every tile counts the same wherever it has pixels."""
    return _shares(spans, scale, lambda start, stop: torch.ones(stop - start, dtype=torch.float64))


def cut(spans: list[tuple[int, int]], ramp: int, scale: int) -> list[Tensor]:
    """Each tile alone up to the middle of what it shares."""
    end = spans[-1][1] * scale

    def weight(start: int, stop: int) -> Tensor:
        place = torch.arange(start, stop)
        inside = (place >= start + (ramp // 2 if start else 0)) & (place < stop - (ramp // 2 if stop < end else 0))
        return inside.double()

    return _shares(spans, scale, weight)


def _shares(spans: list[tuple[int, int]], scale: int, weight: Callable[[int, int], Tensor]) -> list[Tensor]:
    total = torch.zeros(spans[-1][1] * scale, dtype=torch.float64)
    places = [(start * scale, stop * scale) for start, stop in spans]
    for start, stop in places:
        total[start:stop] += weight(start, stop)
    return [(weight(start, stop) / total[start:stop]).float() for start, stop in places]


def borders(size: int, overlap: int, blend: str) -> Tensor:
    """Whether each place of an axis is next to where a tile's weight jumps."""
    spans = tiling.tile_spans(size, TILE, overlap)
    marks = torch.zeros(size, dtype=torch.bool)
    for (_, stop), (start, _) in zip(spans, spans[1:]):
        edges = [start + overlap // 2] if blend == "cut" else [start, stop]
        for edge in edges:
            marks[max(0, edge - 1) : edge + 1] = True
    return marks


def measure() -> dict[str, Any]:
    """{overlap: {blend: {"psnr": dB, "seam": grey levels}}} and the PSNR of whole clips, means over the test clips."""
    params, data = load_params(Path("params.yaml")), PreparedData.open(Path("data/prepared"))
    network, _ = load_model(params)
    blends: dict[str, Blend] = {"feathered": tiling.blend_weights, "averaged": averaged, "cut": cut}
    clips = []
    for clip in data.clips("test"):
        evaluated = EvaluatedClip(data, params, clip)
        degraded, truth = evaluated.read(0, evaluated.count)
        size = (evaluated.count, *degraded.shape[-2:])
        clips.append((degraded[None], truth, tiling.restore(network, degraded[None], size, (0, 0, 0), params.network.upscale)[0]))
    found: dict[str, Any] = {"whole": sum(float(psnr(whole, truth).mean()) for _, truth, whole in clips) / len(clips)}
    ours = tiling.blend_weights
    for overlap in OVERLAPS:
        for name, blend in blends.items():
            tiling.blend_weights = blend
            found.setdefault(str(overlap), {})[name] = _judged(network, clips, overlap, name)
    tiling.blend_weights = ours
    return found


def _judged(network: torch.nn.Module, clips: list, overlap: int, name: str) -> dict[str, float]:
    quality, seam = 0.0, 0.0
    for degraded, truth, whole in clips:
        tile, shared = (degraded.shape[1], TILE, TILE), (0, overlap, overlap)
        tiled = tiling.restore(network, degraded, tile, shared, truth.shape[-1] // degraded.shape[-1])[0]
        quality += float(psnr(tiled, truth).mean()) / len(clips)
        # How steeply the error changes: a seam is a step in it.
        error = (tiled - whole) * 255
        for dim, marks in ((-2, borders(whole.shape[-2], overlap, name)), (-1, borders(whole.shape[-1], overlap, name))):
            steps = error.diff(dim=dim).abs().mean([k for k in range(4) if k - 4 != dim])
            at = marks[1:]
            seam += float(steps[at].mean() - steps[~at].mean()) / 2 / len(clips)
    return {"psnr": quality, "seam": seam}


def main() -> None:
    torch.set_num_threads(2)
    found = measure()
    rows = [("whole clips at once", f"{found['whole']:.3f} dB", "")]
    for overlap in OVERLAPS:
        for name, judged in found[str(overlap)].items():
            rows.append((f"tiles of {TILE}, {overlap} shared, {name}", f"{judged['psnr']:.3f} dB", f"{judged['seam']:.3f}"))
    tables = {"tiles": [("", "PSNR", "seam, grey levels"), *rows]}
    show(tables)
    print(f"written to {write('tiling', 'Putting tiles together', describe(), found, tables)}")


if __name__ == "__main__":
    main()
