"""Tiny decoders with random weights, and their transformers oracles."""

import functools

import pytest
from transformers import GenerationConfig as OracleConfig

from tests.oracle_tensors import oracle_and_decoder
from tests.tokenizer_builders import byte_level_bpe


@functools.cache
def decoder_and_oracle(family, **changes):
    oracle, decoder = oracle_and_decoder(family, changes, "eager", seed=11)
    # What a checkpoint without generation_config.json gives; the fixture's ids would stop most rows early.
    oracle.generation_config = OracleConfig(pad_token_id=0)
    return decoder, oracle


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
