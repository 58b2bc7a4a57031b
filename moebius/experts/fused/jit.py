"""`triton.jit`, untyped: its own types know a kernel's body, where numbers are tl.constexpr, but not its launch."""

from typing import Any

import triton

jit: Any = triton.jit
