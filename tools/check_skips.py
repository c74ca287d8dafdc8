"""Fail if a test was skipped in every target that collected it: such a test checks nothing anywhere.

A test marked ``cpu`` that this host cannot execute is named and does not fail; another host runs it.

Usage: python tools/check_skips.py REPORT.xml ...   (pytest's --junitxml files, one a target)
"""

from __future__ import annotations

import sys
from xml.etree import ElementTree

LEFT_OUT = "left out for cpu"
"""The property that tests/conftest.py gives a test, with the name of what the CPU lacks."""


def main(paths: list[str]) -> int:
    ran: set[str] = set()
    skipped: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            skip = case.find("skipped")
            if skip is None:
                ran.add(name)
            elif (lacking := case.find(f"properties/property[@name='{LEFT_OUT}']")) is not None:
                left_out[name] = lacking.get("value", "")
            else:
                skipped[name] = skip.get("message", "")
    if not ran:
        print("no test ran in any target")
        return 1
    for name in sorted(left_out.keys() - ran):
        print(f"left out, since this CPU does not execute {left_out[name]}: {name}")
    everywhere = sorted(skipped.keys() - ran)
    for name in everywhere:
        print(f"skipped in every target ({skipped[name]}): {name}")
    print(f"{len(ran)} tests ran, {len(left_out.keys() - ran)} need another CPU, {len(everywhere)} were skipped everywhere")
    return 1 if everywhere else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
