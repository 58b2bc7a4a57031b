"""`moebius bench scaling`: what expert parallelism should cost on 8 to 1024 GPUs, by arithmetic on rates.  No torch.

E experts, K of them a token, ep ranks that share one set of them, H hidden, I intermediate.  Assumed: experts are
chosen uniformly, numbers have two bytes, a node's GPUs reach each other at one rate and other nodes at another.  Not
counted: ranks with more than their share of the tokens, latency, attention, whatever else a layer does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any, Literal, get_args

from moebius.errors import ArgumentError

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
EP_SIZES = (2, 4, 8, 16, 32, 64)
TOKENS_A_STEP = 65_536
BYTES_OF_BFLOAT16 = 2
BYTES_OF_STATE = 16  # of a parameter, over all ranks: float32 weight and gradient, two moments of AdamW

Exchange = Literal["row a (token, expert)", "gather_scatter", "all_to_all"]


@dataclass(frozen=True)
class Rates:
    """What one GPU does in a second.

    nvlink: bytes sent to GPUs of its node, measured on two H200.  infiniband: bytes sent to other nodes, assumed: 85 %
    of 400 Gbit/s.  flop: of the experts' products, measured on one H200 (forward and backward, 16,384 tokens).
    memory: bytes of a GPU.  node: GPUs of a node.
    """

    nvlink: float = 310e9
    infiniband: float = 42.5e9
    flop: float = 493e12
    memory: float = 141e9
    node: int = 8

    def __post_init__(self) -> None:
        if wrong := [name for name, value in asdict(self).items() if not value > 0]:
            raise ArgumentError(f"rates: {wrong[0]}: expected more than 0, found {getattr(self, wrong[0])}")


@dataclass(frozen=True)
class Shape:
    """A published model's sparse layers.  shared: experts that every token goes through, of the same width.

    parameters: of the whole model.  ep: the fewest ranks whose share of experts leaves room to train.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    shared: int
    sparse_layers: int
    parameters: float
    ep: int

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert."""
        return 3 * self.hidden_size * self.intermediate_size


SHAPES = (
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, 0, 48, 30.5e9, ep=8),
    Shape("Qwen3-235B-A22B", 4096, 1536, 128, 8, 0, 94, 235e9, ep=16),
    Shape("DeepSeek-V3", 7168, 2048, 256, 8, 1, 58, 671e9, ep=32),
)


def chance_of_a_row(num_experts: int, top_k: int, parts: int) -> float:
    """That at least one of K distinct experts, chosen uniformly, is among the E / parts of one part."""
    return 1 - comb(num_experts - num_experts // parts, top_k) / comb(num_experts, top_k)


def rows_a_token(exchange: Exchange, num_experts: int, top_k: int, ep: int) -> float:
    """Rows of H numbers that a rank sends for one of its tokens, each way; what stays on the rank is not sent."""
    match exchange:
        case "row a (token, expert)":
            return top_k * (ep - 1) / ep
        case "gather_scatter":
            return ep - 1
        case "all_to_all":
            return (ep - 1) * chance_of_a_row(num_experts, top_k, ep)


def compute_seconds(shape: Shape, rates: Rates) -> float:
    """Forward of one token through one layer's experts: 6 H I FLOP an expert."""
    return 2 * shape.expert_parameters * (shape.top_k + shape.shared) / rates.flop


def exchange_seconds(shape: Shape, rates: Rates, ep: int, *, two_level: bool = True) -> float:
    """There and back, for one token and layer, by an all-to-all with one row a (token, rank).

    two_level: between nodes a row is sent once a (token, node), and goes on from there within the node, while others
    are still under way: the slower of the two links counts.  distributed.AllToAll has one level.
    """
    nodes = max(1, ep // rates.node)
    rows = rows_a_token("all_to_all", shape.num_experts, shape.top_k, ep)
    flat = rows * (ep - min(ep, rates.node)) / max(1, ep - 1)
    between = rows_a_token("all_to_all", shape.num_experts, shape.top_k, nodes) if two_level else flat
    row = 2 * BYTES_OF_BFLOAT16 * shape.hidden_size
    return row * max(rows / rates.nvlink, between / rates.infiniband)


def copies_seconds(shape: Shape, rates: Rates, ep: int, gpus: int) -> float:
    """Of one layer and step: the copies of a set of experts gather bfloat16 weights and reduce float32 gradients.

    Both go between nodes.
    """
    copies, parameters = gpus // ep, shape.num_experts // ep * shape.expert_parameters
    return 3 * BYTES_OF_BFLOAT16 * parameters * (1 - 1 / copies) / rates.infiniband


def training_efficiency(
    shape: Shape, rates: Rates, gpus: int, tokens: int = TOKENS_A_STEP, *, two_level: bool = True
) -> tuple[float, float]:
    """Of the sparse layers: the share of the time that is compute, if none and if all of the rest hides behind it.

    tokens: of each rank in one step, over which weights are kept.  A backward is twice a forward's compute, and sends
    what the forward sent.
    """
    compute = 3 * compute_seconds(shape, rates)
    exchange = exchange_seconds(shape, rates, shape.ep, two_level=two_level)
    links = 2 * exchange + copies_seconds(shape, rates, shape.ep, gpus) / tokens
    return compute / (compute + links), min(1.0, compute / links) if links else 1.0


def held_bytes(shape: Shape, gpus: int) -> float:
    """Of a rank in training: its part of the states, and its share of all layers' experts, gathered."""
    experts = shape.num_experts // shape.ep * shape.expert_parameters * shape.sparse_layers
    return BYTES_OF_STATE * shape.parameters / gpus + BYTES_OF_BFLOAT16 * experts


def fits(shape: Shape, rates: Rates, gpus: int) -> bool:
    return gpus >= shape.ep and held_bytes(shape, gpus) <= rates.memory


# --- the report ------------------------------------------------------------------------------------------------------


def run(rates: Rates, path: Path, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The report as plain data.  measured: one of `moebius bench parallel`, to hold the model against; None: there is
    none at its path.
    """
    check = checked(measured, rates) if measured else []
    return {
        "rates": asdict(rates),
        "tokens_a_step": TOKENS_A_STEP,
        "shapes": [_row(shape, rates) for shape in SHAPES],
        "check": check,
        "unchecked": "" if check else _lacking(path, measured),
    }


def _lacking(path: Path, measured: Mapping[str, Any] | None) -> str:
    """Why the model is held against nothing."""
    if measured is None:
        return f"there is no {path.absolute()}; give a report of `moebius bench parallel` with --measured"
    return f"{path} has neither an exchange nor the prefill of one rank and of several; give another with --measured"


def _row(shape: Shape, rates: Rates) -> dict[str, Any]:
    exchange = {
        ep: {
            "two_level_ns": exchange_seconds(shape, rates, ep) * 1e9,
            "flat_ns": exchange_seconds(shape, rates, ep, two_level=False) * 1e9,
        }
        for ep in EP_SIZES
    }
    return {
        **asdict(shape),
        "compute_ns": compute_seconds(shape, rates) * 1e9,
        "exchange": exchange,
        "training_efficiency": _efficiencies(shape, rates, two_level=True),
        "training_efficiency_flat": _efficiencies(shape, rates, two_level=False),
    }


def _efficiencies(shape: Shape, rates: Rates, *, two_level: bool) -> dict[int, tuple[float, float] | None]:
    """By the number of GPUs; None where there are too few."""
    return {
        gpus: training_efficiency(shape, rates, gpus, two_level=two_level) if fits(shape, rates, gpus) else None
        for gpus in GPUS
    }


def checked(measured: Mapping[str, Any], rates: Rates) -> list[dict[str, Any]]:
    """The model's answers beside a report of `moebius bench parallel`, as far as that has them."""
    shape, ranks = shape_of(measured["model"]), measured["ranks"]
    return [*_prefill_check(measured, shape, ranks, rates), *_exchange_checks(measured, shape, ranks, rates)]


def _prefill_check(measured: Mapping[str, Any], shape: Shape, ranks: int, rates: Rates) -> Iterator[dict[str, Any]]:
    """From the measured time of one GPU, which is of all that a layer does; the exchange is not hidden at all."""
    rows = {row["way"]: row["prefill"] for row in measured["rows"] if "prefill" in row}
    if "moebius 1" in rows and "moebius ep" in rows:
        alone = rows["moebius 1"]["seconds"] / measured["tokens"] / shape.sparse_layers
        predicted = ranks * alone / (alone + exchange_seconds(shape, rates, ranks))
        speedup = rows["moebius ep"]["tokens_a_second"] / rows["moebius 1"]["tokens_a_second"]
        yield {"what": f"prefill on {ranks} ranks, times one", "model": predicted, "measured": speedup}


def _exchange_checks(measured: Mapping[str, Any], shape: Shape, ranks: int, rates: Rates) -> Iterator[dict[str, Any]]:
    """Of the most tokens that were measured: few are a matter of latency, which the model leaves out."""
    for row in measured["exchanges"]:
        if row["tokens"] == measured["tokens"] and row["exchange"] in get_args(Exchange):
            rows = rows_a_token(row["exchange"], shape.num_experts, shape.top_k, ranks) * row["tokens"]
            seconds = rows * 2 * BYTES_OF_BFLOAT16 * shape.hidden_size / rates.nvlink
            what = f"{row['exchange']}, {row['tokens']} tokens a rank, ms a layer"
            yield {"what": what, "model": seconds * 1e3, "measured": row["seconds"] * 1e3}


def shape_of(config: Mapping[str, Any]) -> Shape:
    """What a config.json says, as far as an exchange depends on it."""
    return Shape(
        name=config["model_type"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["moe_intermediate_size"],
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        shared=0,
        sparse_layers=config["num_hidden_layers"],
        parameters=0,
        ep=1,
    )


def table(report: Mapping[str, Any]) -> str:
    """The arithmetic for people: what an exchange costs beside compute, what is left in training, and the check."""
    rates = Rates(**report["rates"])
    given = (
        f"{rates.nvlink / 1e9:g} GB/s within nodes of {rates.node}, {rates.infiniband / 1e9:g} GB/s between them, "
        f"{rates.flop / 1e12:g} TFLOP/s, {rates.memory / 1e9:g} GB"
    )
    return "\n".join(
        [
            f"Arithmetic, not measured; a GPU: {given}",
            "",
            "forward, ns a token and layer; between nodes a row a (token, node), in brackets a row a (token, rank)",
            f"{'':<18}{'compute':>8}" + "".join(f"{f'ep {ep}':>14}" for ep in EP_SIZES),
            *(_exchange_line(row) for row in report["shapes"]),
            "",
            f"training, sparse layers, {report['tokens_a_step']:,} tokens a rank and step: the share of time that is "
            "compute, nothing to all of the rest hidden; -: too few GPUs",
            f"{'':<18}{'ep':>8}" + "".join(f"{f'{gpus} GPUs':>14}" for gpus in GPUS),
            *(line for row in report["shapes"] for line in _training_lines(row)),
            *_check_lines(report),
        ]
    )


def _exchange_line(row: Mapping[str, Any]) -> str:
    return f"{row['name']:<18}{row['compute_ns']:>8.0f}" + "".join(
        f"{_both(times['two_level_ns'], times['flat_ns']):>14}" for times in row["exchange"].values()
    )


def _both(two_level: float, flat: float) -> str:
    return f"{two_level:.0f}" if two_level == flat else f"{two_level:.0f} ({flat:.0f})"


def _training_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """Two where ranks that share experts are on several nodes."""
    two_level, flat = row["training_efficiency"], row["training_efficiency_flat"]
    yield f"{row['name']:<18}{row['ep']:>8}" + _spans(two_level)
    if flat != two_level:
        yield f"{'  a row a (token, rank)':<26}" + _spans(flat)


def _spans(efficiencies: Mapping[int, tuple[float, float] | None]) -> str:
    spans = [f"{span[0]:.2f}-{span[1]:.2f}" if span else "-" for span in efficiencies.values()]
    return "".join(f"{span:>14}" for span in spans)


def _check_lines(report: Mapping[str, Any]) -> list[str]:
    if report["unchecked"]:
        return ["", f"no measurement to hold it against: {report['unchecked']}"]
    rows = [f"{row['what']:<52}{row['model']:>10.3g}{row['measured']:>10.3g}" for row in report["check"]]
    return ["", f"{'beside a measurement':<52}{'model':>10}{'measured':>10}", *rows]
