"""A table of the hostile inputs and what becomes of each: `python -m tests.hostile [KIND …]`.

Exit code 1: one of them is not refused or accepted as expected.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # as pytest does


def main() -> int:
    """Print the table and return the exit code."""
    from all_cases import CASES
    from cases import judge

    logging.disable()  # the retries of downloads
    chosen = [case for case in CASES if not sys.argv[1:] or case.kind in sys.argv[1:]]
    wrong = 0
    counts: dict[str, list[int]] = {}
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            judged = judge(case, Path(folder))
            line = judged.line.replace(folder, "")
        wrong += bool(judged.problem)
        count = counts.setdefault(case.kind, [0, 0, 0])
        count[2 if judged.problem else 1 if judged.line.startswith("ok: ") else 0] += 1
        print(f"{'WRONG' if judged.problem else '':5} {case.kind:9}{case.name:52} {line:.200}")
    print(f"\n{'kind':9}{'inputs':>8}{'refused in one line':>22}{'accepted':>10}{'wrong':>7}")
    for kind, (refused, accepted, bad) in counts.items():
        print(f"{kind:9}{refused + accepted + bad:8}{refused:22}{accepted:10}{bad:7}")
    sums = [sum(count[i] for count in counts.values()) for i in range(3)]
    print(f"{'all':9}{sum(sums):8}{sums[0]:22}{sums[1]:10}{sums[2]:7}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
