"""Which rules' sources the keys of the files are, and where.  No torch."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from moebius.checkpoint.converter import Match, WeightConverter, fits_template, template_of

Place = tuple[WeightConverter, Match]  # a rule, and where in the model it is applied


def route(keys: Iterable[str], rules: Sequence[WeightConverter]) -> dict[Place, list[str]]:
    """Where the rules' sources lie.  Each template is looked up once, however many keys share it."""
    by_template: dict[str, list[WeightConverter]] = {}
    found: dict[Place, list[str]] = defaultdict(list)
    for key in keys:
        template = template_of(key)
        if template not in by_template:
            by_template[template] = [rule for rule in rules if fits_template(rule.sources, template)]
        for rule in by_template[template]:
            if match := rule.match_source(key):
                found[rule, match].append(key)
    return dict(found)
