"""Python's cycle collector, paused while a plan is made.  No torch."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """A plan is hundreds of thousands of small objects without a cycle; the collector would look at all of them again
    and again, for a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
