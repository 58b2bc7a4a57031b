"""Released models have their published sizes, counted twice: by arithmetic, and on a model without memory."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from moebius.layers.decoder import Decoder
from moebius.models import FAMILIES, family_of
from moebius.models.counting import count_parameters
from tests.families import TINY, tiny_config
from tests.models.hub_configs import RELEASED


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_has_its_published_size(name):
    raw, total, active = RELEASED[name]
    counts = count_parameters(family_of(raw).from_hf(raw))
    assert counts.total == pytest.approx(total * 1e9, abs=5e6)  # published to two decimals
    assert counts.active == pytest.approx(active * 1e9, abs=5e6)


@pytest.mark.parametrize("raw", [*(raw for raw, *_ in RELEASED.values()), *TINY.values()], ids=[*RELEASED, *TINY])
def test_the_arithmetic_agrees_with_the_model_role_by_role(raw):
    config = family_of(raw).from_hf(raw)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert roles_of(decoder) == count_parameters(config).by_role


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2_moe", {"mlp_only_layers": [0], "qkv_bias": False}),
        ("olmoe", {"attention_bias": True}),
        ("qwen3_moe", {"attention_bias": True}),
        ("gpt_oss", {"attention_bias": False}),
        ("deepseek_v2", {"q_lora_rank": None, "attention_bias": True}),
        ("deepseek_v3", {"attention_bias": True, "first_k_dense_replace": 0}),
        ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
    ],
)
def test_ties_biases_norms_and_dense_layers_are_counted(family, changes):
    raw = tiny_config(family, **changes)
    config = family_of(raw).from_hf(raw)
    assert roles_of(Decoder(config)) == count_parameters(config).by_role


def test_the_table_in_the_documents_shows_these_sizes():
    table = (Path(__file__).parents[2] / "docs" / "families.md").read_text().split("## Sizes")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    shown = {name: (float(total), float(active)) for name, total, active, _ in rows}
    assert shown == {name: (total, active) for name, (_, total, active) in RELEASED.items()}


def test_every_family_stands_in_the_documents():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert [name for name in FAMILIES if f"| `{name}`" not in page] == []


def roles_of(decoder: Decoder) -> dict[str, int]:
    counts: Counter[str] = Counter()
    roles = decoder.parameter_roles()
    for name, parameter in decoder.named_parameters():
        counts[roles[name]] += parameter.numel()
    return dict(counts)
