"""The commands `vrt prepare` and `vrt data import`."""

import argparse
from pathlib import Path

from vrt.data.layouts import LAYOUTS

RAW = Path("data/raw")
PREPARED = Path("data/prepared")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add both commands; each sets `run` to the function that executes it."""
    preparing = subparsers.add_parser("prepare", help="make data/prepared/ from the data set that params.yaml names")
    preparing.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: params.yaml)")
    preparing.set_defaults(run=run)
    data = subparsers.add_parser("data", help="import data sets").add_subparsers(dest="action", required=True, metavar="ACTION")
    layouts = "\n".join(f"  {name:<10} {layout.title}\n{'':13}{layout.folders}" for name, layout in LAYOUTS.items())
    importing = data.add_parser(
        "import",
        help="make a data set from a video, a folder of frames, or your copy of a published data set",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"layouts, and what the folder to import holds:\n{layouts}",
    )
    importing.add_argument(
        "source", type=Path, metavar="VIDEO_OR_FOLDER", help="any video file, or a folder of PNG or JPEG frames, with --layout of clips"
    )
    importing.add_argument("--name", required=True, help="name of the new data set: a folder below data/raw/")
    importing.add_argument("--layout", choices=LAYOUTS, help="how the folder's clips lie in it (default: one video, or the frames of one)")
    importing.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Execute a command that `add_parser` parsed; paths are relative to the current directory.

    Raises DataError or ParamsError, whose messages are for the user.
    """
    # Here, not above: they import torch, and `vrt --help` has no use for it.
    from vrt.data.importing import import_dataset
    from vrt.data.prepare import prepare
    from vrt.params import load_params

    if "source" in args:
        folder = import_dataset(args.source, args.name, RAW, args.layout)
        print(f"Next: set data.dataset: {args.name} in params.yaml, run `dvc add {folder}` to version it, and `dvc repro` to train.")
    else:
        name = load_params(args.params).data.dataset
        prepare(RAW / name, PREPARED)
    return 0
