"""Moebius: open, run and train Mixture-of-Experts language models.

The public names are imported when they are first asked for: `import moebius` itself loads neither torch nor anything
else that takes time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moebius.auto import AutoModelForCausalLM, CausalLM, open_checkpoint
    from moebius.auto_tokenizer import AutoTokenizer
    from moebius.checkpoint.converter import PrefixRenaming, WeightConverter, WeightRenaming, WeightSkip
    from moebius.checkpoint.operations import (
        Chunk,
        Concatenate,
        Interleave,
        MergeModulelist,
        SplitModulelist,
        Transpose,
    )
    from moebius.distributed.config import DistributedConfig
    from moebius.errors import (
        ArgumentError,
        BackendError,
        CapacityError,
        CheckpointError,
        ConfigError,
        InputError,
        MoebiusError,
        RankError,
        SaveError,
        TokenizerError,
    )
    from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
    from moebius.generation import GenerationConfig, TextIteratorStreamer, TextStreamer

_HOMES = {
    "moebius.auto": ("AutoModelForCausalLM", "CausalLM", "open_checkpoint"),
    "moebius.checkpoint.converter": ("PrefixRenaming", "WeightConverter", "WeightRenaming", "WeightSkip"),
    "moebius.checkpoint.operations": (
        "Chunk",
        "Concatenate",
        "Interleave",
        "MergeModulelist",
        "SplitModulelist",
        "Transpose",
    ),
    "moebius.distributed.config": ("DistributedConfig",),
    "moebius.errors": (
        "ArgumentError",
        "BackendError",
        "CapacityError",
        "CheckpointError",
        "ConfigError",
        "InputError",
        "MoebiusError",
        "RankError",
        "SaveError",
        "TokenizerError",
    ),
    "moebius.experts.interface": ("ALL_EXPERTS_FUNCTIONS", "use_experts_implementation"),
    "moebius.generation": ("GenerationConfig", "TextIteratorStreamer", "TextStreamer"),
    "moebius.auto_tokenizer": ("AutoTokenizer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "ArgumentError",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BackendError",
    "CapacityError",
    "CausalLM",
    "CheckpointError",
    "Chunk",
    "Concatenate",
    "ConfigError",
    "DistributedConfig",
    "GenerationConfig",
    "InputError",
    "Interleave",
    "MergeModulelist",
    "MoebiusError",
    "PrefixRenaming",
    "RankError",
    "SaveError",
    "SplitModulelist",
    "TextIteratorStreamer",
    "TextStreamer",
    "TokenizerError",
    "Transpose",
    "WeightConverter",
    "WeightRenaming",
    "WeightSkip",
    "open_checkpoint",
    "use_experts_implementation",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
