"""`vrt weights`: files of network weights from one form into another."""

import argparse
from pathlib import Path

from vrt.lifecycle import EXIT_DONE

SETS = ("params_ema", "params")
"""What a file may nest its weights under: AVERAGED and TRAINED of `vrt.checkpoint.weights`, which takes a second to import."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `vrt weights`."""
    weights = commands.add_parser("weights", help="convert network weights between .pth and .safetensors")
    actions = weights.add_subparsers(dest="action", required=True, metavar="ACTION")
    convert = actions.add_parser("convert", help="write the same weights in the form that the new name asks for")
    convert.add_argument("source", type=Path, help="a .pth file (plain, or nested under params or params_ema) or a .safetensors file")
    convert.add_argument("target", type=Path, help="the file to write: *.pth or *.safetensors; must not exist")
    convert.add_argument("--under", choices=SETS, default=SETS[0], help="which weights to take where a .pth file has both (default: %(default)s)")
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from vrt.checkpoint.weights import read_weights, write_weights
    from vrt.observe import log

    weights = read_weights(args.source, args.under)
    write_weights(weights, args.target)
    if weights.left_out:
        remedy = "".join(f"; --under {key} takes those" for key in weights.left_out if key in SETS)
        left_out = ", ".join(map(repr, weights.left_out))
        log.warning("%s: has only what %s holds under %r; left out: %s%s", args.target, args.source, weights.nesting, left_out, remedy)
    nested = f", nested under {weights.nesting!r}" if weights.nesting else ""
    log.info("%s: %d tensors of %s%s, %.1f MB", args.target, len(weights.tensors), args.source, nested, args.target.stat().st_size / 1e6)
    return EXIT_DONE
