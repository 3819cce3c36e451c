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
    importing.add_argument("--meta-info", type=Path, metavar="FILE", help="with --layout: train only on the clips of this list, as KAIR has them")
    importing.set_defaults(run=run)
    checking = data.add_parser("check", help="decode a whole data set and say what is missing or damaged, before any GPU is paid for")
    told = "a data set below data/raw/, or with --layout a folder that is still to be imported (default: the one that params.yaml names)"
    checking.add_argument("subject", nargs="?", metavar="NAME_OR_FOLDER", help=told)
    checking.add_argument("--layout", choices=LAYOUTS, help="how the folder's clips lie in it; see `vrt data import --help`")
    checking.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: params.yaml)")
    checking.set_defaults(run=run_check)


def run(args: argparse.Namespace) -> int:
    """Execute a command that `add_parser` parsed; paths are relative to the current directory.

    Raises DataError or ParamsError, whose messages are for the user.
    """
    # Here, not above: they import torch, and `vrt --help` has no use for it.
    from vrt.data.importing import import_dataset
    from vrt.data.prepare import prepare
    from vrt.params import load_params

    if "source" in args:
        folder = import_dataset(args.source, args.name, RAW, args.layout, args.meta_info)
        print(f"Next: set data.dataset: {args.name} in params.yaml, run `dvc add {folder}` to version it, and `dvc repro` to train.")
    else:
        name = load_params(args.params).data.dataset
        prepare(RAW / name, PREPARED)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Check a data set, against the params file and the prepared clips where it is the one they are about.

    Raises DataError where it is told a layout and no folder.
    """
    from vrt.data.check import check_copy, check_params, check_prepared, check_raw, show
    from vrt.data.errors import DataError
    from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_DONE
    from vrt.params import load_params

    if args.layout:
        if args.subject is None:
            raise DataError("--layout: expected the folder to check too, found none; say `vrt data check FOLDER --layout LAYOUT`")
        return EXIT_DONE if show(f"{args.subject}, layout {args.layout}", check_copy(Path(args.subject), args.layout), []) else EXIT_BAD_INPUT
    params = load_params(args.params) if args.subject is None or args.params.exists() else None
    name = args.subject or params.data.dataset
    found, problems = check_raw(RAW / name), []
    if params and name == params.data.dataset:
        problems = check_params(found, params) + check_prepared(PREPARED)
    return EXIT_DONE if show(str(RAW / name), found, problems) else EXIT_BAD_INPUT
