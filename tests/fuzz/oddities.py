"""Values that have no business where they are put, and small damages of any JSON document or file."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.fuzz.documents import Literal, Pairs, nodes

Names = frozenset[str] | set[str]
ANY_NAME: Names = frozenset()  # after a changed config, anything may be said to be wrong

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 4, 5, 7, 8, 16, 63, 100, 1000, 9_999, 10_000, 10_001, 65_536, 2**20, 10**9),
    *(
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
        10**12,
        10**18,
        10**400,
        -(2**63),
        -(10**400),
    ),
    *(0.5, -0.0, 1e-320, 1e308, 1.0, 2.5, -1.5),
    *(Literal("1e999"), Literal("-1e999"), Literal("NaN"), Literal("Infinity"), Literal("-Infinity")),
    *(Literal("9" * 5000), Literal("01"), Literal("1."), Literal("+1"), Literal("0x10"), Literal("1_000")),
)
TEXTS: tuple[Any, ...] = (
    *("", "x", " ", "0", "-1", "null", "true", "\x00", "a\nb", "\x1b[31mred", "\ud800", "é", "\u202eabc", "\u2028"),
    *(
        "\U0001d7d9",
        "٣",
        "../x",
        "/etc/passwd",
        "..",
        ".",
        "~",
        "a/b",
        "a\\b",
        "A" * 300,
        "A" * 100_000,
        "%s%n",
        "{0}",
        "$HOME",
    ),
    *("float32", "bfloat16", "int8", "F32", "BF16", "F8_E4M3", "I64", "BOOL", "F4", "fp8", "mxfp4", "auto", "cuda"),
    Literal('"\\ud83d"'),
    Literal('"\\x"'),
    Literal("'x'"),
)
OTHERS: tuple[Any, ...] = (
    *(True, False, None, [], [[]], [None], [0], [1, 2], [-1], ["x"], [2**63, 2**63], [0] * 1000, [1] * 70),
    Pairs(),
    Pairs([["x", 1]]),
    Pairs([["", Pairs()]]),
    *(
        Literal(""),
        Literal("[" * 5000 + "]" * 5000),
        Literal('{"a":' * 5000 + "1" + "}" * 5000),
        Literal("[" * 100_000),
    ),
    *(Literal("1,"), Literal("/* */1"), Literal("1 2"), Literal("}"), Literal("]"), Literal("nul")),
)


def odd_value(rng: random.Random) -> Any:
    return rng.choice(rng.choice((NUMBERS, NUMBERS, TEXTS, OTHERS)))


def near(rng: random.Random, value: Any) -> Any:
    """Something like the value, but not it."""
    match value:
        case bool():
            return rng.choice((not value, int(value), str(value).lower(), None))
        case int() | float():
            return rng.choice((value + 1, value - 1, value * 2, -value, value / 2, float(value), str(value), [value]))
        case str():
            around = (value + " ", value.upper(), value[:-1], value + value, f"{value}\n", f"\ufeff{value}", [value])
            return rng.choice(around)
        case Pairs():
            return rng.choice((list(value), [value], value[: len(value) // 2], str(len(value))))
        case list():
            return rng.choice((value[:-1], [*value, *value], [*value, 1], [value], value[::-1], Pairs(), len(value)))
        case _:
            return rng.choice((0, "", False, [], "null"))


def damage_document(rng: random.Random, document: Any) -> list[str]:
    """Changes one place of a parsed document; gives the keys that lead there."""
    places = list(nodes(document))
    if not places:
        raise ValueError("nothing in it")
    container, position, way = rng.choice(places)
    rng.choice(_EDITS)(rng, container, position)
    return way


def _get(container: Any, position: int) -> Any:
    return container[position][1] if isinstance(container, Pairs) else container[position]


def _set(container: Any, position: int, value: Any) -> None:
    if isinstance(container, Pairs):
        container[position][1] = value
    else:
        container[position] = value


def _replace(rng: random.Random, container: Any, position: int) -> None:
    _set(container, position, odd_value(rng))


def _disturb(rng: random.Random, container: Any, position: int) -> None:
    _set(container, position, near(rng, _get(container, position)))


def _delete(rng: random.Random, container: Any, position: int) -> None:
    del container[position]


def _double(rng: random.Random, container: Any, position: int) -> None:
    value = _get(container, position)
    value = value if rng.random() < 0.3 else near(rng, value)
    again = [container[position][0], value] if isinstance(container, Pairs) else value
    container.insert(rng.randint(0, len(container)), again)


def _rename(rng: random.Random, container: Any, position: int) -> None:
    if isinstance(container, Pairs):
        key = container[position][0]
        new = rng.choice((near(rng, key), rng.choice(TEXTS), rng.choice(container)[0]))
        container[position][0] = new if isinstance(new, str) else f"{key}_"
    else:
        _replace(rng, container, position)


def _insert(rng: random.Random, container: Any, position: int) -> None:
    value = odd_value(rng)
    key = rng.choice([text for text in TEXTS if isinstance(text, str)])
    container.insert(position, [key, value] if isinstance(container, Pairs) else value)


def _swap(rng: random.Random, container: Any, position: int) -> None:
    other = rng.randrange(len(container))
    mine, theirs = _get(container, position), _get(container, other)
    _set(container, position, theirs)
    _set(container, other, mine)


_EDITS: Sequence[Callable[[random.Random, Any, int], None]] = (
    *(_replace, _replace, _replace, _disturb, _disturb, _disturb, _delete, _delete),
    *(_double, _rename, _rename, _insert, _swap),
)


# --- bytes -----------------------------------------------------------------------------------------------------------


def damage_bytes(rng: random.Random, raw: bytes, within: int) -> bytes:
    """One small damage among the first `within` bytes."""
    at, length = rng.randrange(max(1, min(within, len(raw)))), rng.randint(1, 16)
    head, piece, tail = raw[:at], raw[at : at + length], raw[at + length :]
    match rng.randrange(7):
        case 0:
            flipped = bytes([raw[at] ^ 1 << rng.randrange(8)]) if raw else b"\x00"
            return head + flipped + raw[at + 1 :]
        case 1:
            return head + tail
        case 2:
            return head + piece + piece + tail
        case 3:
            return head + rng.randbytes(length) + tail
        case 4:
            return head
        case 5:
            return head + bytes(length) + tail
        case _:
            return raw + rng.choice((b"\x00", b" ", b"\n", rng.randbytes(length), raw[: 8 * length]))
