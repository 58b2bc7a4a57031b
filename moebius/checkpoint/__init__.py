"""Files in, files out: `plan` reads headers, `load` runs a plan, `save` runs it backwards.

Planning imports no torch; loading and saving do, when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moebius.checkpoint.files import open_files
from moebius.checkpoint.planning import Plan, Target, plan

if TYPE_CHECKING:
    from moebius.checkpoint.loading import load
    from moebius.checkpoint.saving import save

__all__ = ["Plan", "Target", "load", "open_files", "plan", "save"]

_LAZY = {"load": "moebius.checkpoint.loading", "save": "moebius.checkpoint.saving"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
