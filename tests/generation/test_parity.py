"""Greedy tokens are those of transformers, for every family and every option that shapes them."""

import re

import pytest
import torch

from moebius.generation import GenerationConfig, KeyValueCache, TextStreamer, generate
from moebius.tokenizer.token_bytes import TokenBytes
from tests.families import TINY
from tests.oracle_tensors import oracle_and_decoder

STEPS = 56  # 48 and more past the windows of the family that has them
EACH_CACHE = ("qwen2", "gpt_oss", "deepseek_v3")  # whole, in windows, of latents
NO_END = GenerationConfig(pad_token_id=0)


def ragged_prompts(rows=3, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row + 1] = 0
    return ids.masked_fill(mask == 0, 0), mask


def assert_same_tokens(pair, ids, mask, **options):
    decoder, oracle = pair
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    ours = generate(decoder, ids, mask, NO_END, **options)
    theirs = oracle.generate(ids, attention_mask=mask, **options)
    assert ours.tolist() == theirs.tolist()
    return ours


@pytest.mark.parametrize("family", TINY)
def test_a_single_prompt_continues_alike(make_pair, family):
    ids, _ = ragged_prompts(rows=1)
    ours = assert_same_tokens(make_pair(family), ids, torch.ones_like(ids))
    assert ours.shape == (1, 9 + STEPS)


@pytest.mark.parametrize("family", TINY)
def test_a_left_padded_batch_continues_alike(make_pair, family):
    assert_same_tokens(make_pair(family), *ragged_prompts())


@pytest.mark.parametrize("family", EACH_CACHE)
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"eos_token_id": [7, 19, 33, 64, 90, 101, 120]},
        {"eos_token_id": list(range(3, 40)), "pad_token_id": 5},
        {"eos_token_id": list(range(3, 128, 2)), "min_new_tokens": 9},
        {"eos_token_id": list(range(3, 128, 2)), "min_length": 15},
        {"max_length": 20, "max_new_tokens": None},
    ],
    ids=str,
)
def test_options_shape_the_tokens_alike(make_pair, family, options):
    assert_same_tokens(make_pair(family), *ragged_prompts(seed=1), **options)


@pytest.mark.parametrize("family", TINY)
def test_a_row_of_a_padded_batch_continues_as_it_does_alone(make_pair, family):
    decoder, _ = make_pair(family)
    ids, mask = ragged_prompts()
    batch = generate(decoder, ids, mask, NO_END, max_new_tokens=20)
    for row, padding in enumerate((mask == 0).sum(dim=1).tolist()):
        alone = generate(decoder, ids[row : row + 1, padding:], None, GenerationConfig(), max_new_tokens=20)
        assert batch[row, padding:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_cached_decoding_gives_the_logits_of_a_full_forward(family, chunk):
    """Over 64 tokens: eight windows of the family that has them."""
    _, decoder = oracle_and_decoder(family, {}, "eager", seed=2)  # of seeds, the one with the least float32 noise
    ids = torch.randint(3, 128, (2, 64), generator=torch.Generator().manual_seed(3))
    cache = KeyValueCache.for_decoder(decoder.config, batch=2, capacity=64, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        full = decoder(ids).logits
        steps = [decoder(part, cache=cache).logits for part in ids.split(chunk, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=5e-5)


def test_a_mask_is_inferred_from_padding_as_in_transformers(make_pair):
    ids, mask = ragged_prompts()
    decoder, oracle = make_pair("mixtral")
    ours = generate(decoder, ids, None, NO_END, max_new_tokens=12)
    assert ours.tolist() == oracle.generate(ids, max_new_tokens=12, do_sample=False).tolist()
    assert ours.tolist() == generate(decoder, ids, mask, NO_END, max_new_tokens=12).tolist()
    options = {"pad_token_id": 0, "eos_token_id": [0, 2], "max_new_tokens": 12}  # a pad that ends rows proves nothing
    ours = generate(decoder, ids, **options)
    assert ours.tolist() == oracle.generate(ids, do_sample=False, **options).tolist()


def test_a_users_processors_and_criteria_run_as_in_transformers(make_pair):
    def only_even(input_ids, scores):
        return scores.index_fill(1, torch.arange(1, 128, 2), float("-inf"))

    def ends_with_small(input_ids, scores, **kwargs):
        return input_ids[:, -1] < 20

    assert_same_tokens(
        make_pair("olmoe"),
        *ragged_prompts(),
        logits_processor=[only_even],
        stopping_criteria=[ends_with_small],
        eos_token_id=127,
        repetition_penalty=1.2,
    )


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_end_a_row_where_transformers_does(talker, seed, tmp_path):
    from transformers import AutoTokenizer

    decoder, oracle, tokenizer = talker
    tokenizer.save_pretrained(tmp_path)
    theirs_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.randint(3, len(tokenizer), (1, 5), generator=torch.Generator().manual_seed(seed))
    free = generate(decoder, ids, None, NO_END, max_new_tokens=40)
    spoken = b"".join(_bytes_of(tokenizer, index) for index in free[0, 5:].tolist())
    runs = [run.decode() for run in re.findall(rb"[ -~]{2,}", spoken[:-8])]
    assert len(runs) > 3
    for stop in [*runs[:4], *(run[1:] for run in runs[:4])]:
        options = {"stop_strings": ["never", stop], "max_new_tokens": 40, "do_sample": False}
        ours = generate(decoder, ids, None, NO_END, tokenizer=tokenizer, **options)
        theirs = oracle.generate(ids, tokenizer=theirs_tokenizer, **options)
        assert ours.tolist() == theirs.tolist()
        assert generate(decoder, ids, None, NO_END, tokenizer=theirs_tokenizer, **options).tolist() == ours.tolist()
        assert ours.shape[1] < free.shape[1]


def test_transformers_own_streamer_prints_what_ours_does(talker, capsys):
    from transformers import TextStreamer as TheirStreamer

    decoder, _, tokenizer = talker
    ids = tokenizer("The router chose expert", return_tensors="pt").input_ids
    printed = []
    for streamer in (TheirStreamer(tokenizer, skip_prompt=True), TextStreamer(tokenizer, skip_prompt=True)):
        tokens = generate(decoder, ids, None, NO_END, streamer=streamer, max_new_tokens=30)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == tokenizer.decode(tokens[0, ids.shape[1] :]) + "\n"


def _bytes_of(tokenizer, token_id):
    return TokenBytes(tokenizer.backend_tokenizer)(token_id)
