"""An independent reading of a checkpoint's files: the safetensors library, names, and plain torch.

Nothing of Moebius is used.  It goes from the keys that are there to the tensors that a model must hold, where the
loader goes from the model to the keys; what one of them assumes and the other does not, is so found.

E experts, H hidden, I expert width.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from torch import Tensor

from tests.fuzz.documents import CONFIG, INDEX, SINGLE, Files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}
DTYPES |= {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

EXPERT = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.(weight|weight_scale)")
PART = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
RENAMED = (
    (".block_sparse_moe.gate.", ".mlp.gate."),
    (".mlp.router.", ".mlp.gate."),
    (".mlp.shared_experts.", ".mlp.shared_expert."),
)
SKIPPED = re.compile(r"mtp\..+|(.+\.)?self_attn\.rotary_emb\.inv_freq")
VISION = ("vision_tower.", "mm_projector.")
SCALES = {"mxfp4": "_scales", "fp8": ".weight_scale_inv", "compressed-tensors": ".weight_scale"}


class UnreadableError(Exception):
    """The files do not say what every tensor of a model is."""


@dataclass(frozen=True)
class Expected:
    """copied: the bytes are the file's, so that NaN has to be the same NaN."""

    tensor: Tensor
    copied: bool


@dataclass(frozen=True)
class Description:
    """What a config.json says that bears on names and dtypes."""

    model_type: str
    text: Mapping[str, Any]
    around: Mapping[str, Any]

    @property
    def form(self) -> Mapping[str, Any]:
        return self.around.get("quantization_config") or self.text.get("quantization_config") or {}

    @property
    def dtype(self) -> torch.dtype | None:
        said = [place.get(name) for place in (self.text, self.around) for name in ("torch_dtype", "dtype")]
        return next((getattr(torch, name) for name in said if name), None)


def described(raw: bytes) -> Description:
    around = json.loads(raw)
    text = around.get("text_config") if around["model_type"] == "kimi_k25" else around
    return Description(around["model_type"], text, around)


def read_by_names(files: Files, wanted: str | None) -> dict[str, Expected]:
    """Every tensor of the model that the files describe, by the model's names.

    wanted: a dtype's name, in which everything is to be; None: the checkpoint's own, quantized weights as they are.
    Raises UnreadableError.
    """
    raw = files[CONFIG]
    assert isinstance(raw, bytes)
    config, stored = described(raw), _stored(files)
    dtype = (getattr(torch, wanted) if wanted else None) or config.dtype or _commonest(stored)
    kept = {key: tensor for head, tensor in stored.items() if (key := _own_name(head, config)) is not None}
    weights = _weights(kept, config, dtype, decode=wanted is not None)
    named = _packed({_renamed(key): weight for key, weight in weights.items()}, config)
    return {name: _cast(name, weight, dtype) for name, weight in _untied(named, config).items()}


# --- files -----------------------------------------------------------------------------------------------------------


def _stored(files: Files) -> dict[str, Tensor]:
    weight_map = None if SINGLE in files else json.loads(_bytes(files, INDEX))["weight_map"]
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    try:
        found = [(name, *entry) for name in names for entry in safetensors.deserialize(_bytes(files, name))]
    except Exception as error:
        raise UnreadableError(f"the safetensors library refuses a shard: {error}") from error
    if len({key for _, key, _ in found}) != len(found):
        raise UnreadableError("one key in two shards")
    if weight_map is not None and weight_map != {key: name for name, key, _ in found}:
        raise UnreadableError("index and headers disagree")
    return {key: _tensor(entry) for _, key, entry in found}


def _bytes(files: Files, name: str) -> bytes:
    content = files.get(name)
    if not isinstance(content, bytes):
        raise UnreadableError(f"{name} is no file of the folder")
    return content


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    data = bytearray(entry["data"])
    dtype = DTYPES[entry["dtype"]]
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(entry["shape"])


def _commonest(stored: Mapping[str, Tensor]) -> torch.dtype:
    nbytes = Counter(dict.fromkeys(FLOATS, 0))
    for tensor in stored.values():
        nbytes[tensor.dtype] += tensor.nbytes if tensor.dtype in FLOATS else 0
    return max(FLOATS, key=lambda dtype: nbytes[dtype])


# --- names -----------------------------------------------------------------------------------------------------------


def _own_name(key: str, config: Description) -> str | None:
    """The key without a wrapper's head; None for what no language model holds."""
    if config.model_type == "kimi_k25":
        if key.startswith(VISION):
            return None
        key = key.removeprefix("language_model.")
    beyond = re.match(r"model\.layers\.(0|[1-9][0-9]*)\.", key) if "n_routed_experts" in config.text else None
    if beyond and int(beyond[1]) >= config.text["num_hidden_layers"]:
        return None
    return None if SKIPPED.fullmatch(key) else key


def _renamed(key: str) -> str:
    for old, new in RENAMED:
        key = key.replace(old, new)
    return key


def _untied(named: dict[str, Expected], config: Description) -> dict[str, Expected]:
    """A tied head is the embedding, under whichever name it is stored."""
    if not config.text.get("tie_word_embeddings"):
        return named
    head = named.pop("lm_head.weight", None)
    embedding = named.setdefault("model.embed_tokens.weight", head) if head else named["model.embed_tokens.weight"]
    if head and not torch.equal(embedding.tensor.nan_to_num(), head.tensor.nan_to_num()):
        raise UnreadableError("a tied weight is stored twice, with different values")
    return named


# --- values ----------------------------------------------------------------------------------------------------------


def _weights(kept: dict[str, Tensor], config: Description, dtype: torch.dtype, *, decode: bool) -> dict[str, Expected]:
    """Weights by their keys; quantized ones as values and scales, or as what they mean."""
    method = config.form.get("quant_method")
    end = SCALES.get(method or "")
    plain = {key: Expected(tensor, True) for key, tensor in kept.items()}
    for key in [key for key in kept if end and key.endswith(end)]:
        stem = key.removesuffix(end or "")
        scales = plain.pop(key).tensor
        names = {"mxfp4": "_blocks", "fp8": ".weight"}.get(method or "", ".weight_packed")
        values = plain.pop(stem + names).tensor
        shape = plain.pop(f"{stem}.weight_shape", None) if method == "compressed-tensors" else None
        meaning = _meaning(config.form, values, scales)
        if shape and shape.tensor.tolist() != list(meaning.shape):
            raise UnreadableError(f"{stem}.weight_shape says another shape")
        weight = "" if method == "mxfp4" else ".weight"
        if decode:
            plain[stem + weight] = Expected(meaning.to(dtype), False)
        else:
            plain |= {stem + weight: Expected(values, True), f"{stem}{weight}_scale": Expected(scales, True)}
    return plain


def _meaning(form: Mapping[str, Any], values: Tensor, scales: Tensor) -> Tensor:
    match form["quant_method"]:
        case "mxfp4":
            return _mxfp4(values, scales)
        case "fp8":
            rows, columns = form["weight_block_size"]
            wide = [torch.arange(size) // step for size, step in zip(values.shape, (rows, columns), strict=True)]
            return values.float() * scales.float()[wide[0]][:, wide[1]]
        case _:
            (group,) = form["config_groups"].values()
            return _int4(values, scales, group["weights"]["group_size"])


def _mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    signed = torch.where(codes >= 8, -E2M1[codes % 8], E2M1[codes % 8]).double()
    factors = torch.exp2(scales.double() - 127).masked_fill(scales == 255, torch.nan)
    return (signed * factors.unsqueeze(-1)).flatten(-2).float()


def _int4(words: Tensor, scales: Tensor, group: int) -> Tensor:
    nibbles = (words.long().unsqueeze(-1) >> (4 * torch.arange(8))) & 15
    quantized = (nibbles.flatten(-2) - 8).float()
    return quantized * scales.float().repeat_interleave(group, dim=-1)


def _cast(name: str, weight: Expected, dtype: torch.dtype) -> Expected:
    tensor = weight.tensor
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    quantized = name.endswith("_scale") or tensor.dtype not in FLOATS
    return weight if quantized or tensor.dtype == dtype else Expected(tensor.to(dtype), False)


# --- experts ---------------------------------------------------------------------------------------------------------


def _packed(weights: dict[str, Expected], config: Description) -> dict[str, Expected]:
    """Per-expert weights stacked by the number in their key, gate rows before up rows; gpt-oss's turned around."""
    named: dict[str, Expected] = {}
    lists: dict[tuple[str, str], dict[int, Expected]] = defaultdict(dict)
    for key, weight in weights.items():
        if fit := EXPERT.fullmatch(key):
            end = "_scale" if fit[4] == "weight_scale" else ""
            lists[fit[1], PART[fit[3]] + end][int(fit[2])] = weight
        elif config.model_type == "gpt_oss" and ".mlp.experts." in key:
            named |= _turned(key, weight)
        else:
            named[key] = weight
    return named | _stacked(lists)


def _stacked(lists: Mapping[tuple[str, str], Mapping[int, Expected]]) -> dict[str, Expected]:
    stacks = {place: _stack(place, experts) for place, experts in lists.items()}
    named = {}
    for (layer, part), stack in stacks.items():
        if part.startswith("down"):
            named[f"{layer}.mlp.experts.down_proj{part[4:]}"] = stack
        elif part.startswith("gate"):
            up = stacks[layer, part.replace("gate", "up")]
            both = torch.cat([_raw(stack.tensor), _raw(up.tensor)], dim=1).view(stack.tensor.dtype)
            named[f"{layer}.mlp.experts.gate_up_proj{part[4:]}"] = Expected(both, stack.copied)
    return named


def _stack(place: tuple[str, str], experts: Mapping[int, Expected]) -> Expected:
    if sorted(experts) != list(range(len(experts))):
        raise UnreadableError(f"{place}: expert ids {sorted(experts)}")
    chosen = [experts[index] for index in range(len(experts))]
    if len({weight.tensor.dtype for weight in chosen}) > 1:
        raise UnreadableError(f"{place}: several dtypes among siblings")
    stacked = torch.stack([_raw(weight.tensor) for weight in chosen])
    return Expected(stacked.view(chosen[0].tensor.dtype), chosen[0].copied)


def _turned(name: str, weight: Expected) -> dict[str, Expected]:
    """gate_up's alternating rows apart; plain exports lie [E, in, out], blocks and biases do not."""
    tensor = weight.tensor
    if weight.copied and tensor.dtype in FLOATS and not name.endswith("_bias"):
        tensor = tensor.transpose(1, 2)
    if ".gate_up_proj" in name:
        tensor = torch.cat([_raw(tensor)[:, 0::2], _raw(tensor)[:, 1::2]], dim=1).view(tensor.dtype)
    return {name: Expected(tensor.contiguous(), weight.copied)}


def _raw(tensor: Tensor) -> Tensor:
    """As whole numbers of the same width, so that any dtype can be joined and no NaN is touched."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
