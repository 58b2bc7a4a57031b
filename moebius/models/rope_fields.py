"""How a config.json says where rotary embedding turns what: theta, how many channels, YaRN.  No torch.

The same field may stand at the top, in `rope_parameters` (transformers 5) or in `rope_scaling` (before); all that are
given have to agree.
"""

from typing import Any

from moebius.config import Rope, Yarn
from moebius.models.reading import ConfigReader

SECTIONS = ("rope_parameters", "rope_scaling")
BESIDES = ("rope_theta", "partial_rotary_factor")


def read_rope(
    reader: ConfigReader,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    rotary_share: float | None = None,
    yarn: Yarn | None = None,
    interleaved: bool = False,
) -> Rope:
    """The rope of heads of `head_dim` channels.

    theta: the family's default.  rotary_share: its default of partial_rotary_factor; None where it turns whole heads.
    yarn: how it scales rope where the config does not say.
    """
    fields = reader.joined(*BESIDES, sections=SECTIONS)
    rope = Rope(
        theta=fields.positive("rope_theta", *_nested("rope_theta"), default=theta),
        rotary_dim=head_dim if rotary_share is None else _read_rotary_dim(fields, head_dim, rotary_share),
        interleaved=interleaved,
        yarn=yarn if _says_nothing(reader) else _read_yarn(reader, fields),
    )
    if rotary_share is None:
        _refuse_partial(fields)
    reader.close(fields)
    return rope


def write_rope(rope: Rope) -> dict[str, Any]:
    """Without the share of channels, which each family spells in its own way."""
    scaling = {} if rope.yarn is None else {"rope_scaling": _write_yarn(rope.yarn)}
    return {"rope_theta": rope.theta, **scaling}


def _nested(name: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for section in SECTIONS)


def _says_nothing(reader: ConfigReader) -> bool:
    """As in transformers: an empty `rope_parameters` says that rope is plain, an empty `rope_scaling` says nothing."""
    return reader.raw.get("rope_parameters") is None and not reader.raw.get("rope_scaling")


def _read_rotary_dim(fields: ConfigReader, head_dim: int, default: float) -> int:
    names = ("partial_rotary_factor", *_nested("partial_rotary_factor"))
    rotary_dim = int(head_dim * fields.share(*names, default=default))
    fits = rotary_dim > 0 and rotary_dim % 2 == 0
    fields.relate(names[0], fits, f"turns {rotary_dim} of {head_dim} channels; rope takes channels in pairs")
    return rotary_dim


def _refuse_partial(fields: ConfigReader) -> None:
    for name in ("partial_rotary_factor", *_nested("partial_rotary_factor")):
        fields.must_be(name, 1.0)


def _read_yarn(reader: ConfigReader, fields: ConfigReader) -> Yarn | None:
    kind = fields.one_of(*_nested("rope_type"), *_nested("type"), supported=("default", "yarn"))
    if kind != "yarn":
        return None
    trained = reader.integer("max_position_embeddings")
    return Yarn(
        factor=fields.positive(*_nested("factor")),
        original_max_position_embeddings=fields.integer(*_nested("original_max_position_embeddings"), default=trained),
        beta_fast=fields.positive(*_nested("beta_fast"), default=32.0, null=32.0),
        beta_slow=fields.positive(*_nested("beta_slow"), default=1.0, null=1.0),
        truncate=fields.boolean(*_nested("truncate"), default=True),
        mscale=_read_mscale(fields, "mscale"),
        mscale_all_dim=_read_mscale(fields, "mscale_all_dim"),
        attention_factor=fields.optional_positive(*_nested("attention_factor")),
    )


def _read_mscale(fields: ConfigReader, name: str) -> float | None:
    """0 means none, as in DeepSeek's own code."""
    return fields.non_negative(*_nested(name), default=0.0, null=0.0) or None


def _write_yarn(yarn: Yarn) -> dict[str, Any]:
    optional = {
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "attention_factor": yarn.attention_factor,
    }
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
        **{name: value for name, value in optional.items() if value is not None},
    }
