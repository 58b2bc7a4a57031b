"""Memory here, in bytes: what there is, and what this process took."""

import os
import resource
import sys


def host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device_type: str) -> int:
    """The most that this process held so far: the GPU allocator's peak, or on the CPU the resident set's."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
