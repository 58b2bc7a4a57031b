"""Rules that bring a checkpoint's keys to the model's names.  No torch.

A pattern is a template on whole dotted segments: `*` stands for an index, leading segments may be left out, and the
pattern must reach the end of the key.  It is never searched for inside a segment, so `experts.*.up_proj.weight` cannot
match `shared_experts`.  What a pattern leaves out in front (the layer, say) is carried over unchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from moebius.checkpoint.operations import MergeModulelist, Operation, SplitModulelist
from moebius.errors import ArgumentError

STAR = "*"


@lru_cache(maxsize=1 << 16)
def is_index(segment: str) -> bool:
    """ASCII decimals without a leading zero."""
    return segment.isascii() and segment.isdecimal() and (segment == "0" or segment[0] != "0")


def template_of(key: str) -> str:
    """The key with `*` for every index: model.layers.3.mlp.experts.17.up_proj.weight -> model.layers.*.mlp..."""
    return ".".join(STAR if is_index(segment) else segment for segment in key.split("."))


def fits_template(patterns: "Sequence[Pattern]", template: str) -> bool:
    """May a key of this template match one of the patterns?  Literal indices in a pattern are left to Pattern.match."""
    wanted = (template_of(pattern.text) for pattern in patterns)
    return any(template == text or template.endswith(f".{text}") for text in wanted)


@dataclass(frozen=True)
class Match:
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

    @property
    def stars(self) -> int:
        return self.segments.count(STAR)

    def match(self, key: str) -> Match | None:
        """The fit on a key, or None."""
        parts = key.split(".")
        lead = len(parts) - len(self.segments)
        if lead < 0:
            return None
        tail = parts[lead:]
        if not all(
            is_index(part) if wanted == STAR else part == wanted
            for wanted, part in zip(self.segments, tail, strict=True)
        ):
            return None
        indices = (int(part) for wanted, part in zip(self.segments, tail, strict=True) if wanted == STAR)
        return Match("".join(f"{part}." for part in parts[:lead]), tuple(indices))

    def fill(self, prefix: str, indices: Sequence[int | str]) -> str:
        """The key with `prefix` in front and `indices` in the stars' places."""
        values = iter(indices)
        return prefix + ".".join(str(next(values)) if part == STAR else part for part in self.segments)


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

    def __init__(
        self,
        source_patterns: str | Sequence[str],
        target_patterns: str | Sequence[str],
        operations: Sequence[Operation] = (),
    ):
        object.__setattr__(self, "sources", _patterns(source_patterns))
        object.__setattr__(self, "targets", _patterns(target_patterns))
        object.__setattr__(self, "operations", tuple(operations))
        self._check()

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

    @property
    def merged(self) -> int:
        """1 if a list of sources is merged, -1 if a list of targets is made, 0 if neither."""
        return self.sources[0].stars - self.targets[0].stars

    @property
    def carried(self) -> int:
        """How many leading `*` are carried from source to target."""
        return min(self.sources[0].stars, self.targets[0].stars)

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
        fits: Iterator[Match] = (fit for pattern in patterns if (fit := pattern.match(key)))
        fit = next(fits, None)
        return fit and Match(fit.prefix, fit.indices[: self.carried])

    def __str__(self) -> str:
        names = " -> ".join(",".join(pattern.text for pattern in side) for side in (self.sources, self.targets))
        return f"WeightConverter({names})"


class WeightRenaming(WeightConverter):
    """One key for another, the tensor as it is: WeightRenaming("block_sparse_moe.gate.weight", "mlp.gate.weight")."""

    def __init__(self, source_pattern: str, target_pattern: str):
        super().__init__(source_pattern, target_pattern)


@dataclass(frozen=True, init=False)
class WeightSkip:
    """Keys that the model does not use, with the reason that the plan prints."""

    pattern: Pattern
    reason: str

    def __init__(self, pattern: str, reason: str):
        object.__setattr__(self, "pattern", Pattern(pattern))
        object.__setattr__(self, "reason", reason)


Rule = WeightConverter | WeightSkip


def _patterns(given: str | Sequence[str]) -> tuple[Pattern, ...]:
    return tuple(Pattern(text) for text in ([given] if isinstance(given, str) else given))
