"""Which rules' sources the keys of the files are, and where.  No torch."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moebius.checkpoint.converter import STAR, Match, WeightConverter, fits_template, is_index, template_of

Place = tuple[WeightConverter, Match]  # a rule, and where in the model it is applied


@dataclass
class Routes:
    """places: where the rules' sources lie.  templates: the keys of each template."""

    places: dict[Place, list[str]] = field(default_factory=lambda: defaultdict(list))
    templates: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def route(keys: Iterable[str], rules: Sequence[WeightConverter]) -> Routes:
    """Each template is looked up once, and the items of a list at once, however many keys share them."""
    routes, alike = Routes(), dict[str, list[str]]()
    for key in keys:
        alike.setdefault(_without_last_index(key), []).append(key)
    by_template: dict[str, list[WeightConverter]] = {}
    for head, group in alike.items():
        template = template_of(head)
        if template not in by_template:
            by_template[template] = [rule for rule in rules if fits_template(rule.sources, template)]
        routes.templates[template] += group
        for rule in by_template[template]:
            _place(rule, group, routes)
    return routes


def _place(rule: WeightConverter, group: Sequence[str], routes: Routes) -> None:
    """group: keys that differ in their last index alone."""
    if rule.lists_alone:
        if match := rule.match_source(group[0]):
            routes.places[rule, match] += group
        return
    for key in group:
        if match := rule.match_source(key):
            routes.places[rule, match].append(key)


def _without_last_index(key: str) -> str:
    parts = key.split(".")
    for at in range(len(parts) - 1, -1, -1):
        if is_index(parts[at]):
            parts[at] = STAR
            return ".".join(parts)
    return key
