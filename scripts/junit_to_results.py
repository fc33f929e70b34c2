"""Turns pytest's JUnit file into a results file: `junit_to_results.py tests.xml COMMIT > results.json`."""

import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch


def main(path: str, commit: str) -> None:
    results = []
    for case in ElementTree.parse(path).iter("testcase"):  # a file that pytest has just written
        outcomes = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        results.append(
            {
                "name": f"{case.get('classname')}.{case.get('name')}",
                "value": outcomes[0] if outcomes else "passed",
                "seconds": float(case.get("time", 0)),
            }
        )
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("transformers", "triton", "flash-attn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    facts = {
        "command": "scripts/gpu_suite.sh OUT tests",
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions,
    }
    json.dump(facts | {"results": results}, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
