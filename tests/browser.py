"""What a person sees of a page: headless Chromium, where there is one."""

import html
import re
import shutil
import subprocess
import tempfile
import time

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `apt install chromium` brings one")
PATIENCE_SECONDS = 180.0


def text_of(address: str) -> str:
    """The words on a page, once its scripts have run."""
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1400,3000"]
        command = [CHROMIUM, *options, "--virtual-time-budget=20000", "--dump-dom", address]
        page = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=120).stdout
    without_scripts = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", without_scripts)))


def shows(address: str, *words: str) -> None:
    """Assert that a page shows all of these at once, sooner or later."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while True:
        text = text_of(address)
        missing = [word for word in words if word not in text]
        if not missing:
            return
        assert time.monotonic() < ends, f"{address} does not show {missing}; it shows: {text[:3000]}"
