"""The command `vrt restore`."""

import argparse
import os
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `vrt restore`."""
    told = "restore a video, or a folder of pictures; a network for frames in between doubles their number"
    parser = subparsers.add_parser(
        "restore", help=told, description=f"{told}. Interrupted, it goes on where it stopped when it is run again (exit code 75)."
    )
    parser.add_argument("source", type=Path, metavar="INPUT", help="any video file, or a folder of PNG or JPEG pictures")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new .mp4, .mov or (lossless) .mkv with the sound of INPUT; or a folder")
    chosen = "latest, best or champion (of the name in the params file), LINEAGE@STEP, RUN@STEP, or a file of weights (default: latest)"
    parser.add_argument("--checkpoint", default="latest", metavar="CHECKPOINT", help=chosen)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file, for the tiles (default: params.yaml)")
    parser.add_argument("--preview", action="store_true", help="also write OUTPUT-preview, with input (left) and result (right) side by side")
    parser.add_argument("--sigma", type=_grey_levels, help="the noise in grey levels (0 to 255), for networks that want to be told")
    parser.set_defaults(run=run)


def _grey_levels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 255:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a number from 0 to 255")
    return value


def run(args: argparse.Namespace) -> int:
    """Execute the command. Raises ValueError or RuntimeError, whose messages are for the user."""
    from vrt.services import load_environment
    from vrt.stages.restore import run_restore

    os.environ.update(load_environment())
    return run_restore(args.source, args.output, args.checkpoint, args.params, args.sigma, args.preview)
