"""Every tile of the backward pass, compiled for its card: matrix instructions, no spills, memory within bounds."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels are interpreted here", allow_module_level=True)

from moebius.experts.fused import backward_kernels, routing
from moebius.experts.fused.backward_tiles import LARGE, OLDER, SMALL
from tests.compiled.ahead_of_time import SHARED_LIMIT, Machine, compiled

INDICES = dict.fromkeys(("order", "offsets", "tile_expert", "tile_row", "num_tiles"), "*i32")
HOPPER = [pytest.param(LARGE, id="large"), pytest.param(SMALL, id="small")]
SHAPES = [(2048, 768), (2880, 2880)]


def blocks(tile) -> dict[str, int]:
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return {**sizes, "GROUP_M": tile.group_m}


def launch(kernel, types, constants, tile, capability) -> Machine:
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    constants = constants | blocks(tile)
    return compiled(kernel, types, constants, warps=tile.warps, stages=tile.stages, capability=capability)


def z_gradient(tile, hidden_size, width, *, capability=90, clamped=False, save_scaled=True) -> Machine:
    tma = capability >= 90
    weight = f"tensordesc<bf16[1,{tile.block_k},{tile.block_n}]>" if tma else "*bf16"
    types = {"grad": "*bf16", "weight": weight, "z": "*bf16", "slot_weights": "*fp32", "z_grad": "*bf16"}
    types |= {"parts": "*fp32", "alpha": "fp32", "limit": "fp32", **({"scaled": "*bf16"} if save_scaled else {})}
    constants = {"H": hidden_size, "I": width, "TOP_K": 8, "ACTIVATION": int(clamped)}
    constants |= {"SAVE_SCALED": save_scaled, "W_TMA": tma, **({} if save_scaled else {"scaled": None})}
    return launch(backward_kernels.z_gradient_kernel, {**types, **INDICES}, constants, tile, capability)


def rows_gradient(tile, hidden_size, width, *, capability=90) -> Machine:
    tma = capability >= 90
    types = dict.fromkeys(("z_grad", "weight", "rows_grad"), "*bf16")
    if tma:
        types["z_grad"] = f"tensordesc<bf16[{tile.block_m},{tile.block_k}]>"
        types["weight"] = f"tensordesc<bf16[1,{tile.block_k},{tile.block_n}]>"
    constants = {"C": 2 * width, "N": hidden_size, "X_TMA": tma, "W_TMA": tma}
    return launch(backward_kernels.rows_gradient_kernel, {**types, **INDICES}, constants, tile, capability)


def weight_gradient(tile, height, width, *, left_by_token, capability=90) -> Machine:
    tma = capability >= 90
    types = {"left": "*bf16", "right": "*bf16", "largest_first": "*i64"}
    types["weight_grad"] = f"tensordesc<bf16[1,{tile.block_m},{tile.block_n}]>" if tma else "*bf16"
    constants = {"M": height, "N": width, "TOP_K": 8, "OUT_TMA": tma}
    constants |= {"LEFT_BY_TOKEN": left_by_token, "RIGHT_BY_TOKEN": not left_by_token}
    return launch(backward_kernels.weight_gradient_kernel, {**types, **INDICES}, constants, tile, capability)


@pytest.mark.parametrize("tiles", HOPPER)
@pytest.mark.parametrize(("hidden_size", "width"), SHAPES)
def test_the_gradient_of_z_on_hopper(tiles, hidden_size, width):
    for clamped in (False, True):
        machine = z_gradient(tiles.z_gradient, hidden_size, width, clamped=clamped)
        assert ".target sm_90a" in machine.ptx
        assert "HGMMA" in machine.sass
        assert "LDGSTS" in machine.sass
        assert "UTMALDG" in machine.sass
        assert machine.spills == 0
        assert machine.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("tiles", HOPPER)
@pytest.mark.parametrize(("hidden_size", "width"), SHAPES)
def test_the_gradient_of_rows_on_hopper(tiles, hidden_size, width):
    machine = rows_gradient(tiles.rows_gradient, hidden_size, width)
    assert "HGMMA" in machine.sass
    assert "UTMALDG" in machine.sass
    assert machine.spills == 0
    assert machine.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("tiles", HOPPER)
@pytest.mark.parametrize("left_by_token", [False, True])
@pytest.mark.parametrize(("hidden_size", "width"), SHAPES)
def test_the_gradients_of_weights_on_hopper(tiles, left_by_token, hidden_size, width):
    sizes = (hidden_size, width) if left_by_token else (2 * width, hidden_size)
    machine = weight_gradient(tiles.weight_gradient, *sizes, left_by_token=left_by_token)
    assert "HGMMA" in machine.sass
    assert "LDGSTS" in machine.sass
    assert "UTMASTG" in machine.sass
    assert machine.spills == 0
    assert machine.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize(("hidden_size", "width"), SHAPES)
def test_all_products_on_ampere(hidden_size, width):
    machines = [
        z_gradient(OLDER.z_gradient, hidden_size, width, capability=80, clamped=True),
        z_gradient(OLDER.z_gradient, hidden_size, width, capability=80, save_scaled=False),
        rows_gradient(OLDER.rows_gradient, hidden_size, width, capability=80),
        weight_gradient(OLDER.weight_gradient, hidden_size, width, left_by_token=True, capability=80),
        weight_gradient(OLDER.weight_gradient, 2 * width, hidden_size, left_by_token=False, capability=80),
    ]
    for machine in machines:
        assert "HMMA" in machine.sass
        assert "LDGSTS" in machine.sass
        assert machine.spills == 0
        assert machine.shared <= SHARED_LIMIT[80]


def test_the_small_sums_spill_nothing():
    kernels = backward_kernels
    rows = {"matrix": "*bf16", "slot_weights": "*fp32", "bias_grad": "*bf16", **INDICES}
    sizes = {"N": 2880, "TOP_K": 4, "BY_TOKEN": True, "BLOCK_M": 64, "BLOCK_N": 64}
    slots = {"parts": "*fp32", "grad": "*bf16", "bias": "*bf16", "top_k_index": "*i64", "inverse": "*i32"}
    slots |= {"offsets": "*i32", "weights_grad": "*fp32", "slots": "i32", "num_experts": "i32"}
    blocks = {"H": 2880, "TOP_K": 4, "PARTS": 23, "PARTS_BLOCK": 32, "HAS_BIAS": True, "BLOCK_S": 16, "BLOCK_H": 128}
    tiles = {**INDICES, "max_tiles": "i32", "num_experts": "i32"}
    experts = {"EXPERTS": 256, "BLOCK_M": 128}
    launches = [
        (kernels.bias_gradient_kernel, rows, sizes),
        (kernels.slot_weights_gradient_kernel, slots, blocks),
        (routing._tile_kernel, tiles, experts),
    ]
    for kernel, types, constants in launches:
        taken = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        assert compiled(kernel, taken, constants, warps=4, stages=3).spills == 0
