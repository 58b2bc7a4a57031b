"""Rules that bring a checkpoint's keys to the model's names.  No torch.

A pattern is a template on whole dotted segments: `*` stands for an index, leading segments may be left out, and the
pattern must reach the end of the key.  It is never searched for inside a segment, so `experts.*.up_proj.weight` cannot
match `shared_experts`.  What a pattern leaves out in front (the layer, say) is carried over unchanged.
"""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from moebius.checkpoint.operations import MergeModulelist, Operation, SplitModulelist
from moebius.errors import ArgumentError

STAR = "*"
BELOW = ".**"


INDEX = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")
"""A whole segment of ASCII decimals without a leading zero."""


@lru_cache(maxsize=1 << 16)
def is_index(segment: str) -> bool:
    return INDEX.fullmatch(segment) is not None


def template_of(key: str) -> str:
    """The key with `*` for every index: model.layers.3.mlp.experts.17.up_proj.weight -> model.layers.*.mlp..."""
    return INDEX.sub(STAR, key)


def fits_template(patterns: "Sequence[Pattern]", template: str) -> bool:
    """May a key of this template match one of the patterns?  Literal indices in a pattern are left to Pattern.match."""
    wanted = (template_of(pattern.text) for pattern in patterns)
    return any(template == text or template.endswith(f".{text}") for text in wanted)


class Match(NamedTuple):
    """A pattern's fit on a key.  prefix: what stands in front, with its dot.  indices: one a `*`, in order."""

    prefix: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Pattern:
    text: str

    def __post_init__(self) -> None:
        if not self.text or not all(self.segments) or any(STAR in part and part != STAR for part in self.segments):
            raise ArgumentError(f"{self.text!r} is not a pattern: expected dotted segments, `*` alone for an index")

    @cached_property
    def segments(self) -> tuple[str, ...]:
        return tuple(self.text.split("."))

    @cached_property
    def stars(self) -> int:
        return self.segments.count(STAR)

    @cached_property
    def _places(self) -> tuple[tuple[int, ...], tuple[tuple[int, str], ...]]:
        """The positions of the stars, and those of the other segments with what stands there."""
        numbered = tuple(enumerate(self.segments))
        stars = tuple(at for at, part in numbered if part == STAR)
        return stars, tuple((at, part) for at, part in numbered if part != STAR)

    def match(self, key: str) -> Match | None:
        """The fit on a key, or None."""
        length = len(self.segments)
        parts = key.rsplit(".", length)
        if len(parts) < length:
            return None
        prefix = f"{parts.pop(0)}." if len(parts) > length else ""
        stars, others = self._places
        for at, wanted in others:
            if parts[at] != wanted:
                return None
        for at in stars:
            if not is_index(parts[at]):
                return None
        return Match(prefix, tuple([int(parts[at]) for at in stars]))

    def fill(self, prefix: str, indices: Sequence[int | str]) -> str:
        """The key with `prefix` in front and `indices` in the stars' places."""
        return prefix + self._format.format(*indices)

    @cached_property
    def _format(self) -> str:
        return ".".join("{}" if part == STAR else part.replace("{", "{{").replace("}", "}}") for part in self.segments)


@dataclass(frozen=True, init=False)
class WeightConverter:
    """Source patterns -> target patterns through operations.

    A `*` more in the sources than in the targets is the list that MergeModulelist stacks; one more in the targets is
    the list that SplitModulelist makes; the others are carried from source to target, in order.

        WeightConverter(["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"], "mlp.experts.gate_up_proj",
                        operations=[MergeModulelist(dim=0), Concatenate(dim=1)])

    Raises ArgumentError if patterns and operations do not go together.
    """

    sources: tuple[Pattern, ...]
    targets: tuple[Pattern, ...]
    operations: tuple[Operation, ...]
    _hash: int = field(repr=False, compare=False)

    def __init__(
        self,
        source_patterns: str | Sequence[str],
        target_patterns: str | Sequence[str],
        operations: Sequence[Operation] = (),
    ):
        object.__setattr__(self, "sources", _patterns(source_patterns))
        object.__setattr__(self, "targets", _patterns(target_patterns))
        object.__setattr__(self, "operations", tuple(operations))
        object.__setattr__(self, "_hash", hash((self.sources, self.targets, self.operations)))
        self._check()

    def __hash__(self) -> int:  # a rule is looked up for every key, and is deep
        return self._hash

    def _check(self) -> None:
        for patterns in (self.sources, self.targets):
            if not patterns or len({pattern.stars for pattern in patterns}) != 1:
                raise ArgumentError(f"{self}: the patterns of one side need the same number of `*`")
        if abs(self.merged) > 1:
            raise ArgumentError(
                f"{self}: {abs(self.merged)} lists at once; one MergeModulelist or SplitModulelist a rule"
            )
        kinds = (MergeModulelist, SplitModulelist)
        lists = sum(1 if isinstance(op, MergeModulelist) else -1 for op in self.operations if isinstance(op, kinds))
        if lists != self.merged:
            raise ArgumentError(f"{self}: its `*` ask for {self.merged} merged lists, its operations make {lists}")
        if not self.operations and len(self.sources) != len(self.targets):
            raise ArgumentError(f"{self}: several patterns on one side need operations that join or cut")

    @cached_property
    def merged(self) -> int:
        """1 if a list of sources is merged, -1 if a list of targets is made, 0 if neither."""
        return self.sources[0].stars - self.targets[0].stars

    @cached_property
    def carried(self) -> int:
        """How many leading `*` are carried from source to target."""
        return min(self.sources[0].stars, self.targets[0].stars)

    @cached_property
    def lists_alone(self) -> bool:
        """Are the sources items of lists, at any index?  All items of a list then fit at one place, or nowhere."""
        literal = any(is_index(segment) for pattern in self.sources for segment in pattern.segments)
        return self.merged > 0 and not literal

    def match_target(self, name: str) -> Match | None:
        """The fit of a target's name, with the carried indices only."""
        return self._match(self.targets, name)

    def match_source(self, key: str) -> Match | None:
        """The fit of a source's key, with the carried indices only."""
        return self._match(self.sources, key)

    def list_index(self, key: str) -> int:
        """The index of a source in the merged list."""
        return next(fit.indices[-1] for pattern in self.sources if (fit := pattern.match(key)))

    def list_name(self, key: str) -> str:
        """The key of a source with `*` for its index in the merged list."""
        pattern, fit = next((pattern, fit) for pattern in self.sources if (fit := pattern.match(key)))
        return pattern.fill(fit.prefix, (*fit.indices[:-1], STAR))

    def _match(self, patterns: Sequence[Pattern], key: str) -> Match | None:
        for pattern in patterns:
            fit = pattern.match(key)
            if fit is not None:
                return fit if len(fit.indices) == self.carried else Match(fit.prefix, fit.indices[: self.carried])
        return None

    def __str__(self) -> str:
        names = " -> ".join(",".join(pattern.text for pattern in side) for side in (self.sources, self.targets))
        return f"WeightConverter({names})"


class WeightRenaming(WeightConverter):
    """One key for another, the tensor as it is: WeightRenaming("block_sparse_moe.gate.weight", "mlp.gate.weight")."""

    def __init__(self, source_pattern: str, target_pattern: str):
        super().__init__(source_pattern, target_pattern)


@dataclass(frozen=True, init=False)
class WeightSkip:
    """Keys that the model does not use, with the reason that the plan prints.

    pattern: as a WeightConverter's; with `**` at its end it anchors at the key's start and fits all that lies below it:
    "vision_tower.**".  first: only where the first index is this or a later one: ("model.layers.*.**", first=61).
    beside: only if this key lies below the same head, too; what is not marked so is not skipped.
    """

    pattern: Pattern
    reason: str
    below: bool
    first: int
    beside: str

    def __init__(self, pattern: str, reason: str, *, first: int = 0, beside: str = ""):
        below = pattern.endswith(BELOW)
        object.__setattr__(self, "pattern", Pattern(pattern.removesuffix(BELOW)))
        object.__setattr__(self, "reason", reason)
        object.__setattr__(self, "below", below)
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "beside", beside)

    def fits(self, template: str) -> bool:
        """May a key of this template be one?"""
        if self.below:
            return template.startswith(f"{template_of(self.pattern.text)}.")
        return fits_template((self.pattern,), template)

    def match(self, key: str, keys: Container[str]) -> bool:
        """Is this one of the keys, where the files hold `keys`?"""
        fit = self._fit(key)
        if fit is None or (fit.indices and fit.indices[0] < self.first):
            return False
        return not self.beside or f"{self.pattern.fill(fit.prefix, fit.indices)}.{self.beside}" in keys

    def _fit(self, key: str) -> Match | None:
        if not self.below:
            return self.pattern.match(key)
        parts, length = key.split("."), len(self.pattern.segments)
        return self.pattern.match(".".join(parts[:length])) if len(parts) > length else None


@dataclass(frozen=True)
class PrefixRenaming:
    """A head of keys, in whole segments, that all other rules see as `target`:
    PrefixRenaming("language_model.model", "model").
    """

    source: str
    target: str

    def renamed(self, key: str) -> str | None:
        """The key as other rules see it; None if it has another head."""
        return _with_head(key, self.source, self.target)

    def stored(self, name: str) -> str | None:
        """The key that `renamed` makes this name of."""
        return _with_head(name, self.target, self.source)


def _with_head(key: str, old: str, new: str) -> str | None:
    return f"{new}.{key[len(old) + 1 :]}" if key.startswith(f"{old}.") else None


Rule = WeightConverter | WeightSkip | PrefixRenaming


def renamed_key(key: str, renamings: Iterable[PrefixRenaming]) -> str:
    """The key as rules see it."""
    return next((name for rule in renamings if (name := rule.renamed(key)) is not None), key)


def stored_key(name: str, renamings: Iterable[PrefixRenaming]) -> str:
    """The key in the files, from the one that rules see."""
    return next((key for rule in renamings if (key := rule.stored(name)) is not None), name)


def scale_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules that bring the scales of quantized weights where `rules` bring their values.

    The twin of a rule from `...weight` to T goes from `...weight_scale` to T_scale.
    """
    converters = (rule for rule in rules if isinstance(rule, WeightConverter))
    return tuple(_scale_twin(rule) for rule in converters if all(_is_weight(pattern) for pattern in rule.sources))


def _scale_twin(rule: WeightConverter) -> WeightConverter:
    sources, targets = ([f"{pattern.text}_scale" for pattern in side] for side in (rule.sources, rule.targets))
    return WeightConverter(sources, targets, rule.operations)


def _is_weight(pattern: Pattern) -> bool:
    return pattern.segments[-1] == "weight"


def _patterns(given: str | Sequence[str]) -> tuple[Pattern, ...]:
    return tuple(Pattern(text) for text in ([given] if isinstance(given, str) else given))
