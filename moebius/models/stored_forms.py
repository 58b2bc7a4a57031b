"""Which quantized form a checkpoint's weights may be stored in, from its `quantization_config`.  No torch.

It says nothing of the decoder.  Which of the weights are stored so is said by the files alone: lists of modules to
leave out are not read.
"""

from moebius.checkpoint.files import shown
from moebius.models.reading import ConfigReader
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4

FIELD = "quantization_config"
SUPPORTED = (
    "fp8 (e4m3, in blocks), mxfp4, compressed-tensors (pack-quantized: 4-bit integers in groups; int-quantized: 8-bit "
    "integers, a scale a channel)"
)
LEFT_TO_THE_FILES = ("modules_to_not_convert", "modules_to_convert", "ignored_layers", "ignore", "version")

# What the integers of compressed-tensors have to be, by its name of the layout; `observer` tells how they were found.
BY_FORMAT = {
    "pack-quantized": {"num_bits": 4, "strategy": "group"},
    "int-quantized": {"num_bits": 8, "strategy": "channel", "group_size": None},
}
INTEGERS = {
    "type": "int",
    "symmetric": True,
    "dynamic": False,
    "actorder": None,
    "block_structure": None,
    "zp_dtype": None,
}


def read_stored_form(reader: ConfigReader) -> Form | None:
    """The form that the object at `quantization_config` describes, None without one; what it cannot read is a fault."""
    section = reader.section(FIELD)
    if not section.raw:
        return None
    match section.raw.get("quant_method"):
        case "fp8":
            form = _block_fp8(section)
        case "mxfp4":
            section.must_be("dequantize", False)
            form = Mxfp4()
        case "compressed-tensors":
            form = _integers(section)
        case other:
            reader.fault(f"{FIELD}.quant_method", "unsupported", f"{shown(other)}; supported: {SUPPORTED}")
            return None
    section.ignore("quant_method", *LEFT_TO_THE_FILES)
    reader.close(section)
    return form


def _block_fp8(section: ConfigReader) -> BlockFp8:
    section.one_of("fmt", supported=("e4m3", "float8_e4m3fn"))
    section.one_of("scale_fmt", supported=("float", "ue8m0"))  # either is stored as the numbers that the scales are
    for field, supported in {"activation_scheme": "dynamic", "expert_dtype": "fp8", "dequantize": False}.items():
        section.must_be(field, supported)
    block = section.integers("weight_block_size")
    if len(block) != 2 or 0 in block:
        found = "scales a tensor or a row" if not block else f"{list(block)}"
        section.fault("weight_block_size", "unsupported", f"{found}; supported: [rows, columns] of a block")
        return BlockFp8()
    return BlockFp8((block[0], block[1]))


def _integers(section: ConfigReader) -> PackedInt4 | Int8:
    stored = section.raw.get("format")
    if not isinstance(stored, str) or stored not in BY_FORMAT:
        section.fault("format", "unsupported", f"{shown(stored)} of compressed-tensors; supported: {SUPPORTED}")
        section.ignore(*section.raw)
        return PackedInt4()
    section.ignore("format", "global_compression_ratio")
    for field, supported in {"kv_cache_scheme": None, "quantization_status": "compressed"}.items():
        section.must_be(field, supported)
    for field in ("sparsity_config", "transform_config"):
        section.close(section.section(field))  # what says something there is not implemented
    groups = section.section("config_groups")
    form = _only_group(groups, stored)
    section.close(groups)
    return form


def _only_group(groups: ConfigReader, stored: str) -> PackedInt4 | Int8:
    if len(groups.raw) != 1:
        groups.fault("group_0", "unsupported", f"{len(groups.raw)} groups of modules; supported: one")
        groups.ignore(*groups.raw)
        return PackedInt4()
    (name,) = groups.raw
    group = groups.section(name)
    for field, supported in {"input_activations": None, "output_activations": None, "targets": ["Linear"]}.items():
        group.must_be(field, supported)
    group.one_of("format", supported=(stored,))
    weights = group.section("weights")
    for field, supported in (INTEGERS | BY_FORMAT[stored]).items():
        weights.must_be(field, supported)
    weights.ignore("observer", "observer_kwargs", "scale_dtype")
    form = Int8() if stored == "int-quantized" else PackedInt4(weights.integer("group_size"))
    group.close(weights)
    groups.close(group)
    return form
