"""From a decoder to tokens: generate, streams of text, conversations. The names load on first use, torch with them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebius.generation.cache import KeyValueCache
    from moebius.generation.chat import Chat
    from moebius.generation.config import GenerationConfig
    from moebius.generation.engine import generate
    from moebius.generation.stream import TextIteratorStreamer, TextStreamer

__all__ = ["Chat", "GenerationConfig", "KeyValueCache", "TextIteratorStreamer", "TextStreamer", "generate"]

HOMES = {
    "Chat": "chat",
    "GenerationConfig": "config",
    "KeyValueCache": "cache",
    "TextIteratorStreamer": "stream",
    "TextStreamer": "stream",
    "generate": "engine",
}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
