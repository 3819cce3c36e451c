"""Takes the pictures of the documentation anew, of a real training through Prefect: `python -m docs.screenshots`.

It trains the quickstart in a clone of what is committed, with servers of its own, and needs Chromium; about six minutes on two cores.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def main() -> None:
    if CHROMIUM is None:
        raise SystemExit("no Chromium here; `apt install chromium` brings one")
    with tempfile.TemporaryDirectory(prefix="screenshots-") as scratch:
        project = Path(scratch) / "vrt"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
        keep_all_checkpoints(project / "params.yaml")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"VRT_HOME": f"{project}/.vrt", "PYTHONPATH": str(project), "PATH": path}
        run(project, environment, "vrt", "services", "up")
        try:
            environment |= exported(run(project, environment, "vrt", "services", "env"))
            take(train(project, environment), project, environment)
        finally:
            run(project, environment, "vrt", "services", "down")


def keep_all_checkpoints(params: Path) -> None:
    """Or the pictures would show three folders of five."""
    params.write_text(params.read_text().replace("keep_last: 3", "keep_last: 9"))


def run(project: Path, environment: Mapping[str, str], *command: str) -> str:
    """The output of `python -m COMMAND`."""
    return subprocess.run([sys.executable, "-m", *command], cwd=project, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def exported(script: str) -> dict[str, str]:
    return dict(re.findall(r"^export (\w+)='?([^'\n]*)'?$", script, flags=re.MULTILINE))


def train(project: Path, environment: Mapping[str, str]) -> str:
    """Train through Prefect. Returns the id of the flow run."""
    worker = subprocess.Popen([sys.executable, "-m", "pipelines"], cwd=project, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for line in worker.stdout:
            if "this works for them" in line:
                break
        told = run(project, environment, "prefect", "deployment", "run", "train/vrt", "--watch")
        return re.search(r"UUID: (\S+)", told)[1]
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.communicate()


def take(flow_run: str, project: Path, environment: Mapping[str, str]) -> None:
    # MLflow reads where it is when it is imported.
    os.environ.update(environment)
    from mlflow import MlflowClient

    client = MlflowClient()
    version = client.get_model_version_by_alias("vrt-quickstart", "latest-step")
    mlflow, step = environment["MLFLOW_TRACKING_URI"], int(version.tags["step"])
    experiment = client.get_run(version.run_id).info.experiment_id
    of_run = f"{mlflow}/#/experiments/{experiment}/runs/{version.run_id}"
    picture(f"{of_run}/artifacts/checkpoints/{step:08}/{step}_preview.png", "mlflow-checkpoints", 1280, 560)
    picture(f"{mlflow}/#/models/vrt-quickstart/versions/{version.version}", "mlflow-version", 1280, 860)
    picture(f"{environment['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/{flow_run}", "prefect-run", 1400, 700)
    shutil.copy2(project / "reports" / "evaluation" / "comparison.png", IMAGES / "restored.png")
    print(f"taken: {', '.join(sorted(path.name for path in IMAGES.glob('*.png')))} in {IMAGES}")


def picture(address: str, name: str, width: int, height: int) -> None:
    """A page as a person sees it, once its scripts have run."""
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = f"--window-size={width},{height}"
        # The first visit fills the browser's cache; pages whose parts come late are whole at the second.
        for _ in range(2):
            shot = f"--screenshot={IMAGES / name}.png"
            command = [CHROMIUM, *options, size, "--virtual-time-budget=20000", shot, address]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
            time.sleep(1)


if __name__ == "__main__":
    main()
