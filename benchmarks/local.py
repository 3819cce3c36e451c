"""Services for a benchmark alone, in a folder that goes with it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vrt import services


@contextmanager
def local_services() -> Iterator[Path]:
    """Start S3 and MLflow (or use those that the environment names), and yield a scratch folder on the same disk."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        home = Path(scratch) / ".vrt"
        services.up(home)
        try:
            os.environ |= services.load_environment(home)
            yield Path(scratch)
        finally:
            services.down(home)
