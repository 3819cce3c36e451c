"""`python -m vrt`."""

import sys

from vrt.cli import main

sys.exit(main())
