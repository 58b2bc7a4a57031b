"""Every tile of the tables, compiled for its card: matrix instructions, nothing spilled, memory within bounds."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels are interpreted here", allow_module_level=True)

from moebius.experts.fused import forward_kernels, routing, tuning
from tests.compiled.ahead_of_time import SHARED_LIMIT, Machine, compiled

INDICES = dict.fromkeys(("order", "inverse", "offsets", "tile_expert", "tile_row", "num_tiles"), "*i32")
NUMBERS = {"alpha": "fp32", "limit": "fp32"}


def entries(table: str) -> list[dict]:
    return tuning.table(table)


def unique(table: str, product: str) -> list[tuple[tuning.TileConfig, int, int]]:
    """Each TileConfig of a table once, with H and I that it stands beside."""
    return list(
        {
            (tile := getattr(tuning.tiles_of(entry), product)): (tile, entry["hidden_size"], entry["intermediate_size"])
            for entry in entries(table)
        }.values()
    )


def pointers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*bf16")


def blocks(config: tuning.TileConfig) -> dict[str, object]:
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return {**sizes, "GROUP_M": config.group_m, "SWAPPED": config.swapped}


def gate_up(config, hidden_size, width, *, training, capability=90, tma=True, clamped=False, bias=False) -> Machine:
    parts = 1 if config.swapped else 2
    weight = f"tensordesc<bf16[1,{parts},{config.block_n},{config.block_k}]>" if tma else "*bf16"
    given = pointers("x", "a", *(["z"] if training else []), *(["bias"] if bias else []))
    constants = {"H": hidden_size, "I": width, "TOP_K": 8, "ACTIVATION": int(clamped), "HAS_BIAS": bias}
    constants |= {"SAVE_Z": training, "W_TMA": tma, "OVERLAP": tma, **blocks(config)}
    constants |= {name: None for name in ("bias", "z") if name not in given}
    types = {**given, "weight": weight, **INDICES, **NUMBERS}
    kernel = forward_kernels.gate_up_kernel
    return compiled(kernel, types, constants, warps=config.warps, stages=config.stages, capability=capability)


def down(config, hidden_size, width, *, capability=90, tma=True) -> Machine:
    types = {**pointers("a", "weight", "y"), **INDICES}
    if tma:
        types["a"] = f"tensordesc<bf16[{config.block_m},{config.block_k}]>"
        types["weight"] = f"tensordesc<bf16[1,1,{config.block_n},{config.block_k}]>"
    constants = {"bias": None, "H": hidden_size, "I": width, "HAS_BIAS": False, "X_TMA": tma, "W_TMA": tma}
    constants |= {"FLAT": config.schedule == "flat", "OVERLAP": tma, **blocks(config)}
    kernel = forward_kernels.down_kernel
    return compiled(kernel, types, constants, warps=config.warps, stages=config.stages, capability=capability)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tile", unique("sm90", "gate_up"), ids=str)
def test_gate_up_on_hopper(tile, training):
    machine = gate_up(*tile, training=training)
    assert ".target sm_90a" in machine.ptx
    assert "HGMMA" in machine.sass
    assert "LDGSTS" in machine.sass
    assert "UTMALDG" in machine.sass
    assert "SHFL" not in machine.sass
    assert machine.spills == 0
    assert machine.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("tile", unique("sm90", "down"), ids=str)
def test_down_on_hopper(tile):
    machine = down(*tile)
    assert "HGMMA" in machine.sass
    assert "UTMALDG" in machine.sass
    assert machine.spills == 0
    assert machine.shared <= SHARED_LIMIT[90]


def test_a_clamped_activation_with_biases_and_odd_sizes_spills_nothing():
    for tile, *_ in unique("sm90", "gate_up"):
        assert gate_up(tile, 2880, 2880, training=True, clamped=True, bias=True).spills == 0


@pytest.mark.parametrize("tile", unique("sm80", "gate_up"), ids=str)
def test_gate_up_on_ampere(tile):
    machine = gate_up(*tile, training=True, capability=80, tma=False)
    assert "HMMA" in machine.sass
    assert "LDGSTS" in machine.sass
    assert machine.spills == 0
    assert machine.shared <= SHARED_LIMIT[80]


@pytest.mark.parametrize("tile", unique("sm80", "down"), ids=str)
def test_down_on_ampere(tile):
    machine = down(*tile, capability=80, tma=False)
    assert "HMMA" in machine.sass
    assert machine.spills == 0
    assert machine.shared <= SHARED_LIMIT[80]


@pytest.mark.parametrize("experts", [128, 512])
def test_routing_spills_nothing(experts):
    given = {"index": "*i64", **INDICES, "counts": "*i32"}
    given |= dict.fromkeys(("max_tiles", "rows", "num_experts", "chunks", "listers"), "i32")
    given_sizes = {"SLOTS": 1024, "KEYS": routing.KEYS_A_STEP, "EXPERTS": 2 * experts, "BLOCK_M": 128}
    ranks = {"SLOTS": routing.SLOTS_A_PROGRAM, "EXPERTS": experts}
    for kernel, own in ((routing._rank_kernel, ranks), (routing._count_kernel, {}), (routing._place_kernel, {})):
        sizes = {name: size for name, size in (given_sizes | own).items() if name in kernel.arg_names}
        types = {name: kind for name, kind in given.items() if name in kernel.arg_names}
        assert compiled(kernel, types, sizes, warps=8, stages=3).spills == 0


def test_combine_reads_sixteen_bytes_at_a_time():
    types = {**pointers("y", "out"), "weights": "*fp32", **INDICES, "num_experts": "i32"}
    types = {name: kind for name, kind in types.items() if name in forward_kernels.combine_kernel.arg_names}
    types |= {"weights_stride_t": "i32", "weights_stride_k": "i32"}
    constants = {"H": 2048, "TOP_K": 8, "BLOCK_H": 1024, "OVERLAP": True}
    machine = compiled(forward_kernels.combine_kernel, types, constants, warps=4, stages=3)
    assert machine.sass.count("LDG.E.128") >= 8
    assert machine.spills == 0
