"""Quantized weights as checkpoints publish them: keys and layout for a model that was quantized while it was loaded.

A held weight T is saved under names that end as its keys in the files do: T + "_packed", T + "_scale" and T + "_shape"
for 4-bit integers, T and T + "_scale_inv" for 8-bit floats, and so on.  The family's rules for `...weight`, with these
ends on both sides, run backwards and bring each to the hub's layout, and the plain weights beside them to their own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.checkpoint.comparing import FLOATS
from moebius.checkpoint.converter import Rule, WeightConverter
from moebius.checkpoint.encodings import WEIGHT, Ends, ends_of
from moebius.checkpoint.owning import WHOLE
from moebius.checkpoint.planning import Target
from moebius.checkpoint.quantizing import Packing
from moebius.checkpoint.reading import dtype_name
from moebius.checkpoint.reversing import SavePlan, from_nothing, infos
from moebius.errors import Fault, SaveError
from moebius.quantization.forms import Form

Shapes = Mapping[str, tuple[int, ...]]
AS_HELD: Shapes = {}


@dataclass(frozen=True)
class Publication:
    """plan: what is to be written.  tensors: what it is written from, of some of them the rows in `boxes` alone.  form:
    of all that is quantized.
    """

    plan: SavePlan
    tensors: Mapping[str, Tensor]
    form: Form
    boxes: Mapping[str, range]

    @property
    def plain_modules(self) -> list[str]:
        """The modules, as the hub names them, whose matrices are not quantized; the experts of a layer as one."""
        found = (info for shard in self.plan.shards for info in infos(shard) if info.name.endswith(WEIGHT))
        matrices = (info.name for info in found if len(info.shape) > 1 and info.dtype in FLOATS)
        return list(dict.fromkeys(re.sub(r"\.experts\.\d+\..*", ".experts", name[: -len(WEIGHT)]) for name in matrices))


def publish(
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    held: Mapping[str, Packing],
    max_shard_bytes: int,
    *,
    packed: bool = False,
    shapes: Shapes = AS_HELD,
    boxes: Mapping[str, range] = WHOLE,
) -> Publication:
    """The save of a model, {name: tensor}, whose `held` weights are quantized: values by name, scales at <name>_scale.

    packed: the experts of a layer in one tensor, which is published for mxfp4 alone.  boxes: the rows (axis 0) that
    this process has of tensors that it does not hold whole; shapes: of these tensors, whole.
    SaveError: weights for which the family has no published layout in that form, all of them named.
    """
    form = _only_form(held)
    rules = unmerged(rules) if packed else rules
    ends = ends_of(form)
    twins = [twin for rule in rules if isinstance(rule, WeightConverter) for twin in _twins(rule, ends)]
    _check(held, form, ends, twins)
    saved = list(_saved(tensors, held, ends, shapes, boxes))
    targets = [Target(one.name, one.shape, dtype_name(one.tensor.dtype)) for one in saved]
    return Publication(
        from_nothing([*twins, *rules], targets, max_shard_bytes),
        {one.name: one.tensor for one in saved},
        form,
        {one.name: one.box for one in saved if one.box is not None},
    )


def unmerged(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules but those that put the experts of a layer together: run backwards, they leave them so."""
    return tuple(rule for rule in rules if not (isinstance(rule, WeightConverter) and rule.merged > 0))


def _only_form(held: Mapping[str, Packing]) -> Form:
    forms = list(dict.fromkeys(packing.form for packing in held.values()))
    if len(forms) != 1:
        raise SaveError(f"{len(forms)} quantized forms in one model have no published layout; nothing was written")
    return forms[0]


def _twins(rule: WeightConverter, ends: Ends) -> Iterator[WeightConverter]:
    """What the rule for a plain weight is for values, scales and shape; of experts published in one tensor, the rules
    for values and scales themselves, to the names under which these are saved.
    """
    sources = [pattern.text for pattern in rule.sources]
    targets = [pattern.text for pattern in rule.targets]
    for end in filter(None, (ends.values, ends.scales, ends.shape)):
        if ends.stem and all(source.endswith(ends.stem) for source in sources):
            yield WeightConverter([s + end for s in sources], [t + end for t in targets], rule.operations)
        elif not ends.stem and all(source.endswith(end) for source in sources):
            own = [target.removesuffix("_scale") + end for target in targets]
            yield WeightConverter(sources, own, rule.operations)


def _check(held: Mapping[str, Packing], form: Form, ends: Ends, twins: Sequence[WeightConverter]) -> None:
    """Every weight needs a rule for its scales, or is a matrix under its own name."""
    homeless = [
        name
        for name in held
        if not (ends.stem and name.endswith(ends.stem)) and not any(t.match_target(name + ends.scales) for t in twins)
    ]
    if homeless:
        raise SaveError(
            "the model was not saved; what stood there is unchanged",
            faults=[Fault(name, "no published layout", f"as {form.name} in this family") for name in homeless],
            advice="quantize to a form in which the family is published, or leave these weights plain",
        )


class _Saved(NamedTuple):
    """A tensor under the name that it is saved under.  shape: of the whole, of which it is the rows in `box`."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    box: range | None


def _saved(
    tensors: Mapping[str, Tensor], held: Mapping[str, Packing], ends: Ends, shapes: Shapes, boxes: Mapping[str, range]
) -> Iterator[_Saved]:
    def under(name: str, own: str) -> _Saved:
        return _Saved(name, tensors[own], shapes.get(own, tuple(tensors[own].shape)), boxes.get(own))

    scales = {f"{name}_scale" for name in held}
    yield from (under(name, name) for name in tensors if name not in held and name not in scales)
    for name, packing in held.items():
        yield (values := under(name + ends.values, name))
        yield under(name + ends.scales, f"{name}_scale")
        if ends.shape:
            said = _said(values.tensor.shape, packing)
            yield _Saved(name + ends.shape, said, (*values.shape[:-2], *said.shape[-1:]), values.box)


def _said(values: Sequence[int], packing: Packing) -> Tensor:
    """What `weight_shape` says of each of the stacked matrices, for values of this shape: [..., 2 * segments] int64."""
    *lead, rows, width = packing.form.weight_shape(values)
    return torch.tensor([rows // packing.segments, width] * packing.segments).expand(*lead, -1).contiguous()
