"""Our Triton kernels: rows sorted by expert, products over tiles of one expert, no atomics.  Imports triton."""
