"""The pages of the documentation, and what they tell people to type."""

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
# What a command in a line of text begins with; names of functions and messages stand there, too.
PROGRAMS = (
    *("vrt ", "dvc ", "prefect ", "python -", "torchrun ", "make "),
    *("deploy/backup.sh ", "deploy/restore.sh ", "docker ", "kubectl ", "aws ", "VRT_", "REVISION="),
    *("cp ", "echo ", "export ", "git ", "kill ", "rclone ", "source "),
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of each block: no language is the shell's, `text` is what one sees."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every line of a block for the shell, and each command with an argument in a line of text, as one types it."""
    lines = [line for language, content in blocks(page) if not language for line in content.replace("\\\n", "").splitlines()]
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if span.startswith(PROGRAMS)]
    typed = [" ".join(line.split("  #")[0].split(" # ")[0].split()) for line in (*lines, *spans)]
    return [line for line in typed if line]
