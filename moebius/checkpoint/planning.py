"""The plan: every key routed once, every destination byte covered exactly once, before any weight is read.  No torch.

`plan` goes from the targets to the keys that they need (see conversion.py) and compares with the keys that are there.
All faults are gathered and raised in one CheckpointError.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moebius.checkpoint import describe
from moebius.checkpoint.comparing import NAMED_KEYS, compare_conversion, compare_double, gathered, ranges
from moebius.checkpoint.conversion import Conversion, copied, expand
from moebius.checkpoint.converter import (
    Match,
    PrefixRenaming,
    Rule,
    WeightConverter,
    WeightSkip,
    fits_template,
    scale_rules,
    stored_key,
    template_of,
)
from moebius.checkpoint.coverage import uncovered
from moebius.checkpoint.encodings import Constant, Encoded, Stored, pieces, unnamed_form, view
from moebius.checkpoint.files import ITEM_BYTES, CheckpointFiles, TensorInfo, fault_error
from moebius.checkpoint.operations import LayoutError, Part
from moebius.checkpoint.routing import Place, route
from moebius.errors import ArgumentError, Fault
from moebius.quantization.forms import Form

ADVICE = "fetch the checkpoint again; if config.json was edited, put back what it said"
STAGING_BYTES = 1 << 20  # for what cannot be read straight into place; small enough to stay in the cache
DECODING_BYTES = 24 << 20  # for what is decoded: stored bytes, the same in float32, and what the arithmetic needs
PACKING_BYTES = 96 << 20  # for what is quantized: rows as they are stored, and what the arithmetic needs
DEVICE_PACKING_BYTES = 224 << 20  # the same on a GPU, where each launch has to do with many rows


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the model.  aliases: other names under which files may hold it (tied weights)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Read:
    """A stored tensor and where it goes: each part's `place` is in it, its `origin` in the target that it names."""

    info: TensorInfo
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Of what is read."""
        return _payload(self)


@dataclass(frozen=True, slots=True)
class Decode:
    """A stored quantized weight and where it goes once it is decoded; parts: as a Read's."""

    info: Encoded
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Of what is read."""
        return _payload(self)


@dataclass(frozen=True, slots=True)
class Pack:
    """A stored weight, plain or in another form, and where it goes once it is quantized.

    parts: as a Read's, but each `origin` is in the weight `name`, of `shape`, which stacks so many `segments`.  Its
    values go to the target `name`, its scales to `scale_name`.
    """

    info: Stored
    parts: tuple[Part, ...]
    name: str
    shape: tuple[int, ...]
    form: Form
    segments: int

    @property
    def scale_name(self) -> str:
        return f"{self.name}_scale"

    @property
    def nbytes(self) -> int:
        """Of what is read."""
        return _payload(self)


@dataclass(frozen=True)
class Plan:
    """What loading will do.

    stored: the files' tensors by the keys that rules see.  reads, decodes, packs: in the files' order.  skipped:
    (tensor, reason).  doubles: (second copy of a tied weight, its target), which must equal the first.  constants:
    compared, too.
    """

    files: CheckpointFiles
    stored: Mapping[str, Stored]
    targets: Mapping[str, Target]
    conversions: tuple[Conversion, ...]
    reads: tuple[Read, ...]
    decodes: tuple[Decode, ...]
    skipped: tuple[tuple[TensorInfo, str], ...]
    doubles: tuple[tuple[TensorInfo, str], ...]
    constants: tuple[Constant, ...]
    packs: tuple[Pack, ...] = ()

    @cached_property
    def bytes_to_read(self) -> int:
        others = (*(info for info, _ in self.doubles), *(constant.info for constant in self.constants))
        return sum(way.nbytes for way in self.ways) + sum(info.nbytes for info in others)

    @property
    def ways(self) -> "tuple[Read | Decode | Pack, ...]":
        """All that is read into targets."""
        return (*self.reads, *self.decodes, *self.packs)

    @cached_property
    def encoded(self) -> Mapping[str, Form]:
        """The targets whose stored form is quantized and is decoded while it is read."""
        return {part.name: decode.info.form for decode in self.decodes for part in decode.parts}

    @cached_property
    def quantized(self) -> Mapping[str, Form]:
        """The targets that are quantized while they are read: the values, whose scales are targets of their own."""
        return {pack.name: pack.form for pack in self.packs}

    @cached_property
    def quantized_bytes(self) -> int:
        """Of their values and scales."""
        return sum(self.targets[end].nbytes for name in self.quantized for end in (name, f"{name}_scale"))

    @cached_property
    def target_bytes(self) -> int:
        return sum(target.nbytes for target in self.targets.values())

    @property
    def peak_bytes(self) -> int:
        """Memory that loading needs at its peak: the model once, and staging (on many processors, a few MiB more)."""
        staging = PACKING_BYTES if self.packs else DECODING_BYTES if self.decodes else STAGING_BYTES
        return self.target_bytes + staging

    def __str__(self) -> str:
        return describe.table(self)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: rows of the printed table, totals in bytes, what is skipped and why."""
        return describe.as_json(self)


def _payload(way: Read | Decode | Pack) -> int:
    """The stored bytes of its parts: all of the tensor's, unless other ways, or other processes, take the rest."""
    elements = math.prod(way.info.shape)
    taken = sum(math.prod(part.shape) for part in way.parts)
    return way.info.nbytes * taken // elements if elements else 0


def plan(
    files: CheckpointFiles,
    rules: Iterable[Rule],
    targets: Iterable[Target],
    overrides: Iterable[Rule] = (),
    *,
    form: Form | None = None,
    keep: bool = False,
) -> Plan:
    """Plans how `files` fill `targets`.

    rules: the family's.  overrides: the user's; where one of them finds its keys, it is taken before the family's.
    form: in which weights may be stored; they are decoded while they are read, or, with `keep`, their values and
    scales fill targets of their own: T and T_scale.
    Raises CheckpointError with all faults: missing, unexpected, extra or doubly claimed keys, gaps in an index, wrong
    shapes and dtypes, layouts mixed within one parameter.  Raises ArgumentError for overrides that no key fits.
    """
    tiers = [(*tier, *scale_rules(tier)) if keep else tuple(tier) for tier in (overrides, rules)]
    planner = _Planner(files, tiers, {target.name: target for target in targets}, form, keep)
    planner.refuse_idle_overrides(tuple(overrides))
    return planner.run()


class _Planner:
    def __init__(
        self,
        files: CheckpointFiles,
        tiers: Sequence[Sequence[Rule]],
        targets: Mapping[str, Target],
        form: Form | None,
        keep: bool,
    ):
        everything = [rule for tier in tiers for rule in tier]
        self.files, self.targets, self.form = files, targets, form
        self.renamings = [rule for rule in everything if isinstance(rule, PrefixRenaming)]
        seen = view(files, self.renamings, form, keep)
        self.tensors, self.constants = seen.tensors, seen.constants
        self.shapes = {name: target.shape for name, target in targets.items()}
        self.stored = {key: info.shape for key, info in self.tensors.items()}
        self.tiers = [[rule for rule in tier if isinstance(rule, WeightConverter)] for tier in tiers]
        self.skips = [rule for rule in everything if isinstance(rule, WeightSkip)]
        self.faults: list[Fault] = list(seen.faults)
        self.claims: dict[str, Conversion] = {}
        self.filled: dict[str, Conversion] = {}
        self.routes = route(self.tensors, [rule for tier in self.tiers for rule in tier])
        self.by_template: dict[str, list[list[WeightConverter]]] = {}

    def refuse_idle_overrides(self, overrides: Sequence[Rule]) -> None:
        """A user's converter that does nothing was meant to do something; what else is wrong may follow from it."""
        at_work = {rule for rule, _ in self.routes.places}
        if idle := [rule for rule in overrides if isinstance(rule, WeightConverter) and rule not in at_work]:
            raise ArgumentError(
                f"weight_conversions: no key in {self.files.folder} fits",
                faults=[Fault(str(rule), "no key fits it") for rule in idle],
                advice="correct the source patterns, or leave it out",
            )

    def run(self) -> Plan:
        for name in self.targets:
            if name not in self.filled:
                self._fill(name)
        doubles = self._doubles()
        skipped = self._skipped()
        self._leftovers({*doubles, *skipped})
        if self.faults:
            raise fault_error(self.files.folder, self._faults(), ADVICE)
        conversions = tuple(dict.fromkeys(self.filled.values()))
        return Plan(
            self.files,
            self.tensors,
            self.targets,
            conversions,
            *self._ways(conversions),
            tuple((info, reason) for key, reason in skipped.items() for info in pieces(self.tensors[key])),
            tuple((info, name) for key, name in doubles.items() for info in pieces(self.tensors[key])),
            self.constants,
        )

    def _faults(self) -> list[Fault]:
        """All faults, keys spelled as the files spell them; one, where all follow from it."""
        if not self.form and (key := unnamed_form(self.files)):
            detail = f"the files hold quantized weights, such as {key}; nothing says in which form"
            return [Fault("config.json", "no quantization_config", detail)]
        faults = gathered(self.faults, self.stored, self.claims)
        own = {key: pieces(info)[0].name for key, info in self.tensors.items()}
        names = {stored: stored for info in self.tensors.values() for stored in (piece.name for piece in pieces(info))}
        return [
            replace(fault, where=(own | names).get(fault.where) or stored_key(fault.where, self.renamings))
            for fault in faults
        ]

    # --- from targets to keys ---

    def _fill(self, name: str) -> None:
        """Chooses the form in which the files hold one target, and checks it."""
        forms = self._forms(name)
        if len(forms) > 1:
            self._refuse_mixture(name, forms)
        conversion = forms[0] if forms else self._absent(name)
        if conversion is None:
            return
        for target in conversion.targets:
            self.filled[target] = conversion
        self._claim(conversion)
        self.faults.extend(compare_conversion(conversion, self.tensors, self.targets))

    def _refuse_mixture(self, name: str, forms: Sequence[Conversion]) -> None:
        present = ([key for key in form.keys if key in self.stored] for form in forms)
        held = " and ".join(f"{keys[0]} ({self.tensors[keys[0]].file})" for keys in present if keys)
        self.faults.append(Fault(name, "two layouts at once", f"the files hold {held}"))
        for form in forms[1:]:  # their keys are part of this fault, not unexpected ones
            self.claims |= {key: form for key in form.keys if key not in self.claims}

    def _forms(self, name: str) -> list[Conversion]:
        """The ways to fill a target of which at least one key is there; the user's rules come first."""
        overrides, rules = self._rules_for(name)
        forms = self._present(name, overrides)
        if forms:
            return forms
        return self._copies(name, rules) + self._present(name, rules)

    def _copies(self, name: str, rules: Iterable[WeightConverter]) -> list[Conversion]:
        """The target as it is, under one of its names, unless a rule says what a key of that name holds."""
        target = self.targets[name]
        keys = [key for key in (name, *target.aliases) if key in self.stored][:1]
        taken = any(rule.match_source(key) for rule in rules for key in keys)
        return [] if taken else [copied(name, target.shape, key) for key in keys]

    def _rules_for(self, name: str) -> list[list[WeightConverter]]:
        template = template_of(name)
        if template not in self.by_template:
            fits = [[rule for rule in tier if fits_template(rule.targets, template)] for tier in self.tiers]
            self.by_template[template] = fits
        return self.by_template[template]

    def _present(self, name: str, rules: Iterable[WeightConverter]) -> list[Conversion]:
        fits = [(rule, match) for rule in rules if (match := rule.match_target(name))]
        forms = [self._expand(name, rule, match) for rule, match in fits if (rule, match) in self.routes.places]
        return [form for form in forms if form]

    def _expand(self, name: str, rule: WeightConverter, match: Match) -> Conversion | None:
        try:
            return expand(rule, match, self.shapes, self.stored)
        except LayoutError as error:
            self.faults.append(Fault(name, "cannot be converted", f"{rule}: {error}"))
            self.filled[name] = Conversion(rule, (name,), ())
            return None

    def _absent(self, name: str) -> Conversion | None:
        """Nothing in the files fills the target: the form of the family's first rule says what is missing."""
        if name in self.filled:
            return None
        for rule in self._rules_for(name)[1]:
            match = rule.match_target(name)
            return match and self._expand(name, rule, match)
        return copied(name, self.targets[name].shape, name)

    def _claim(self, conversion: Conversion) -> None:
        for key in conversion.keys:
            if other := self.claims.get(key):
                self.faults.append(Fault(key, "claimed twice", f"for {other.targets[0]} and {conversion.targets[0]}"))
            self.claims[key] = conversion

    # --- keys that no target asked for ---

    def _doubles(self) -> dict[str, str]:
        """Key -> target, of second copies of tied weights."""
        doubles = {
            key: target
            for target in self.targets.values()
            for key in target.aliases
            if key in self.stored and key not in self.claims
        }
        faults = (compare_double(self.tensors[key], target, self.tensors) for key, target in doubles.items())
        self.faults.extend(fault for fault in faults if fault)
        return {key: target.name for key, target in doubles.items()}

    def _skipped(self) -> dict[str, str]:
        """Key -> reason, of what the model does not use."""
        found = [
            (key, fits)
            for template, keys in self.routes.templates.items()
            if (fits := [rule for rule in self.skips if rule.fits(template)])
            for key in keys
        ]
        skipped: dict[str, str] = {}
        for key, fits in found:
            rule = next((rule for rule in fits if rule.match(key, self.tensors)), None)
            if rule and key in self.claims:
                self.faults.append(Fault(key, "claimed twice", f"for {self.claims[key].targets[0]} and to be skipped"))
            elif rule:
                skipped[key] = rule.reason
        return skipped

    def _leftovers(self, known: set[str]) -> None:
        places = {key: place for place, keys in self.routes.places.items() for key in keys}
        extras: dict[tuple[Place, str], list[str]] = defaultdict(list)
        for key in (key for key in self.stored if key not in self.claims and key not in known):
            place = places.get(key)
            if place and self._list_length(place):
                extras[place, place[0].list_name(key)].append(key)
            else:
                detail = f"in {self.tensors[key].file}; no parameter of the model takes it"
                self.faults.append(Fault(key, "unexpected", detail))
        for (place, name), keys in extras.items():
            self.faults.extend(self._extra(place, name, keys))

    def _list_length(self, place: Place) -> int:
        """How many items the model's list at this place has; 0 if it has none there."""
        taken = next((self.claims[key] for key in self.routes.places[place] if key in self.claims), None)
        return len(taken.sources[0]) if taken and place[0].merged > 0 else 0

    def _extra(self, place: Place, name: str, keys: Sequence[str]) -> list[Fault]:
        ids = ranges(place[0].list_index(key) for key in self.routes.places[place])
        detail = f"ids found: {ids}; the model holds 0-{self._list_length(place) - 1}"
        if len(keys) > NAMED_KEYS:
            return [Fault(name, "extra index", detail)]
        return [Fault(key, "extra index", f"in {self.tensors[key].file}; {detail}") for key in keys]

    # --- the result ---

    def _ways(self, conversions: Sequence[Conversion]) -> tuple[tuple[Read, ...], tuple[Decode, ...]]:
        sources = {source.key: source for form in conversions for group in form.sources for source in group}
        order = {shard.path.name: number for number, shard in enumerate(self.files.shards)}
        found = sorted(
            ((self.tensors[key], source.layout.parts) for key, source in sources.items()),
            key=lambda way: (order[way[0].file], way[0].offset),
        )
        faults = uncovered(self.shapes, (part for _, parts in found for part in parts))
        if faults:
            raise fault_error(self.files.folder, faults)
        reads = tuple(Read(info, parts) for info, parts in found if isinstance(info, TensorInfo))
        return reads, tuple(Decode(info, parts) for info, parts in found if isinstance(info, Encoded))
