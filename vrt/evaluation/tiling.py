"""Restore a whole clip with bounded device memory: in tiles that overlap in time and space and blend without seams.

Away from cuts tiles equal the whole clip only where they start on the borders of its windows, at the lowest scale too; elsewhere windows
show the network other surroundings (docs/measured.md).

Axes: B batch, D frames, C channels, H height, W width; lower-case h, w are those of the input.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrt.model.network import MULTIPLE
from vrt.model.precision import computing

SMALLEST_TILE = 32
"""Height and width below which a tile is not made smaller where memory is too little: it would see next to nothing of its surroundings."""

Size = tuple[int, int, int]
"""Frames, height, width."""


def restore(network: nn.Module, degraded: Tensor, tile: Size, overlap: Size, upscale: int, progress: Callable[[], object] | None = None) -> Tensor:
    """Restore a clip: (B, D, C, h, w) -> (B, D, 3, h * upscale, w * upscale) on the CPU.

    `tile` and `overlap` are frames, height and width of the input; an axis shorter than its tile is taken whole, so a clip that
    fits in one tile gives the very bits of `network(degraded)`. On a CPU one tile at a time goes through the network, on a GPU as many as
    it has memory for (one, where PyTorch is told to be deterministic), and smaller ones where it has too little for one. A GPU computes in
    full float32: results are compared across machines, and not all have the coarser products. The modes (training or evaluation) of the
    network and its parts are as before afterwards. `progress` is called once per tile.

    Raises ValueError if the overlap does not leave a tile room to advance, or the network returns another shape than expected, and
    TooLittleMemory.
    """
    frames, height, width = degraded.shape[1], *degraded.shape[-2:]
    restored = torch.empty(len(degraded), frames, 3, height * upscale, width * upscale)
    tiling = Tiling(network, tile, overlap, upscale)
    for first, piece in tiling.stream(lambda start, stop: degraded[:, start:stop], (frames, height, width), progress=progress):
        restored[:, first : first + piece.shape[1]] = piece
    return restored


class TooLittleMemory(RuntimeError):
    """The device does not hold even the smallest tile; what else takes its memory may go away."""


class Tiling:
    """Restores clips with one network, tile by tile. Where memory is too little for a tile they become smaller, and stay so.

    How many go through the network together is found once, too, for tiles of one size.
    """

    def __init__(self, network: nn.Module, tile: Size, overlap: Size, upscale: int):
        """Raises ValueError where tiles would share as much as they are long, or less than nothing."""
        if any(o >= t or o < 0 for o, t in zip(overlap, tile)):
            raise ValueError(f"overlap: expected 0 or more and less than the tile {tuple(tile)}, found {tuple(overlap)}; lower evaluate.overlap")
        self._network, self._planned, self._upscale = network, (tile, overlap), upscale
        self._sides, self._overlap = tuple(tile[1:]), tuple(overlap[1:])
        self._most_at_once: int | None = None
        """As many tiles as memory was found to hold; None: it was never too little."""

    def stream(
        self, read: Callable[[int, int], Tensor], size: Size, first: int = 0, progress: Callable[[], object] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Restore a clip of `size`: yields (number of its first frame, (B, d, 3, H, W)) for each piece, in order.

        `read(start, stop)` gives the input's frames, (B, stop - start, C, h, w); it is asked in order, for frames that overlap by what tiles share.
        Begins at frame `first`. The pieces are those of `restore`, to the bit, wherever it begins, with tiles of the same size. `progress` is
        called for each tile that was planned, however many it takes. Raises TooLittleMemory.
        """
        (frames, *_), (shared_frames, *_) = self._planned
        spans = tile_spans(size[0], frames, shared_frames)
        ramps = blend_weights(spans, shared_frames, 1)
        waiting: Tensor | None = None
        begins = 0
        for number, ((start, stop), ramp) in enumerate(zip(spans, ramps)):
            if stop <= first:
                continue
            piece = self._restored(read(start, stop), progress) * ramp.view(-1, 1, 1, 1)
            # Frames before `start` are done, those from there on may get more from this tile.
            if waiting is None:
                waiting, begins = piece, start
            else:
                shared = begins + waiting.shape[1] - start
                waiting = torch.cat([waiting[:, : start - begins], waiting[:, start - begins :] + piece[:, :shared], piece[:, shared:]], dim=1)
            done = spans[number + 1][0] if number + 1 < len(spans) else stop
            ready = waiting[:, max(0, first - begins) : done - begins]
            if ready.shape[1]:
                yield max(first, begins), ready
            waiting, begins = waiting[:, done - begins :], done

    def _restored(self, degraded: Tensor, progress: Callable[[], object] | None) -> Tensor:
        """Frames that go into the network at once: (B, d, C, h, w) -> (B, d, 3, h * upscale, w * upscale)."""
        frames, *sides = degraded.shape[1], *degraded.shape[-2:]
        left = iter(range(tile_count((1, *sides), *self._planned)))
        while True:
            try:
                restored = self._with_tiles(degraded, lambda: progress() if progress and next(left, None) is not None else None)
            except torch.OutOfMemoryError as error:
                self._take_less(frames, sides, error)
                continue
            for _ in left:
                if progress:
                    progress()
            return restored

    def _take_less(self, frames: int, sides: Sequence[int], error: torch.OutOfMemoryError) -> None:
        tried = tuple(min(tile, side) for tile, side in zip(self._sides, sides))
        if max(tried) <= SMALLEST_TILE:
            raise TooLittleMemory(
                f"the device's memory does not hold a tile of {frames} frames of {tried[0]} x {tried[1]} pixels ({error}); "
                "lower the first number of evaluate.tile, or end what else takes memory"
            ) from error
        self._sides = tuple(min(side, max(SMALLEST_TILE, side // 2)) for side in tried)
        self._overlap = tuple(min(o, side // 2) for o, side in zip(self._overlap, self._sides))
        # Of smaller ones more may go together than of those that did not even go alone.
        self._most_at_once = None
        logging.getLogger("vrt").warning("the device has too little memory for a tile: going on with tiles of %d x %d pixels", *self._sides)

    def _with_tiles(self, degraded: Tensor, progress: Callable[[], object]) -> Tensor:
        batch, frames, _, height, width = degraded.shape
        upscale = self._upscale
        spans = [tile_spans(*axis) for axis in zip((height, width), self._sides, self._overlap)]
        ramps = [blend_weights(axis, o * upscale, upscale) for axis, o in zip(spans, self._overlap)]
        restored = torch.zeros(batch, frames, 3, height * upscale, width * upscale)
        places = list(itertools.product(*(range(len(axis)) for axis in spans)))
        parts = [[slice(*axis[i]) for axis, i in zip(spans, place)] for place in places]
        # Not inference_mode: masks that the network computes here and keeps must remain fit for training.
        with _evaluation_mode(self._network), torch.no_grad(), computing("fp32"):
            outputs = self._outputs([degraded[..., rows, columns] for rows, columns in parts])
            for place, (rows, columns), output in zip(places, parts, outputs):
                target = restored[..., rows.start * upscale : rows.stop * upscale, columns.start * upscale : columns.stop * upscale]
                _check_shape(output, target)
                down, across = (axis[i] for axis, i in zip(ramps, place))
                target += output * down.view(-1, 1) * across
                progress()
        return restored

    def _outputs(self, tiles: list[Tensor]) -> Iterator[Tensor]:
        """What the network makes of tiles of one size, in order, on the CPU: as many at once as its device has memory for."""
        device = next(self._network.parameters(), tiles[0]).device
        at_once, done = min(most_at_once(device, len(tiles)), self._most_at_once or len(tiles)), 0
        while done < len(tiles):
            some = tiles[done : done + at_once]
            try:
                together = self._network(torch.cat(some).to(device)).float().cpu()
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once = self._most_at_once = at_once // 2
                torch.cuda.empty_cache()
                continue
            yield from together.split(len(tiles[0]))
            done += len(some)


def most_at_once(device: torch.device, tiles: int) -> int:
    """How many tiles to try first: all of them on a GPU, which many keep busy; on a CPU one does, and takes the least memory.

    One also where PyTorch is told to be deterministic: a GPU may compute several in another order, and what it holds is not always the same.
    """
    return tiles if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled() else 1


class AnySize(nn.Module):
    """A network that takes clips of any height and width: the last row and column are repeated up to a size that VRT takes, and cut off again."""

    def __init__(self, network: nn.Module, upscale: int):
        super().__init__()
        self.network, self.upscale = network, upscale

    def forward(self, clip: Tensor) -> Tensor:
        """(B, D, C, h, w) -> (B, D, 3, h * upscale, w * upscale)."""
        height, width = clip.shape[-2:]
        missing = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
        padded = F.pad(clip.flatten(0, 1), missing, mode="replicate").unflatten(0, clip.shape[:2]) if any(missing) else clip
        return self.network(padded)[..., : height * self.upscale, : width * self.upscale]


def tile_count(size: Size, tile: Size, overlap: Size) -> int:
    """How many tiles `restore` takes for an input of `size`."""
    spans = [tile_spans(*axis) for axis in zip(size, tile, overlap)]
    return len(spans[0]) * len(spans[1]) * len(spans[2])


def tile_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Where the tiles of an axis start and end. The last one is moved inwards: it shares more, so that none needs padding."""
    if length <= tile:
        return [(0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return [(start, start + tile) for start in starts]


def blend_weights(spans: list[tuple[int, int]], ramp: int, scale: int) -> list[Tensor]:
    """Weights of the outputs of an axis, one vector per tile: at every place those of all tiles sum to 1.

    A weight rises linearly over `ramp` places from an edge that cuts the clip, where the network saw least of the surroundings.
    The ends of the clip are no cuts. A tile alone has weights of exactly 1.
    """
    end = spans[-1][1] * scale
    weights = []
    for start, stop in ((start * scale, stop * scale) for start, stop in spans):
        place = torch.arange(start, stop, dtype=torch.float64)
        from_start = place - start + 1 if start > 0 else torch.full_like(place, ramp + 1)
        from_stop = stop - place if stop < end else torch.full_like(place, ramp + 1)
        weights.append(torch.minimum(from_start, from_stop).clamp(max=ramp + 1))
    total = torch.zeros(end, dtype=torch.float64)
    for (start, stop), weight in zip(spans, weights):
        total[start * scale : stop * scale] += weight
    return [(weight / total[start * scale : stop * scale]).float() for (start, stop), weight in zip(spans, weights)]


def _check_shape(output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        found = f"found {tuple(output.shape)}"
        raise ValueError(f"output of the network for one tile: expected {tuple(target.shape)}, {found}; check network.upscale")


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module's own mode again, since parts may be frozen in another than the whole."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
