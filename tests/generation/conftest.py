"""Tiny decoders with random weights, and their transformers oracles."""

import functools

import pytest
from transformers import GenerationConfig as OracleConfig

from moebius.layers.decoder import Decoder
from moebius.models import FAMILIES
from tests.families import make_oracle, tiny_config
from tests.tokenizer_builders import byte_level_bpe


@functools.cache
def decoder_and_oracle(family, **changes):
    oracle = make_oracle(family, seed=11, **changes)
    # What a checkpoint without generation_config.json gives; the fixture's ids would stop most rows early.
    oracle.generation_config = OracleConfig(pad_token_id=0)
    decoder = Decoder(FAMILIES[family].from_hf(tiny_config(family, **changes)), experts_implementation="eager")
    decoder.load_state_dict(oracle.state_dict())
    return decoder.eval(), oracle


@pytest.fixture(scope="session")
def make_pair():
    return decoder_and_oracle


@pytest.fixture
def decoder():
    return decoder_and_oracle("qwen3_moe")[0]


@pytest.fixture(scope="session")
def talker():
    """A decoder whose vocabulary is the byte-level tokenizer's, and that tokenizer."""
    from moebius.tokenizer import Tokenizer

    tokenizer = Tokenizer(byte_level_bpe(), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return *decoder_and_oracle("qwen3_moe", vocab_size=len(tokenizer)), tokenizer
