"""What can be said of a model from its config and headers: parameters, bytes, and what a token costs. No torch."""

from dataclasses import dataclass

from moebius.checkpoint.planning import Plan
from moebius.config import DecoderConfig
from moebius.models.counting import count_parameters


@dataclass(frozen=True)
class ModelFacts:
    """Counts of parameters, a tied one once.

    experts: those of the routed experts.  rest: all others.  active: those in one token's way: the rest, and the chosen
    of the experts.  read: those that decoding a token reads: of an embedding that is not the head too, that is one row.
    cached: the numbers that a token leaves in the KV cache.
    """

    experts: int
    rest: int
    active: int
    read: int
    cached: int

    @property
    def total(self) -> int:
        return self.experts + self.rest


def model_facts(config: DecoderConfig) -> ModelFacts:
    counts = count_parameters(config)
    experts = counts.by_role.get("routed_experts", 0)
    unread = 0 if config.tie_word_embeddings else counts.by_role["embedding"] - config.hidden_size
    reads = counts.active - unread
    return ModelFacts(experts, counts.total - experts, counts.active, reads, config.cached_numbers)


def experts_layout(plan: Plan) -> str:
    """How the files hold routed experts: a tensor an expert, or packed as the model runs them."""
    merged = any(source.index is not None for way in plan.conversions for group in way.sources for source in group)
    return "per-expert layout" if merged else "packed layout"
