"""The `quantization_config` of a checkpoint with weights in a quantized form: what `stored_forms` reads.  No torch."""

from collections.abc import Sequence
from typing import Any

from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4


def write_stored_form(form: Form, plain_modules: Sequence[str]) -> dict[str, Any]:
    """plain_modules: those whose matrices are not quantized, as the hub names them."""
    match form:
        case BlockFp8():
            return {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(form.block),
                "modules_to_not_convert": list(plain_modules),
            }
        case Mxfp4():
            return {"quant_method": "mxfp4", "modules_to_not_convert": list(plain_modules)}
        case PackedInt4():
            group = {"num_bits": 4, "strategy": "group", "group_size": form.group_size}
            return _compressed_tensors("pack-quantized", group, plain_modules)
        case Int8():
            return _compressed_tensors("int-quantized", {"num_bits": 8, "strategy": "channel"}, plain_modules)


def _compressed_tensors(stored: str, weights: dict[str, Any], plain_modules: Sequence[str]) -> dict[str, Any]:
    """Every linear layer but the named ones, symmetric integers, activations as they are."""
    integers = {**weights, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": [_ignored(module) for module in plain_modules],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": integers,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def _ignored(module: str) -> str:
    """A module by name; the experts of a layer, which are many modules there, by an expression."""
    return f"re:{module.replace('.', '[.]')}[.].*" if module.endswith(".experts") else module
