"""Turns pytest's JUnit file into a results file: `junit_to_results.py tests.xml COMMIT > results.json`."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter

from foveate.eval.facts import result, run_facts

OUTCOMES = ("passed", "failure", "error", "skipped")


def main(path: str, commit: str) -> None:
    tests = []
    for case in ElementTree.parse(path).iter("testcase"):  # a file that pytest has just written
        outcome = next((kind for kind in OUTCOMES if case.find(kind) is not None), "passed")
        name = f"{case.get('classname')}.{case.get('name')}"
        tests.append({"name": name, "outcome": outcome, "seconds": float(case.get("time", 0))})
    counts = Counter(test["outcome"] for test in tests)
    results = [result(outcome, counts[outcome], "tests", len(tests)) for outcome in OUTCOMES]
    facts = run_facts("scripts/gpu_suite.sh OUT tests", ("torch", "transformers")) | {"commit": commit}
    json.dump(facts | {"results": results, "tests": tests}, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
