"""Takes the pictures of the documentation anew, of a real training through Prefect: `python -m docs.screenshots`.

It trains the quickstart in a clone of what is committed, with servers of its own, and needs Chromium; about six minutes on two cores.
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

# Prefect brings it.
from websockets.sync.client import connect

from tests.browser import CHROMIUM
from vrt import services
from vrt.observe import set_up_logging

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SECONDS_TO_DRAW = 8


def main() -> None:
    set_up_logging(0)
    if CHROMIUM is None:
        raise SystemExit("no Chromium here; `apt install chromium` brings one")
    with tempfile.TemporaryDirectory(prefix="screenshots-") as scratch:
        project = Path(scratch) / "vrt"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
        keep_all_checkpoints(project / "params.yaml")
        home = project / ".vrt"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        os.environ |= {"VRT_HOME": str(home), "PYTHONPATH": str(project), "PATH": path}
        services.up(home)
        try:
            os.environ |= services.load_environment(home)
            take(train(project), project)
        finally:
            services.down(home)


def keep_all_checkpoints(params: Path) -> None:
    """Or the pictures would show three folders of five."""
    params.write_text(params.read_text().replace("keep_last: 3", "keep_last: 9"))


def train(project: Path) -> str:
    """Train through Prefect. Returns the id of the flow run."""
    worker = subprocess.Popen([sys.executable, "-m", "pipelines"], cwd=project, stdout=subprocess.PIPE, text=True)
    try:
        for line in worker.stdout:
            if "this works for them" in line:
                break
        # Nobody reads on, and a full pipe would hold the worker up.
        threading.Thread(target=worker.stdout.read, daemon=True).start()
        command = [sys.executable, "-m", "prefect", "deployment", "run", "train/vrt", "--watch"]
        told = subprocess.run(command, cwd=project, check=True, stdout=subprocess.PIPE, text=True)
        return re.search(r"UUID: (\S+)", told.stdout)[1]
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait()


def take(flow_run: str, project: Path) -> None:
    # MLflow reads where it is when it is imported.
    from mlflow import MlflowClient

    client = MlflowClient()
    version = client.get_model_version_by_alias("vrt-quickstart", "latest-step")
    mlflow, step = os.environ["MLFLOW_TRACKING_URI"], int(version.tags["step"])
    experiment = client.get_run(version.run_id).info.experiment_id
    preview = f"{mlflow}/#/experiments/{experiment}/runs/{version.run_id}/artifacts/checkpoints/{step:08}/{step}_preview.png"
    with Browser() as browser:
        browser.open(mlflow)
        # As somebody has it who uses MLflow for trainings: at first it shows an assistant, and tools for language models.
        browser.do("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")
        browser.open(mlflow)
        browser.do("[...document.querySelectorAll('[role=button], label, div')].findLast(e => e.innerText == 'Model training').click()")
        browser.picture(preview, "mlflow-checkpoints", 1280, 560)
        browser.picture(f"{mlflow}/#/models/vrt-quickstart/versions/{version.version}", "mlflow-version", 1280, 800)
        browser.picture(f"{os.environ['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/{flow_run}", "prefect-run", 1400, 700)
    shutil.copy2(project / "reports" / "evaluation" / "comparison.png", IMAGES / "restored.png")
    print(f"taken: {', '.join(sorted(path.name for path in IMAGES.glob('*.png')))} in {IMAGES}")


class Browser:
    """A headless Chromium with a profile of its own, told what to do by its DevTools protocol. A context manager."""

    def __enter__(self) -> "Browser":
        # Its processes write there until the last of them is gone.
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        command = [CHROMIUM, *options, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        told = Path(self._profile.name) / "DevToolsActivePort"
        while not told.exists():
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{told.read_text().split()[0]}/json") as answer:
            (page,) = (target for target in json.load(answer) if target["type"] == "page")
        self._socket, self._asked = connect(page["webSocketDebuggerUrl"], max_size=None), 0
        return self

    def __exit__(self, *_: object) -> None:
        self._ask("Browser.close")
        self._socket.close()
        self._process.wait()
        self._profile.cleanup()

    def open(self, address: str) -> None:
        """A page, its parts that come late included. Again where it is open already: a new #place alone loads nothing."""
        self._ask("Page.navigate", url=address)
        time.sleep(SECONDS_TO_DRAW)
        self._ask("Page.reload")
        time.sleep(SECONDS_TO_DRAW)

    def do(self, script: str) -> None:
        found = self._ask("Runtime.evaluate", expression=script)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: the page is not what it was: {found['exceptionDetails']}")
        time.sleep(1)

    def picture(self, address: str, name: str, width: int, height: int) -> None:
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.open(address)
        (IMAGES / f"{name}.png").write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def _ask(self, method: str, **parameters: object) -> dict[str, Any]:
        self._asked += 1
        self._socket.send(json.dumps({"id": self._asked, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv())).get("id") != self._asked:
            pass
        return answer["result"]


if __name__ == "__main__":
    main()
