"""Runs cases by name: what the scripts of this folder have in common."""

import sys
import traceback


def run(cases, note=""):
    """Each of them, whatever became of the others; ends the program with 1 if one failed. The note says what they ran with."""
    failed = 0
    for case in cases:
        try:
            case()
            print(f"ok      {case.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {case.__name__}{note}")
            traceback.print_exc(file=sys.stdout)
    print(f"{len(cases) - failed} passed, {failed} failed{note}")
    sys.exit(1 if failed else 0)


def raises(kind, act):
    """The error that it must raise."""
    try:
        act()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")
