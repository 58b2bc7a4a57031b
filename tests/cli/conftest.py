import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moebius.auto import AutoModelForCausalLM
from moebius.cli.__main__ import run
from moebius.cli.demo.text import train_tokenizer

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 16,
    "max_position_embeddings": 256,
    "norm_topk_prob": True,
}
TEXT = (
    "".join(f"the {word} of the {word}s is a {word}; " for word in ("expert", "router", "token", "layer", "head")) * 9
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny qwen3_moe and a tokenizer without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    generator = torch.Generator().manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG, generator=generator).save_pretrained(folder)
    train_tokenizer(TEXT).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_model(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return str(folder)


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def moebius(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """moebius("inspect", folder) runs a command in this process; what it does to the library's log is undone."""
    logger = logging.getLogger("moebius")
    before = logger.level, logger.handlers

    def command(*arguments: object) -> Ended:
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Ended(code, str(captured.out), str(captured.err))

    yield command
    logger.level, logger.handlers = before
