"""Puts a quickstart run's results into the documentation: `publish_quickstart.py runs/quickstart`.

Copies its numbers to docs/results/quickstart.json and its picture to docs/quickstart.png, and writes the README's block
between the two `quickstart` marks from them.
"""

import json
import shutil
import sys
from pathlib import Path

from foveate.eval.figures import DOCS, publish


def main(run: Path) -> None:
    shutil.copyfile(run / "examples.png", DOCS / "quickstart.png")
    results = json.loads((run / "metrics.json").read_text()) | {"ask": json.loads((run / "ask.json").read_text())}
    publish("quickstart", results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
