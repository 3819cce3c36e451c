"""Write restored frames as a video: in segments that survive an interruption, joined at the end with the sound of the source."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vrt.data.clips import DataError
from vrt.data.decoding import REPAIR

LOSSLESS = (".mkv",)
LOSSY = (".mp4", ".mov")
VIDEOS = (*LOSSLESS, *LOSSY)


@dataclass(frozen=True)
class Timing:
    """When the frames of a video are shown."""

    base: Fraction
    """Seconds per tick."""
    ticks: tuple[int, ...]
    """Of each frame, from 0."""


def read_timing(path: Path) -> Timing:
    """The times of all frames of a video, by decoding it whole: it is also the proof that it can be. Raises DataError where it can't."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            ticks = [frame.pts for frame in container.decode(stream)]
            base = stream.time_base
            # Some files give no times, only a rate.
            rate = stream.guessed_rate or Fraction(25)
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{path}: expected a video, found a file that can't be decoded ({error}); {REPAIR}") from None
    if not ticks:
        raise DataError(f"{path}: expected a video, found no frame in it; {REPAIR}")
    if base is None or None in ticks or len(set(ticks)) != len(ticks):
        return Timing(1 / Fraction(rate), tuple(range(len(ticks))))
    return Timing(base, tuple(tick - min(ticks) for tick in sorted(ticks)))


def write_segment(path: Path, frames: np.ndarray, timing: Timing, first: int) -> None:
    """Encode uint8 (D, H, W, 3) as frames `first` on; `path` appears when it is whole."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    lossless = path.suffix in LOSSLESS
    height, width = frames.shape[1:3]
    with av.open(str(unfinished), "w") as container:
        stream = container.add_stream("ffv1" if lossless else "libx264", rate=Fraction(30))
        stream.width, stream.height = width, height
        # Colour at half resolution needs even sides.
        stream.pix_fmt = "bgr0" if lossless else "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"
        stream.time_base = stream.codec_context.time_base = timing.base
        if not lossless:
            # Without frames that depend on later ones segments can be joined as they are.
            stream.options = {"crf": "16", "preset": "medium", "bf": "0"}
        for number, pixels in enumerate(frames, start=first):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = timing.ticks[number], timing.base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    unfinished.replace(path)


def join(segments: Sequence[Path], source: Path | None, target: Path) -> None:
    """Put segments together without encoding them again, with the sound of `source`; `target` appears when it is whole."""
    unfinished = target.with_name(f".unfinished-{target.name}")
    with av.open(str(unfinished), "w") as output, av.open(str(segments[0])) as first:
        video = output.add_stream_from_template(first.streams.video[0])
        sounds = []
        with av.open(str(source), metadata_errors="ignore") if source else nullcontext() as heard:
            for stream in heard.streams.audio if heard else []:
                with suppress(ValueError):
                    sounds.append((stream, output.add_stream_from_template(stream)))
            for segment in segments:
                with av.open(str(segment)) as container:
                    for packet in container.demux(container.streams.video[0]):
                        if packet.dts is not None:
                            packet.stream = video
                            output.mux(packet)
            for stream, copy in sounds:
                heard.seek(0)
                for packet in heard.demux(stream):
                    if packet.dts is not None:
                        packet.stream = copy
                        output.mux(packet)
    unfinished.replace(target)
