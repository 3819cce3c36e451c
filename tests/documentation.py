"""The pages of the documentation, and what they tell people to type."""

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
PROGRAMS = (
    *("vrt ", "dvc ", "prefect ", "python -", "torchrun ", "make "),
    *("deploy/backup.sh ", "deploy/restore.sh ", "docker ", "kubectl ", "VRT_", "REVISION="),
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of each block: no language is the shell's."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Each command with an argument, in a block or in a line of text, as one types it."""
    lines = [line for language, content in blocks(page) if not language for line in content.replace("\\\n", "").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    typed = [" ".join(line.split("  #")[0].split(" # ")[0].split()) for line in (*lines, *spans)]
    return [line for line in typed if line.startswith(PROGRAMS) and "   " not in line]
