"""Write restored frames as a video: in segments that survive an interruption, joined at the end with the sound of the source."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange

from vrt.data.clips import DataError
from vrt.data.decoding import EXACT, REPAIR, check_size, colours, decoded, has_alpha, opened
from vrt.observe import log

LOSSLESS = (".mkv",)
LOSSY = (".mp4", ".mov")
VIDEOS = (*LOSSLESS, *LOSSY)
MICROSECOND = Fraction(1, 1_000_000)
SAID_NOTHING, IS_RGB = 2, 0
"""Colour matrices of ITU-T H.273 that are none."""


@dataclass(frozen=True)
class Look:
    """What tells a player how to show the pixels, in the numbers of ITU-T H.273."""

    matrix: int
    range: int
    primaries: int
    transfer: int
    aspect: Fraction
    """Width of a pixel by its height."""


@dataclass(frozen=True)
class Footage:
    """What is known of a video once all of it was decoded."""

    base: Fraction
    """Seconds per tick."""
    ticks: tuple[int, ...]
    """When each frame is shown; 0 is when the file begins."""
    deep: bool
    """More than 8 bits per channel."""
    look: Look

    def doubled(self) -> "Footage":
        """With a frame half-way between each two."""
        ticks = [tick for before, after in pairwise(self.ticks) for tick in (2 * before, before + after)]
        return Footage(self.base / 2, (*ticks, 2 * self.ticks[-1]), self.deep, self.look)


def read_footage(path: Path) -> Footage:
    """Decode a video whole, which is also the proof that it can be. Raises DataError as `video_frames` does, and where there is no frame."""
    ticks, first = [], None
    for count, frame in enumerate(decoded(path)):
        first = first or frame
        if has_alpha(frame):
            colours(path, frame, f"frame {count}", deep=False, exact=False)
        check_size(path, count, (first.height, first.width), (frame.height, frame.width))
        ticks.append(frame.pts)
    if first is None:
        raise DataError(f"{path}: expected a video, found no frame in it; {REPAIR}")
    with opened(path) as stream:
        aspect = stream.sample_aspect_ratio or Fraction(1)
        if round(first.rotation / 90) % 2:
            aspect = 1 / aspect
        look = Look(first.colorspace, first.color_range, first.color_primaries, first.color_trc, aspect)
        deep = max(component.bits for component in first.format.components) > 8
        # Some files give no times, only a rate.
        base, begins, rate = stream.time_base, _begins(stream.container), Fraction(stream.guessed_rate or 25)
    if base is None or None in ticks or len(set(ticks)) != len(ticks):
        return Footage(1 / rate, tuple(range(len(ticks))), deep, look)
    return Footage(base, tuple(tick - round(begins / base) for tick in sorted(ticks)), deep, look)


def write_segment(path: Path, frames: np.ndarray, footage: Footage, first: int) -> None:
    """Encode (D, H, W, 3), uint8 or for deep footage uint16, as frames `first` on; `path` appears when it is whole."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    lossless = path.suffix in LOSSLESS
    look, (height, width) = footage.look, frames.shape[1:3]
    with av.open(str(unfinished), "w") as container:
        stream = container.add_stream("ffv1" if lossless else "libx264", rate=Fraction(30))
        stream.width, stream.height = width, height
        stream.pix_fmt = _pixel_format(lossless, footage.deep, height, width)
        stream.time_base = stream.codec_context.time_base = footage.base
        codec = stream.codec_context
        codec.color_primaries, codec.color_trc, codec.sample_aspect_ratio = look.primaries, look.transfer, look.aspect
        if not lossless:
            codec.colorspace, codec.color_range = (SAID_NOTHING if look.matrix == IS_RGB else look.matrix), look.range
            # Without frames that depend on later ones segments can be joined as they are.
            stream.options = {"crf": "16", "preset": "medium", "bf": "0"}
        for number, pixels in enumerate(frames, start=first):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le" if footage.deep else "rgb24")
            frame = frame.reformat(format=stream.pix_fmt) if lossless else _as_the_source(frame, stream.pix_fmt, look)
            frame.pts, frame.time_base = footage.ticks[number], footage.base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    unfinished.replace(path)


def _pixel_format(lossless: bool, deep: bool, height: int, width: int) -> str:
    if lossless:
        return "gbrp16le" if deep else "bgr0"
    # Colour at half resolution needs even sides.
    halved = "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"
    return f"{halved}10le" if deep else halved


def _as_the_source(frame: av.VideoFrame, pixel_format: str, look: Look) -> av.VideoFrame:
    """An RGB frame in the matrix and range of the source, so that its colours come back as they went in."""
    matrix = None if look.matrix in (SAID_NOTHING, IS_RGB) else look.matrix
    full, given = ColorRange.JPEG, look.range or ColorRange.MPEG
    return frame.reformat(format=pixel_format, dst_colorspace=matrix, src_color_range=full, dst_color_range=given, interpolation=EXACT)


def _begins(container: av.container.InputContainer) -> Fraction:
    """Seconds on the file's own clock at which its first stream begins."""
    return (container.start_time or 0) * MICROSECOND


def join(segments: Sequence[Path], source: Path | None, target: Path) -> None:
    """Put segments together without encoding them again, with the sound of `source`; `target` appears when it is whole."""
    unfinished = target.with_name(f".unfinished-{target.name}")
    with av.open(str(unfinished), "w") as output, av.open(str(segments[0])) as first, _sounds(source) as heard:
        video = output.add_stream_from_template(first.streams.video[0])
        copies: dict[int, av.AudioStream] = {}
        for stream in heard.streams.audio if heard else []:
            try:
                copies[stream.index] = output.add_stream_from_template(stream)
            except ValueError:
                name = stream.codec_context.name
                log.warning("%s: a %s file can't hold its sound (%s), which is left out; .mkv takes any", source, target.suffix, name)
        packets = [_pictures(segments, video)]
        if copies:
            packets.append(_copied(heard, copies))
        # By time, as players read on: a file in which all pictures came first would be played without sound.
        for packet in heapq.merge(*packets, key=lambda packet: packet.dts * packet.time_base):
            output.mux(packet)
    unfinished.replace(target)


def _pictures(segments: Sequence[Path], video: av.VideoStream) -> Iterator[av.Packet]:
    for segment in segments:
        with av.open(str(segment)) as container:
            for packet in container.demux(container.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = video
                    yield packet


def _copied(heard: av.container.InputContainer, copies: Mapping[int, av.AudioStream]) -> Iterator[av.Packet]:
    begins = _begins(heard)
    for packet in heard.demux(*(heard.streams[index] for index in copies)):
        if packet.dts is not None:
            late = round(begins / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - late, packet.dts - late, copies[packet.stream.index]
            yield packet


@contextmanager
def _sounds(source: Path | None) -> Iterator[av.container.InputContainer | None]:
    if source is None:
        yield None
        return
    with av.open(str(source), metadata_errors="ignore") as container:
        yield container
