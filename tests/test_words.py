"""Plain words: terms that the glossary replaces must not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hpc_imagenet", "conf", "docs", "slurm", "benchmarks", "notebooks", "tests")
ENDINGS = (".py", ".md", ".yaml", ".sh", ".sbatch")
# Metaphors and riddles of an earlier language, and what to write instead.
INSTEAD = {
    r"told|tells?|telling": "log, report, print, pass",
    r"ask|asks|asked|asking": "query, request, require",
    r"whoever|whomever|somebody|nobody|everybody|anybody": "another process, another user, no process",
    r"mend|mends|mended|mending": "fix",
    r"wanted": "expected, requested",
    r"vouch\w*": "verify, record",
    r"flaws?|glance\w*": "error, peek",
    r"shelf|aftermath|verdicts?": "catalog, requeue, bottleneck",
    r"doors?|rooms?|house": "command line, package, workspace, free space",
    r"lies|lie|lying|stands?|standing|stood": "is stored, exists",
    r"treat|treats|treated|treatments?": "transform, process",
    r"pictures?": "image",
    r"pace|verbs?|loose": "rate limit, command, class folders",
    r"last words|word of": "last error line, report",
}
PRIVATE = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(INSTEAD)})(?![A-Za-z])", re.IGNORECASE)
# Legitimate uses: methods of Python's files and Optuna's studies, the Unix user `nobody`, two compounds.
ALLOWED = re.compile(r"\.(tell|ask)\(|[`\"]nobody[`\"]|stand-?alone|stands for", re.IGNORECASE)
SELF = Path(__file__).name


def pages() -> list[Path]:
    found = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in ENDINGS]
    return sorted([*found, ROOT / "slurm/lab/lab", ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


@pytest.mark.slow
def test_no_private_words() -> None:
    hits = []
    for path in pages():
        if path.name == SELF:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in PRIVATE.finditer(ALLOWED.sub("", line)):
                hint = next(new for old, new in INSTEAD.items() if re.fullmatch(old, match[0], re.IGNORECASE))
                hits.append(f"{path.relative_to(ROOT)}:{number}: {match[0]} (write: {hint})")
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize("line", ["the job is told to stop", "Nobody asks Slurm", "what lies in the house"])
def test_private_words_are_found(line: str) -> None:
    assert PRIVATE.search(line)
