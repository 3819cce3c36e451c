"""`python -m vrt`."""

from vrt.cli import program

program()
