"""The kernels that decode weights in registers, compiled for Hopper: 16 bytes a load, integers without conversions,
nothing spilled; where rows are many, matrix instructions that take the weights from registers.
"""

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels are interpreted here", allow_module_level=True)

from moebius.experts.fused import decode, decode_kernels, quantized_kernels
from moebius.experts.fused.quantized import INPUT_TILES, quantized_tiles
from moebius.experts.fused.quantized_matrices import reading
from moebius.quantization.forms import BlockFp8, Int8, Mxfp4, PackedInt4
from tests.compiled.ahead_of_time import SHARED_LIMIT, Machine, compiled

HIDDEN, WIDTH, TOP_K = 2048, 768, 8
VALUES = {"plain": "*bf16", "int8_row": "*i8", "fp8_block": "*fp8e4nv", "int4_pack": "*i32", "mxfp4": "*i32"}
SCALES = {"int8_row": "*fp32", "fp8_block": "*fp32", "int4_pack": "*bf16", "mxfp4": "*u8"}
HELD = [Int8(), BlockFp8(), PackedInt4(), Mxfp4()]
INDICES = dict.fromkeys(("order", "offsets", "tile_expert", "tile_row", "num_tiles"), "*i32")
NUMBERS = {"two_to_23": "i32", "alpha": "fp32", "limit": "fp32"}


def name_of(form) -> str:
    return "plain" if form is None else form.name


DOT_TILES = {"int8_row": decode.DecodeTiles(4, 512, 1, dot=True), "int4_pack": decode.DecodeTiles(8, 256, 1, dot=True)}
PER_WORD = {"int8_row": 4, "int4_pack": 8}


def lying(form, width: int, *, dot: bool = False) -> dict[str, int]:
    kind, (rows, columns), run = reading(form, 2, width)
    run = {"int8_row": 64, "int4_pack": 32}[form.name] if dot else run
    sizes = {"VALUES": HIDDEN * WIDTH, "SCALES": HIDDEN * WIDTH // 32}
    return {**sizes, "KIND": kind, "SCALE_ROWS": rows, "SCALE_COLUMNS": columns, "RUN": run}


def decoding(form, tiles: decode.DecodeTiles, *, down: bool, capability: int = 90) -> Machine:
    name = name_of(form)
    kernel = decode_kernels.decode_down_kernel if down else decode_kernels.decode_gate_up_kernel
    constants = {"NUM_EXPERTS": 128, "TOP_K": TOP_K, "HIDDEN": HIDDEN, "INTERMEDIATE": WIDTH, "HAS_BIAS": True}
    constants |= {"BN": tiles.block_n, "BK": tiles.block_k, "STAGES": tiles.stages, "PDL": capability == 90}
    constants |= lying(form, WIDTH if down else HIDDEN, dot=tiles.dot) | ({} if down else {"ACTIVATION": 1})
    constants["DOT"] = tiles.dot
    values = "*i32" if tiles.dot else VALUES[name]
    types = {"x_ptr": "*bf16", "ids_ptr": "*i64", "values_ptr": values, "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= {"weights_ptr": "*fp32", "number": "i32"} if down else {"number": "i32", "alpha": "fp32", "limit": "fp32"}
    types |= {"scales_ptr": SCALES[name]} if name in SCALES else {}
    constants |= {} if name in SCALES else {"scales_ptr": None}
    return compiled(kernel, types, constants, warps=tiles.num_warps, stages=1, capability=capability)


def sorted_product(form, tile, *, down: bool, clamped: bool = False) -> Machine:
    kernel = quantized_kernels.quantized_down_kernel if down else quantized_kernels.quantized_gate_up_kernel
    types = {"x": "*bf16", "a": "*bf16", "y": "*bf16", "z": "*bf16", "bias": "*bf16", **INDICES, **NUMBERS}
    types |= {"values": VALUES[form.name], "scales": SCALES[form.name]}
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    constants = {"H": HIDDEN, "I": WIDTH, "HAS_BIAS": True, "OVERLAP": True, "GROUP_M": tile.group_m}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    constants |= {} if down else {"TOP_K": TOP_K, "ACTIVATION": int(clamped), "SAVE_Z": True}
    constants |= lying(form, WIDTH if down else HIDDEN)
    return compiled(kernel, types, constants, warps=tile.warps, stages=tile.stages)


def input_gradient(form, width: int, out: int) -> Machine:
    types = {"rows": "*bf16", "out": "*bf16", **INDICES, "two_to_23": "i32"}
    types |= {"values": VALUES[form.name], "scales": SCALES[form.name]}
    types.pop("order")
    tile = INPUT_TILES
    constants = {"N": out, "C": width, "SEGMENT": out, "OVERLAP": True, "GROUP_M": tile.group_m, **lying(form, width)}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    kernel = quantized_kernels.quantized_input_kernel
    return compiled(kernel, types, constants, warps=tile.warps, stages=tile.stages)


@pytest.mark.parametrize("form", [None, *HELD], ids=name_of)
@pytest.mark.parametrize("down", [False, True], ids=["gate_up", "down"])
def test_decode_loads_sixteen_bytes_converts_no_integers_and_spills_nothing(form, down):
    tiles = (decode.DOWN_TILES if down else decode.GATE_UP_TILES)[name_of(form)]
    machine = decoding(form, tiles, down=down)
    rows = tiles.block_n * (1 if down else 2)
    assert machine.sass.count("LDG.E.128") + machine.sass.count("LDGSTS.E.BYPASS.128") > rows
    assert "I2F" not in machine.sass
    assert machine.spills == 0


@pytest.mark.parametrize("form", [None, *HELD], ids=name_of)
def test_weights_are_asked_for_before_the_first_launch_is_waited_for_and_its_rows_after(form):
    tiles = replace(decode.DOWN_TILES[name_of(form)], stages=1)
    before, *after = decoding(form, tiles, down=True).sass.split("ACQBULK")
    assert before.count("LDG.E.128") >= tiles.block_n
    assert sum(part.count("LDG.E.128") for part in after) >= 1
    in_flight = replace(tiles, stages=3)
    assert "LDGSTS" not in decoding(form, in_flight, down=True).sass.split("ACQBULK")[0]


@pytest.mark.parametrize("form", [Int8(), PackedInt4()], ids=name_of)
@pytest.mark.parametrize("down", [False, True], ids=["gate_up", "down"])
def test_products_by_matrix_instructions_take_few_others_for_a_weight(form, down):
    """A thread's share of both operands is its own: no weight goes through shared memory or to another thread."""
    tiles = DOT_TILES[form.name]
    machine = decoding(form, tiles, down=down)
    weights = tiles.block_n * (1 if down else 2) * tiles.block_k // 32
    words = weights // PER_WORD[form.name]
    assert words <= machine.count("HMMA.16816.F32.BF16") <= words * 3 // 2 + 4
    assert machine.sass.count("LDG.E.128") > words // 4
    assert machine.sass.count("LOP3") + machine.sass.count("PRMT") <= 1.5 * weights + 32
    assert machine.shared <= 512
    assert machine.registers <= 128
    assert machine.spills == 0


@pytest.mark.parametrize("form", [Int8(), PackedInt4()], ids=name_of)
def test_products_by_matrix_instructions_on_ampere(form):
    machine = decoding(form, DOT_TILES[form.name], down=False, capability=80)
    assert "HMMA" in machine.sass
    assert machine.spills == 0


@pytest.mark.parametrize("form", [None, Int8(), PackedInt4(), Mxfp4()], ids=name_of)
def test_decode_on_ampere(form):
    tiles = decode.GATE_UP_TILES[name_of(form)]
    assert decoding(form, tiles, down=False, capability=80).spills == 0


@pytest.mark.parametrize("rows", [16, 64, 256])
@pytest.mark.parametrize("form", HELD, ids=name_of)
@pytest.mark.parametrize("down", [False, True], ids=["gate_up", "down"])
def test_sorted_rows_take_matrix_instructions_on_hopper(form, rows, down):
    tiles = quantized_tiles(rows)
    machine = sorted_product(form, tiles.down if down else tiles.gate_up, down=down)
    assert "HGMMA" in machine.sass
    assert "LDGSTS" in machine.sass
    assert machine.spills == 0
    assert machine.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("form", HELD, ids=name_of)
def test_products_backwards_take_matrix_instructions_on_hopper(form):
    machine = input_gradient(form, HIDDEN, 2 * WIDTH)
    assert "HGMMA" in machine.sass
    assert machine.spills == 0
    assert machine.shared <= SHARED_LIMIT[90]
