"""The flow `restore`: a video or a folder of pictures, restored with a registered checkpoint."""

from typing import Annotated

from prefect import flow, get_run_logger
from pydantic import Field

from pipelines.evaluate import Selector
from pipelines.process import run
from vrt.lifecycle import EXIT_CONTINUE_ME

Place = Annotated[str, Field(min_length=1)]


@flow(name="restore", log_prints=True)
def restore(
    input: Place,
    output: Place,
    checkpoint: Selector = "latest",
    sigma: Annotated[float, Field(ge=0, le=255)] | None = None,
    preview: bool = False,
) -> None:
    """Restore a video, or a folder of pictures.

    Args:
        input: A video, or a folder of pictures, on the worker's machine.
        output: Where to write the same, restored; it must not exist.
        checkpoint: latest, best or champion (of the name in params.yaml), LINEAGE@STEP, or a file of weights.
        sigma: The noise in grey levels (0 to 255), for networks that want to be told.
        preview: Also write a second one, with input and result side by side.
    """
    given = ["--sigma", str(sigma)] if sigma is not None else []
    shown = ["--preview"] if preview else []
    command = ["vrt", "restore", input, "-o", output, "--checkpoint", checkpoint, *given, *shown]
    while (ended := run(command, get_run_logger())).code == EXIT_CONTINUE_ME:
        pass
    ended.check()
