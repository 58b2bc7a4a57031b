"""What from_pretrained's arguments mean: each of transformers' names is honoured, true anyway, or refused by name."""

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from moebius.checkpoint import hub
from moebius.checkpoint.comparing import FLOATS
from moebius.checkpoint.loading import LoadOptions
from moebius.distributed.config import DistributedConfig
from moebius.errors import ArgumentError, Fault
from moebius.generation.config import GenerationConfig
from moebius.placement import CPU, CUDA, STRATEGIES, DeviceMap, Modules, Strategy
from moebius.quantization.config import QuantizationConfig

LAYOUTS = ("published", "packed")
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
    "tp_plan": "tensor parallelism is not offered",
    "tp_size": "tensor parallelism is not offered",
    "load_in_8bit": 'say quantization="int8"',
    "load_in_4bit": 'say quantization="int4" or "mxfp4"',
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
    "quantization",
    "quantization_config",
    "distributed_config",
)

DISTRIBUTED = tuple(field.name for field in dataclasses.fields(DistributedConfig))

DISTRIBUTED_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "tp_size": ((None, 1), "tensor parallelism is not offered; say ep_size"),
    "tp_plan": ((None, {}), "tensor parallelism is not offered; say ep_size"),
    "enable_sequence_parallel": ((None, False), "sequence parallelism is not offered"),
    "pp_size": ((None, 1), "pipeline parallelism is not offered"),
    "fsdp_plan": ((None,), "what is sharded is settled: every layer, and its experts"),
    "fsdp_cpu_offload": ((None, False), "weights are not offloaded"),
    "fsdp_mixed_precision": ((None, False), "give the dtype by itself"),
    "ep_plan": ((None,), "what is spread is settled: the routed experts"),
    "ep_implementation": ((None, "auto"), "say exchange= of moebius.DistributedConfig"),
}
"""transformers' other fields of a DistributedConfig: the values that ask for nothing, and why others are refused."""


DEVICES_ON_RANKS = ("auto", "cpu", "cuda")
DEVICE_OF_A_RANK = "'auto', 'cpu' or 'cuda': each rank takes the GPU of its place on its host, or the CPU"


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The download arguments among `options`.  Raises ArgumentError naming each that cannot be honoured, and why."""
    faults = [fault for name, value in options.items() if (fault := _fault(name, value))]
    if faults:
        raise ArgumentError("from_pretrained: arguments refused", faults=faults)
    return {name: value for name, value in options.items() if name in hub.OPTIONS}


def _fault(name: str, value: Any) -> Fault | None:
    if name in hub.OPTIONS or name == "torch_dtype":
        return None
    if name == "max_memory":
        return _memory_fault(value)
    if name in REFUSED or name in TRUE_ANYWAY:
        fits = value in TRUE_ANYWAY.get(name, ASKS_FOR_NOTHING)
        return None if fits else Fault(f"{name}={value!r}", "not supported", REFUSED.get(name, "leave it out"))
    known = [*HONOURED, "max_memory", *hub.OPTIONS, *TRUE_ANYWAY]
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


def quantization_of(form: str | None, config: object) -> QuantizationConfig | None:
    """What `quantization` and `quantization_config` ask for: a form's name, or all there is to say; None for nothing.

    ArgumentError: both that differ, another library's config, or what QuantizationConfig refuses.
    """
    match config:
        case None:
            return None if form is None else QuantizationConfig(form)
        case QuantizationConfig():
            given = config
        case Mapping():
            given = QuantizationConfig.from_dict({**({} if form is None else {"form": form}), **config})
        case _:
            raise ArgumentError(
                f"quantization_config: {type(config).__module__}.{type(config).__name__} is not read",
                advice='give a dict such as {"form": "int4", "group_size": 32}, or a moebius QuantizationConfig',
            )
    if form not in (None, given.form):
        raise ArgumentError(f"quantization={form!r} and quantization_config's {given.form!r} contradict each other")
    return given


def generation_config_of(given: object) -> GenerationConfig:
    """`given`, or nothing set for None.  ArgumentError: another library's."""
    if given is None or isinstance(given, GenerationConfig):
        return given or GenerationConfig()
    found = f"{type(given).__module__}.{type(given).__name__}"
    raise ArgumentError(
        f"generation_config: expected a moebius.GenerationConfig, found {found}",
        advice="moebius.GenerationConfig.from_hf(config.to_diff_dict()) makes one of transformers'",
    )


def device_map_of(device_map: Any, max_memory: Mapping[int | str, int | str] | None = None) -> DeviceMap:
    """Where a model is to go, devices spelled out: "cuda" is the current GPU, 1 is "cuda:1", None the CPU.

    ArgumentError: devices that are not there, or limits where nothing is to be spread.
    """
    if isinstance(device_map, str) and device_map in STRATEGIES:
        gpus = [f"{CUDA}{number}" for number in range(torch.cuda.device_count())]
        limits = {} if max_memory is None else _limits(max_memory)
        return Strategy(device_map, list(limits) or [*gpus, CPU], limits)
    if max_memory is not None:
        spread = ", ".join(map(repr, STRATEGIES))
        raise ArgumentError(f"max_memory is for device_map={spread}; found device_map={device_map!r}")
    modules = device_map if isinstance(device_map, Mapping) else {"": CPU if device_map is None else device_map}
    _check_devices("device_map", modules.values())
    return Modules({str(name): _device_name(device) for name, device in modules.items()})


def _limits(max_memory: Mapping[int | str, int | str]) -> dict[str, int]:
    """Bytes by device, GPUs by their number, the CPU last."""
    _check_devices("max_memory", max_memory)
    nbytes = {_device_name(device): byte_count(size, "max_memory") for device, size in max_memory.items()}
    return dict(sorted(nbytes.items(), key=lambda item: (item[0] == CPU, torch.device(item[0]).index or 0)))


def _memory_fault(max_memory: object) -> Fault | None:
    if max_memory is None or (isinstance(max_memory, Mapping) and max_memory):
        return None
    return Fault(f"max_memory={max_memory!r}", "value", 'expected bytes by device, as {0: "10GiB", "cpu": "30GiB"}')


def _check_devices(argument: str, devices: Iterable[Any]) -> None:
    faults = [Fault(f"{argument}={device!r}", *found) for device in devices if (found := _device_fault(device))]
    if faults:
        raise ArgumentError(f"{argument} refused", faults=dict.fromkeys(faults))


def _device_fault(device: Any) -> tuple[str, str] | None:
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        return (
            "device",
            "expected 'cpu', 'cuda', 'cuda:N', 'meta', or of a whole model 'auto', 'balanced', 'sequential'",
        )
    if found.type not in (CPU, "cuda", "meta"):
        return "device", f"{found.type} is not supported"
    if found.type == "cuda" and not 0 <= (found.index or 0) < torch.cuda.device_count():
        return "not there", f"torch sees {torch.cuda.device_count()} CUDA devices"
    return None


def _device_name(device: Any) -> str:
    """torch's, with its number; the device was checked."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type != "cuda":
        return found.type
    return f"{CUDA}{torch.cuda.current_device() if found.index is None else found.index}"


def distributed_config_of(config: object) -> DistributedConfig | None:
    """What `distributed_config` asks for: ours, its fields as a mapping, or transformers' object; None for nothing.

    ArgumentError: fields that are unknown, or that ask for what is not offered, each by name.
    """
    match config:
        case None | DistributedConfig():
            return config
        case Mapping():
            return _distributed(config)
        case _ if dataclasses.is_dataclass(config) and not isinstance(config, type):
            return _distributed(_as_given(vars(config)))
        case _:
            raise ArgumentError(
                f"distributed_config: {type(config).__module__}.{type(config).__name__} is not read",
                advice="give a moebius.DistributedConfig, or a dict of its fields",
            )


def _distributed(fields: Mapping[str, Any]) -> DistributedConfig:
    # None leaves a size open, as leaving it out does
    ours = {name: fields[name] for name in DISTRIBUTED if fields.get(name) is not None}
    others = (fault for name, value in fields.items() if (fault := _distributed_fault(name, value)))
    if faults := [*others, *_out_of_range(ours)]:
        raise ArgumentError("distributed_config: fields refused", faults=faults)
    return DistributedConfig(**ours)


def _out_of_range(fields: Mapping[str, Any]) -> Sequence[Fault]:
    try:
        DistributedConfig(**fields)
    except ArgumentError as error:
        return error.faults
    return ()


def _distributed_fault(name: str, value: Any) -> Fault | None:
    if name in DISTRIBUTED:
        return None
    if name in DISTRIBUTED_REFUSED:
        neutral, why = DISTRIBUTED_REFUSED[name]
        return None if value in neutral else Fault(f"{name}={value!r}", "not supported", why)
    near = difflib.get_close_matches(str(name), DISTRIBUTED, n=1)
    return Fault(str(name), "unknown field", f"did you mean {near[0]}?" if near else f"known: {', '.join(DISTRIBUTED)}")


def _as_given(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as the user gave them, of transformers' object, which replaces them by what they come to.

    There `enable_expert_parallel` becomes ep_size=tp_size and an empty tp_plan, which says that tp_size counts ranks
    that share experts and nothing else; an ep_size of 1 is none; and ranks of FSDP have a batch each.
    """
    ep_size, tp_size, apart = (resolved.get(name) for name in ("ep_size", "tp_size", "fsdp_size"))
    experts_alone = resolved.get("tp_plan") == {} and ep_size == tp_size
    fields: dict[str, Any] = {"enable_expert_parallel": True, "tp_size": None} if experts_alone else {}
    fields["ep_size"] = None if type(ep_size) is int and ep_size == 1 else ep_size
    return {**resolved, **fields, "batch": "shared" if apart in (None, 1) else "distinct"}


def device_type_on_ranks(device_map: Any, max_memory: Any) -> str | None:
    """The kind of device that ranks are to take where a model is spread over them, "cpu" or "cuda"; None: either.

    ArgumentError: a device_map that says more, or limits; each rank has a device of its own.
    """
    kind = str(device_map) if isinstance(device_map, torch.device) else device_map
    faults = []
    if kind is not None and not (isinstance(kind, str) and kind in DEVICES_ON_RANKS):
        faults.append(Fault(f"device_map={device_map!r}", "not supported", f"expected None, {DEVICE_OF_A_RANK}"))
    if max_memory is not None:
        faults.append(Fault(f"max_memory={max_memory!r}", "not supported", "each rank has a device of its own"))
    if faults:
        advice = "leave it out; CUDA_VISIBLE_DEVICES says which GPUs there are"
        raise ArgumentError("from_pretrained: arguments refused under distributed_config", faults=faults, advice=advice)
    return None if kind == "auto" else kind


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


def layout_of(layout: str | None) -> str | None:
    """ArgumentError: not one of LAYOUTS, nor None."""
    if layout not in (None, *LAYOUTS):
        raise ArgumentError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    return layout


def byte_count(size: int | str, argument: str = "max_shard_size") -> int:
    """5_000_000_000, "5GB", "200MB" (powers of ten, as transformers reads them) or "5GiB"."""
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"(\d+)\s*([kKMGT]?)(i?)B", str(size))
    if not match or int(match[1]) == 0:
        raise ArgumentError(f"{argument}={size!r}: expected bytes, or a number with a unit such as '5GB'")
    power = " KMGT".index((match[2] or " ").upper())
    return int(match[1]) * (1024 if match[3] else 1000) ** power
