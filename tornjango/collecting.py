"""Python's garbage collector, while requests are served: it looks at everything that lives, and meanwhile all wait.

A request leaves no cycles (see ``knots``): it is freed when it is answered, and the collector has little to find. But one
that waits is a hundred objects, and with ten thousand of them Python's own thresholds have the collector look at more
than a million several times while each is answered once: a third of all the time, in stops of half a second.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

#: Of the Python versions that there are.
_PYTHONS_OWN = {(700, 10, 10), (2000, 10, 10), (2000, 10, 0)}

#: A full collection for each million objects that were made and not freed, in place of a fifth of that.
THRESHOLDS = (10_000, 10, 10)


@contextlib.contextmanager
def seldom() -> Iterator[None]:
    """Inside, what is there already (modules, classes, URLs) is not looked at, and the rest is less often.

    Thresholds that the project has set itself are left as they are.
    """
    before = gc.get_threshold()
    if before in _PYTHONS_OWN:
        gc.set_threshold(*THRESHOLDS)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if gc.get_threshold() == THRESHOLDS:
            gc.set_threshold(*before)
