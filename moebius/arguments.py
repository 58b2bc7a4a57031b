"""What from_pretrained's arguments mean: each of transformers' names is honoured, true anyway, or refused by name."""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from moebius.checkpoint import hub
from moebius.checkpoint.comparing import FLOATS
from moebius.checkpoint.loading import LoadOptions
from moebius.errors import ArgumentError, Fault
from moebius.generation.config import GenerationConfig

ASKS_FOR_NOTHING = (None, False, "")

TRUE_ANYWAY: Mapping[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": (True, False, None),
    "use_safetensors": (True, None),
    "weights_only": (True,),
    "trust_remote_code": (False, None),
    "attn_implementation": ("sdpa", None),
    "torch_dtype": (),  # an older name of dtype; see `either`
}

REFUSED: Mapping[str, str] = {
    "trust_remote_code": "repository code is never run; families are built in (docs/add_a_family.md)",
    "use_safetensors": "only safetensors are opened",
    "weights_only": "pickle is never opened",
    "attn_implementation": "attention runs through torch's SDPA; leave it out, or say 'sdpa'",
    "gguf_file": "GGUF is not opened; use the model's safetensors files",
    "ignore_mismatched_sizes": "a tensor of another shape is never loaded",
    "offload_folder": "weights are not offloaded to disk",
    "offload_state_dict": "weights are not offloaded to disk",
    "max_memory": "a model is not split over devices in this version",
    "tp_plan": "tensor parallelism is not offered",
    "tp_size": "tensor parallelism is not offered",
    "distributed_config": "expert parallelism is not in this version",
    "quantization_config": "quantization is not in this version",
    "quantization": "quantization is not in this version",
    "load_in_8bit": "quantization is not in this version",
    "load_in_4bit": "quantization is not in this version",
    "config": "a checkpoint is opened by its own config.json; edit that",
    "state_dict": "weights come from the checkpoint's files; use load_state_dict on the model",
    "key_mapping": "say it with weight_conversions=[WeightRenaming(...)]",
    "subfolder": "give the path of the folder itself",
    "variant": "only model.safetensors and its index are opened",
    "from_tf": "only safetensors are opened",
    "from_flax": "only safetensors are opened",
    "adapter_kwargs": "adapters are not in this version",
}

HONOURED = (
    "dtype",
    "device_map",
    "experts_implementation",
    "weight_conversions",
    "check_tensors",
    "progress",
    "output_loading_info",
    "loading",
    "mapping",
)


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The download arguments among `options`.  Raises ArgumentError naming each that cannot be honoured, and why."""
    faults = [fault for name, value in options.items() if (fault := _fault(name, value))]
    if faults:
        raise ArgumentError("from_pretrained: arguments refused", faults=faults)
    return {name: value for name, value in options.items() if name in hub.OPTIONS}


def _fault(name: str, value: Any) -> Fault | None:
    if name in hub.OPTIONS or name == "torch_dtype":
        return None
    if name in REFUSED or name in TRUE_ANYWAY:
        fits = value in TRUE_ANYWAY.get(name, ASKS_FOR_NOTHING)
        return None if fits else Fault(f"{name}={value!r}", "not supported", REFUSED.get(name, "leave it out"))
    known = [*HONOURED, *hub.OPTIONS, *TRUE_ANYWAY]
    near = difflib.get_close_matches(name, known, n=1)
    return Fault(name, "unknown argument", f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")


def either(dtype: Any, options: Mapping[str, Any]) -> Any:
    """dtype, or its older name torch_dtype; both only if they agree."""
    older = options.get("torch_dtype")
    if dtype is not None and older is not None and dtype_name_of(dtype) != dtype_name_of(older):
        raise ArgumentError(f"dtype={dtype!r} and torch_dtype={older!r} contradict each other; give one")
    return older if dtype is None else dtype


def dtype_name_of(dtype: str | torch.dtype | None) -> str | None:
    """torch's name of a floating dtype; None for None and "auto".  Raises ArgumentError for anything else."""
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in FLOATS:
        raise ArgumentError(f"dtype={dtype!r}: expected 'auto' or one of {', '.join(FLOATS)}")
    return name


def generation_config_of(given: object) -> GenerationConfig:
    """`given`, or nothing set for None.  ArgumentError: another library's."""
    if given is None or isinstance(given, GenerationConfig):
        return given or GenerationConfig()
    found = f"{type(given).__module__}.{type(given).__name__}"
    raise ArgumentError(
        f"generation_config: expected a moebius.GenerationConfig, found {found}",
        advice="moebius.GenerationConfig.from_hf(config.to_diff_dict()) makes one of transformers'",
    )


def device_of(device_map: Any) -> torch.device:
    """The one device a model goes to.  ArgumentError: a map over several devices, or a device that is not there."""
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, Mapping) or device_map in ("balanced", "balanced_low_0", "sequential"):
        raise ArgumentError(f"device_map={device_map!r}: a model is not split over devices in this version; give one")
    try:
        device = torch.device("cpu" if device_map is None else device_map)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device_map={device_map!r}: expected 'cpu', 'cuda', 'cuda:N', 'auto' or 'meta'") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device_map={device_map!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def load_options(loading: str | None, mapping: str) -> LoadOptions:
    """How to read.  loading: None leaves it to HF_DEACTIVATE_ASYNC_LOAD, transformers' switch, as "async" otherwise.

    HF_PARALLEL_LOADING_WORKERS says how many threads read.  ArgumentError: another value.
    """
    synchronous = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD", "").lower() in ("1", "true", "y", "yes", "on")
    loading = ("sync" if synchronous else "async") if loading is None else loading
    faults = [
        Fault(f"{name}={value!r}", "value", f"expected one of {', '.join(known)}")
        for name, value, known in (("loading", loading, ("async", "sync")), ("mapping", mapping, ("auto", "never")))
        if value not in known
    ]
    if faults:
        raise ArgumentError("from_pretrained: arguments refused", faults=faults)
    return LoadOptions(loading, mapping, _readers())  # pyright: ignore[reportArgumentType]


def _readers() -> int | None:
    text = os.environ.get("HF_PARALLEL_LOADING_WORKERS")
    if text is not None and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ArgumentError(f"HF_PARALLEL_LOADING_WORKERS={text!r}: expected a number of threads, 1 or more")
    return None if text is None else int(text)


def byte_count(size: int | str) -> int:
    """5_000_000_000, "5GB", "200MB" (powers of ten, as transformers reads them) or "5GiB"."""
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"(\d+)\s*([kKMGT]?)(i?)B", str(size))
    if not match or int(match[1]) == 0:
        raise ArgumentError(f"max_shard_size={size!r}: expected bytes, or a number with a unit such as '5GB'")
    power = " KMGT".index((match[2] or " ").upper())
    return int(match[1]) * (1024 if match[3] else 1000) ** power
