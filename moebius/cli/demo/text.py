"""The demo's text and tokenizer: found in every Python, so that nothing is fetched."""

import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebius.tokenizer import Tokenizer

VOCABULARY = 512
END_OF_TEXT = "<|endoftext|>"
BLOCK = 12  # paragraphs
HELD_OUT_EVERY = 8  # blocks
SOURCE_BYTES = 500_000


@dataclass(frozen=True)
class DemoText:
    """title: where the text is from.  held_out: an eighth of it, which shares no paragraph with `training`."""

    title: str
    training: str
    held_out: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256((self.training + "\0" + self.held_out).encode()).hexdigest()

    @property
    def zlib_bits_per_byte(self) -> float:
        """What `zlib -9` makes of all the text, without training; of less text it would make more bits."""
        data = (self.training + self.held_out).encode()
        return 8 * len(zlib.compress(data, 9)) / len(data)


def demo_text() -> DemoText:
    """Python's language reference, which pydoc carries; where it was left out, the standard library's own sources."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        return split_text("Python's standard library", list(library_sources(SOURCE_BYTES)))
    return split_text("Python's language reference", [topics[title] for title in sorted(topics)])


def split_text(title: str, documents: list[str]) -> DemoText:
    """Holds out every eighth block of paragraphs.

    A paragraph that came before is dropped: the reference repeats a fifth of itself, and a held-out paragraph that was
    trained on would flatter the model.
    """
    paragraphs = list(dict.fromkeys(chain.from_iterable(document.split("\n\n") for document in documents)))
    blocks = [paragraphs[start : start + BLOCK] for start in range(0, len(paragraphs), BLOCK)]
    held_out = chain.from_iterable(blocks[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    training = chain.from_iterable(block for number, block in enumerate(blocks, 1) if number % HELD_OUT_EVERY)
    return DemoText(title, "\n\n".join(training), "\n\n".join(held_out))


def library_sources(nbytes: int) -> Iterator[str]:
    """Modules of the standard library, in the order of their names, until there are so many bytes."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")[:nbytes]
        nbytes -= len(source)
        yield source
        if nbytes <= 0:
            return


def train_tokenizer(text: str) -> "Tokenizer":
    """A byte-level BPE of 512 tokens: 256 bytes, the end-of-text token, and the merges that `text` asks for."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from moebius.tokenizer import Tokenizer

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    return Tokenizer(backend, eos_token=END_OF_TEXT)
