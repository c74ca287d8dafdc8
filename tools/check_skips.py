"""Fail if a test was skipped in every target that collected it: such a test checks nothing anywhere.

Usage: python tools/check_skips.py REPORT.xml ...   (pytest's --junitxml files, one a target)
"""

from __future__ import annotations

import sys
from xml.etree import ElementTree


def main(paths: list[str]) -> int:
    ran: set[str] = set()
    skipped: set[str] = set()
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            (skipped if case.find("skipped") is not None else ran).add(name)
    if not ran:
        print("no test ran in any target")
        return 1
    for name in sorted(skipped - ran):
        print(f"skipped in every target: {name}")
    print(f"{len(ran)} tests ran, {len(skipped - ran)} were skipped everywhere")
    return 1 if skipped - ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
