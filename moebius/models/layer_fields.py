"""What a config.json says of experts and routing, and which layers have them.  No torch.

E experts, K experts a token, I expert width.
"""

from typing import Any, TypeVar

from moebius.checkpoint.files import shown
from moebius.config import (
    Activation,
    DecoderConfig,
    DenseMlp,
    LayerConfig,
    Mixer,
    Routing,
    SharedExpert,
    SigmoidTopK,
    SoftmaxGroupTopK,
    SparseMoe,
    SwiGLU,
)
from moebius.errors import ConfigError
from moebius.models.reading import ConfigReader

MAX_LAYERS = 10_000
SWIGLU = SwiGLU()

EXPERTS = ("num_experts", "num_local_experts")
"""The spellings of E."""
ROUTED_EXPERTS = ("n_routed_experts", *EXPERTS)
"""The spellings of E where some experts are shared, and not among them."""

RoutingKind = TypeVar("RoutingKind", bound=Routing)


# --- experts ---------------------------------------------------------------------------------------------------------


def read_moe(
    reader: ConfigReader,
    *,
    width_field: str,
    routing: Routing,
    experts_fields: tuple[str, ...] = EXPERTS,
    top_k_fields: tuple[str, ...] = ("num_experts_per_tok",),
    activation: Activation = SWIGLU,
    shared_expert: SharedExpert | None = None,
    bias: bool = False,
) -> SparseMoe:
    """width_field: which field is I.  experts_fields, top_k_fields: the spellings of E and K."""
    num_experts = reader.integer(*experts_fields)
    top_k = reader.integer(*top_k_fields)
    detail = f"{top_k} experts a token, but {experts_fields[0]} is {num_experts}"
    reader.relate(top_k_fields[0], top_k <= num_experts, detail, experts_fields[0])
    width = reader.integer(width_field)
    return SparseMoe(num_experts, top_k, width, routing, activation, shared_expert, bias)


def only_moe(config: DecoderConfig) -> SparseMoe:
    """The first sparse layer's experts.  ConfigError: there is none."""
    if not config.moe_layers:
        raise ConfigError(f"a {config.model_type} config.json needs at least one layer with experts")
    return config.moe_layers[0]


def routing_of(config: DecoderConfig, kind: type[RoutingKind]) -> RoutingKind:
    """How the first sparse layer routes.  ConfigError: in another way than the family does."""
    routing = only_moe(config).routing
    if not isinstance(routing, kind):
        raise ConfigError(f"a {config.model_type} config.json has no words for {type(routing).__name__}")
    return routing


def sparse_layer(config: DecoderConfig, unused: RoutingKind) -> tuple[SparseMoe, RoutingKind]:
    """The first sparse layer's experts and routing, for a family that has dense layers too.

    unused: a routing of the family's kind.  Where all layers are dense it comes with the smallest experts that read,
    as the fields have to be there all the same.  ConfigError: another kind of routing.
    """
    if config.moe_layers:
        return only_moe(config), routing_of(config, type(unused))
    width = _dense_width(config, _dense_layers(config))
    return SparseMoe(2, 1, width, unused, shared_expert=SharedExpert(width, gated=False)), unused


def read_plain_shared_expert(reader: ConfigReader, *, default: int | None = None) -> SharedExpert:
    """One MLP as wide as `n_shared_experts` experts.  default: how many, where the field may be absent."""
    width = reader.integer("moe_intermediate_size")
    return SharedExpert(width * reader.integer("n_shared_experts", default=default), gated=False)


def write_routed_experts(config: DecoderConfig, unused: SigmoidTopK | SoftmaxGroupTopK) -> dict[str, Any]:
    """As DeepSeek and its heirs say it, shared experts and groups included.  unused: see `sparse_layer`."""
    moe, routing = sparse_layer(config, unused)
    return {
        "moe_intermediate_size": moe.intermediate_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": _num_shared_experts(config.model_type, moe),
        "num_experts_per_tok": moe.top_k,
        "n_group": routing.num_groups,
        "topk_group": routing.top_groups,
        "routed_scaling_factor": routing.scale,
        "norm_topk_prob": isinstance(routing, SigmoidTopK) and routing.renormalize,
    }


def _num_shared_experts(model_type: str, moe: SparseMoe) -> int:
    width = 0 if moe.shared_expert is None else moe.shared_expert.intermediate_size
    if not width or width % moe.intermediate_size:
        raise ConfigError(
            f"a {model_type} config.json has no words for a shared expert of width {width} beside experts of "
            f"width {moe.intermediate_size}: it says how many experts wide that is"
        )
    return width // moe.intermediate_size


# --- groups of experts -----------------------------------------------------------------------------------------------


def read_groups(reader: ConfigReader, *, groups: int, kept: int, fewest: int) -> tuple[int, int]:
    """(num_groups, top_groups); null means that there are no groups, which is one.

    groups, kept: the family's defaults.  fewest: how many experts a group needs for its score.
    """
    num_groups = reader.optional_integer("n_group", absent=groups, minimum=1) or 1
    stated = reader.optional_integer("topk_group", absent=kept, minimum=1)
    top_groups = stated or 1
    num_experts, top_k = reader.integer(*ROUTED_EXPERTS), reader.integer("num_experts_per_tok")
    size = num_experts // num_groups
    fits = num_experts % num_groups == 0 and size >= fewest
    detail = f"{num_groups} groups of {num_experts} experts: expected equal ones of {fewest} or more"
    reader.relate("n_group", fits, detail, ROUTED_EXPERTS[0])
    fits = num_groups == 1 if stated is None else stated <= num_groups
    reader.relate("topk_group", fits, f"{shown(stated)} of {num_groups} groups", "n_group")
    detail = f"{top_k} experts a token from {top_groups} groups of {size}"
    reader.relate("num_experts_per_tok", top_k <= top_groups * size, detail, "n_group", "topk_group", ROUTED_EXPERTS[0])
    return num_groups, top_groups


def read_sigmoid_routing(
    reader: ConfigReader, *, groups: int, kept: int, scale: float, renormalize: bool = True
) -> SigmoidTopK:
    """As DeepSeek-V3 and its heirs say it.  groups, kept, scale, renormalize: the family's defaults."""
    reader.must_be("scoring_func", "sigmoid")
    reader.must_be("topk_method", "noaux_tc")
    num_groups, top_groups = read_groups(reader, groups=groups, kept=kept, fewest=2)
    return SigmoidTopK(
        renormalize=reader.boolean("norm_topk_prob", default=renormalize),
        num_groups=num_groups,
        top_groups=top_groups,
        scale=reader.positive("routed_scaling_factor", default=scale),
    )


# --- which layers have experts ---------------------------------------------------------------------------------------


def read_num_layers(reader: ConfigReader) -> int:
    return reader.integer("num_hidden_layers", maximum=MAX_LAYERS)


def read_stepped_layers(reader: ConfigReader, mixer: Mixer, moe: SparseMoe) -> tuple[LayerConfig, ...]:
    """Layer N is dense if `mlp_only_layers` names it, or `decoder_sparse_step` does not divide N + 1."""
    layers = read_num_layers(reader)
    named = reader.integers("mlp_only_layers", below=layers)
    step = reader.integer("decoder_sparse_step", default=1)
    sparse = [number not in named and (number + 1) % step == 0 for number in range(layers)]
    return _layers(reader, mixer, moe, sparse)


def read_leading_dense_layers(
    reader: ConfigReader, mixer: Mixer, moe: SparseMoe, *, default: int
) -> tuple[LayerConfig, ...]:
    """The first `first_k_dense_replace` layers are dense.  default: the family's."""
    reader.must_be("moe_layer_freq", 1)
    layers = read_num_layers(reader)
    dense = reader.integer("first_k_dense_replace", default=default, minimum=0)
    return _layers(reader, mixer, moe, [number >= dense for number in range(layers)])


def _layers(reader: ConfigReader, mixer: Mixer, moe: SparseMoe, sparse: list[bool]) -> tuple[LayerConfig, ...]:
    # the width says nothing where no layer is dense, and is then often left out
    width = reader.integer("intermediate_size", default=moe.intermediate_size if all(sparse) else None)
    return tuple(LayerConfig(mixer, moe if is_sparse else DenseMlp(width)) for is_sparse in sparse)


def write_stepped_layers(config: DecoderConfig) -> dict[str, Any]:
    dense = _dense_layers(config)
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(dense), "intermediate_size": _dense_width(config, dense)}


def write_leading_dense_layers(config: DecoderConfig) -> dict[str, Any]:
    dense = _dense_layers(config)
    return {"first_k_dense_replace": len(dense), "intermediate_size": _dense_width(config, dense)}


def _dense_layers(config: DecoderConfig) -> dict[int, DenseMlp]:
    numbered = enumerate(layer.feed_forward for layer in config.layers)
    return {number: part for number, part in numbered if isinstance(part, DenseMlp)}


def _dense_width(config: DecoderConfig, dense: dict[int, DenseMlp]) -> int:
    widths = [part.intermediate_size for part in dense.values()] or [only_moe(config).intermediate_size]
    return widths[0]
