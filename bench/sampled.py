"""Runs a module and, between two SIGUSR2, notes the main thread's stack at each tick of the process's CPU clock.

``python -m bench.sampled OUT MODULE ARGUMENTS...``; the second signal writes ``OUT``: [stack, samples] pairs as JSON,
each stack from the innermost function outwards, each function as [file, name]. Waiting counts nothing; what other
threads do counts for what the main thread does meanwhile.
"""

from __future__ import annotations

import json
import runpy
import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

# The kernel makes it one of its own ticks, often four milliseconds.
INTERVAL = 0.001

counts: Counter[tuple[CodeType, ...]] = Counter()


def sample(signum: int, frame: FrameType | None) -> None:
    stack = []
    while frame:
        stack.append(frame.f_code)
        frame = frame.f_back
    counts[tuple(stack)] += 1


def toggle(signum: int, frame: FrameType | None) -> None:
    if signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0):
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    stacks = [
        ([(code.co_filename, code.co_name) for code in stack], n) for stack, n in counts.items()
    ]
    # Whole or not at all, for the process that waits for it.
    draft = out.with_suffix(".draft")
    draft.write_text(json.dumps(stacks))
    draft.rename(out)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    signal.signal(signal.SIGPROF, sample)
    signal.signal(signal.SIGUSR2, toggle)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
