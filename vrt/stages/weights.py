"""`vrt weights`: files of network weights from one form into another."""

import argparse
from pathlib import Path

from vrt.lifecycle import EXIT_DONE


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `vrt weights`."""
    weights = commands.add_parser("weights", help="convert network weights between .pth and .safetensors")
    actions = weights.add_subparsers(dest="action", required=True, metavar="ACTION")
    convert = actions.add_parser("convert", help="write the same weights in the form that the new name asks for")
    convert.add_argument("source", type=Path, help="a .pth file (plain, or nested under params or params_ema) or a .safetensors file")
    convert.add_argument("target", type=Path, help="the file to write: *.pth or *.safetensors; must not exist")
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from vrt.checkpoint.weights import read_weights, write_weights
    from vrt.observe import log

    weights = read_weights(args.source)
    write_weights(weights, args.target)
    nested = f", nested under {weights.nesting!r}" if weights.nesting else ""
    log.info("%s: %d tensors of %s%s, %.1f MB", args.target, len(weights.tensors), args.source, nested, args.target.stat().st_size / 1e6)
    return EXIT_DONE
