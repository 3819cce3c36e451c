"""`vrt demo`: the whole pipeline, from nothing to a restored clip and an address to look at."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vrt import services
from vrt.checkpoint.registry import MlflowRegistry
from vrt.checkpoint.tracking import Lineage
from vrt.data.clips import PreparedData
from vrt.lifecycle import EXIT_DONE
from vrt.observe import log
from vrt.params import load_params
from vrt.stages import PREPARED, REPORTS
from vrt.stages.lineage import lineage_of


def run_demo() -> int:
    """Start the services, run `dvc repro`, and print what came of it. Returns DVC's exit code where that fails."""
    started = time.monotonic()
    services.up()
    os.environ.update(services.load_environment())
    log.info("dvc repro: prepare, train, evaluate (Ctrl-C stops and saves; run it again to go on)")
    # Ctrl-C reaches the trainer too, which saves: wait for that instead of dying over it.
    signal.signal(signal.SIGINT, lambda *_: None)
    # DVC runs the stages with the first `python` on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    code = subprocess.run([sys.executable, "-m", "dvc", "repro"], env=os.environ | {"PATH": path}, check=False).returncode
    if code != 0:
        log.error("dvc repro ended with exit code %d; its messages above say why. What was trained so far is kept: run the same again", code)
        return code
    params = load_params(Path("params.yaml"))
    registry = MlflowRegistry(lineage_of(params, PreparedData.open(PREPARED)))
    registry.attach()
    Console().print(summary(registry.lineage, len(registry.registered()), time.monotonic() - started))
    Console().print(f"Browse the checkpoints: {registry.page}/artifacts", soft_wrap=True)
    return EXIT_DONE


def summary(lineage: Lineage, registered: int, seconds: float) -> Table:
    """The demo's closing table, from the reports that the stages wrote."""
    training = json.loads((REPORTS / "training.json").read_text())
    scores = json.loads((REPORTS / "evaluation" / "metrics.json").read_text())
    table = Table(title=lineage.id, show_header=False)
    table.add_row("steps trained", str(training["step"]))
    table.add_row("checkpoints registered", str(registered))
    table.add_row("test clips, input", f"{scores['input_psnr']:.2f} dB PSNR, {scores['input_ssim']:.3f} SSIM")
    table.add_row("test clips, restored", f"{scores['psnr']:.2f} dB PSNR, {scores['ssim']:.3f} SSIM")
    table.add_row("gain", f"{scores['gain_db']:+.2f} dB")
    table.add_row("time", f"{seconds // 60:.0f} min {seconds % 60:.0f} s")
    return table
