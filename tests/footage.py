"""Videos to restore and to train on."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def moving(count: int, height: int = 24, width: int = 32) -> np.ndarray:
    texture = np.random.default_rng(1).integers(0, 256, (height // 4 + 1, width // 4 + count, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return np.stack([texture[:height, number : number + width] for number in range(count)])


def write_video(path: Path, frames: np.ndarray, codec: str = "libx264", pixels: str = "", sound: int = 0, times=None, look=None, turned=0) -> None:
    """`sound` in seconds; `times` in tenths; `look` (matrix, range, primaries, transfer) as ITU-T H.273 numbers them; `turned` in degrees."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels or ("yuv444p" if codec == "libx264" else "bgr0")
        stream.time_base = stream.codec_context.time_base = Fraction(1, 10)
        if codec == "libx264":
            stream.options = {"crf": "1"}
        if turned:
            stream.set_display_rotation(turned)
        if look:
            context = stream.codec_context
            context.colorspace, context.color_range, context.color_primaries, context.color_trc = look
        heard = container.add_stream("aac", rate=8000) if sound else None
        for number, frame in enumerate(frames):
            made = av.VideoFrame.from_ndarray(frame, format="rgb48le" if frame.dtype == np.uint16 else "rgb24")
            if look:
                made = made.reformat(format=stream.pix_fmt, dst_colorspace=look[0], src_color_range=2, dst_color_range=look[1])
            made.pts, made.time_base = times[number] if times else number, Fraction(1, 10)
            container.mux(stream.encode(made))
        container.mux(stream.encode())
        if heard:
            tone = av.AudioFrame.from_ndarray(np.sin(np.arange(8000 * sound)[None] / 5).astype(np.float32), format="fltp", layout="mono")
            tone.sample_rate = 8000
            for packet in [*heard.encode(tone), *heard.encode()]:
                container.mux(packet)
