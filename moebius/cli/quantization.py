"""What the flags that commands share say of quantization."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebius.quantization.config import QuantizationConfig


def quantization_of(
    form: str | None, group_size: int | None, experts_only: bool, modules_to_not_convert: list[str] | None
) -> "QuantizationConfig | None":
    """None where none is asked for.  ArgumentError: options of it without it, or that its form does not have."""
    from moebius.errors import ArgumentError
    from moebius.quantization.config import QuantizationConfig

    if form is not None:
        parts = ("experts",) if experts_only else None
        return QuantizationConfig(form, group_size, None, parts, tuple(modules_to_not_convert or ()))
    if group_size is not None or experts_only or modules_to_not_convert:
        raise ArgumentError(
            "--group-size, --experts-only and --modules-to-not-convert are of --quantization: say it too"
        )
    return None
