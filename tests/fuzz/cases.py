"""One case: a base, damages, and how the result is opened; all of it follows from a seed and a number."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tests.fuzz.bases import Base, base_named, bases
from tests.fuzz.documents import INDEX, Files
from tests.fuzz.mutations import DAMAGES, HARMLESS, MUTATIONS, OF_SEVERAL_SHARDS

HARMLESS_SHARE = 0.08  # of cases: nothing but harmless changes
STEPS = (1, 1, 1, 2, 3)  # how many mutations
WANTED = (None, None, None, "float32", "bfloat16")
WAYS = ("sync",) * 19 + ("async",)  # threads are slow to start


class Step(NamedTuple):
    """A mutation by its name, and the seed of its choices."""

    mutation: str
    seed: int


@dataclass(frozen=True)
class Case:
    """wanted: the dtype asked for, None for the checkpoint's.  loading, mapping: as LoadOptions has them."""

    base_name: str
    steps: tuple[Step, ...]
    wanted: str | None
    loading: str
    mapping: str

    @property
    def base(self) -> Base:
        return base_named(self.base_name)

    def without(self, step: Step) -> "Case":
        return replace(self, steps=tuple(other for other in self.steps if other is not step))


@dataclass(frozen=True)
class Damaged:
    """A case's files.  touched: the names of which an error has to say one; none: any.  done: the steps that applied.

    harmless: what the files mean is what the base means.
    """

    files: Files
    touched: frozenset[str]
    done: tuple[Step, ...]
    harmless: bool


def case_of(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed}:{number}")
    base = rng.choice(bases())
    names = rng.choices(_fitting(HARMLESS if rng.random() < HARMLESS_SHARE else DAMAGES, base), k=rng.choice(STEPS))
    if rng.random() < 0.1:
        names.insert(0, rng.choice(_fitting(HARMLESS, base)))
    steps = tuple(Step(name, rng.randrange(2**32)) for name in names)
    return Case(base.name, steps, rng.choice(WANTED), rng.choice(WAYS), rng.choice(("auto", "never")))


def _fitting(mutations: Iterable[str], base: Base) -> list[str]:
    """Those that find something to change in the base."""
    return [name for name in mutations if INDEX in base.files or name not in OF_SEVERAL_SHARDS]


def damaged(case: Case) -> Damaged:
    """The base's files with every step that applies done to them."""
    files, touched, done = dict(case.base.files), list[frozenset[str]](), list[Step]()
    for step in case.steps:
        before = dict(files)
        try:
            names = MUTATIONS[step.mutation](random.Random(step.seed), files)
        except Exception:  # noqa: BLE001  # it is made for files that nothing was done to yet
            files = before
            continue
        done.append(step)
        touched += [] if step.mutation in HARMLESS else [frozenset(names)]
    only = touched[0] if len(touched) == 1 else frozenset[str]()  # of two damages, one may hide the other
    return Damaged(files, only, tuple(done), not touched)


def smaller(case: Case) -> Sequence[Case]:
    """The case with one step less."""
    return [case.without(step) for step in case.steps] if len(case.steps) > 1 else []
