"""Compares mathematical answers: run as a script, one JSON object a line in and out, until stdin ends.

math-verify stops itself by signals, which only the main thread of a process receives, and which do not interrupt a
computation inside C. It runs here, therefore: its own deadlines are off; ours is CPU time, by a signal that raises and,
where that is not heard, by the kernel, which ends the process.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys
from typing import Any

from math_verify import parse, verify

WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
MARKS = re.compile(r"\$|\\boxed|\\\[|\\\(")
MEMORY_BYTES = 4 * 1024**3


class TooSlow(BaseException):
    """The CPU time of a request is used up."""


def stop(*_: object) -> None:
    raise TooSlow


def read(text: str) -> list[Any]:
    """What math-verify finds in a text; a bare expression, without marks and words, is read as LaTeX."""
    found: list[Any] = []
    if not MARKS.search(text) and not WORDS.search(text):
        found = parse(f"${text}$", parsing_timeout=0)
    return found or parse(text, parsing_timeout=0)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    truth = read(request["truth"])
    given = truth if request["given"] is None else read(request["given"])
    if not truth:
        return {"unfit": "math-verify finds no expression in it"}
    if request["given"] is None and not verify(truth, given, timeout_seconds=None):
        return {"unfit": "math-verify reads it and does not find it equal to itself"}
    if not given:
        return {"score": 0.0, "why": "no expression found"}
    return {"score": float(verify(truth, given, timeout_seconds=None))}


def serve(request: dict[str, Any]) -> dict[str, Any]:
    seconds = request["seconds"]
    used = resource.getrusage(resource.RUSAGE_SELF)
    last = int(used.ru_utime + used.ru_stime + 2 * seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (last, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return answer(request)
    except (TooSlow, MemoryError, RecursionError) as error:
        return {"gave_up": type(error).__name__}
    except Exception as error:  # noqa: BLE001 - told to whoever asked
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, stop)
    verify(read("1"), read("$x^2$"), timeout_seconds=None)  # builds tables that the first answer need not pay for
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


main()
