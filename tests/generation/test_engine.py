"""The engine refuses bad input by name, keeps its promises about seeds, and leaves no broken state."""

import logging
import threading

import pytest
import torch

from moebius.errors import ArgumentError, CapacityError, InputError, MoebiusError
from moebius.generation import GenerationConfig, KeyValueCache, TextIteratorStreamer, TextStreamer, generate
from moebius.generation import prompt as prompt_module

PROMPT = torch.tensor([[5, 6, 7, 8]])
SAMPLED = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0)


class Recorder:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_the_same_seed_gives_the_same_tokens(decoder):
    first, second = (generate(decoder, PROMPT, None, SAMPLED, seed=3, max_new_tokens=30) for _ in range(2))
    assert first.tolist() == second.tolist()
    assert first.tolist() != generate(decoder, PROMPT, None, SAMPLED, seed=4, max_new_tokens=30).tolist()


def test_a_seeded_row_is_the_same_in_any_batch(decoder):
    rows = [[5, 6, 7, 8], [9, 10, 11, 12], [0, 0, 13, 14]]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    batch = generate(decoder, torch.tensor(rows), mask, SAMPLED, seed=3, max_new_tokens=25)
    for order in ([2, 0, 1], [1], [0, 0]):
        again = generate(decoder, torch.tensor(rows)[order], mask[order], SAMPLED, seed=3, max_new_tokens=25)
        assert again.tolist() == batch[order].tolist()
    alone = generate(decoder, torch.tensor([[13, 14]]), None, SAMPLED, seed=3, max_new_tokens=25)
    assert alone[0].tolist() == batch[2, 2:].tolist()


def test_a_seeded_row_goes_on_as_it_would_have(decoder):
    whole = generate(decoder, PROMPT, None, SAMPLED, seed=3, max_new_tokens=20)
    again = generate(decoder, whole[:, :10], None, SAMPLED, seed=3, max_new_tokens=14)
    assert again.tolist() == whole.tolist()


def test_without_a_seed_torchs_own_governs(decoder):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generate(decoder, PROMPT, None, SAMPLED, max_new_tokens=30).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_sequences_of_one_prompt_differ(decoder):
    rows = generate(decoder, PROMPT, None, SAMPLED, seed=3, num_return_sequences=3, max_new_tokens=20)
    assert len({tuple(row) for row in rows.tolist()}) == 3
    assert rows[0].tolist() == generate(decoder, PROMPT, None, SAMPLED, seed=3, max_new_tokens=20)[0].tolist()


def test_sampling_with_one_token_kept_is_greedy(decoder):
    greedy = generate(decoder, PROMPT, None, GenerationConfig(), max_new_tokens=20)
    assert generate(decoder, PROMPT, None, SAMPLED, top_k=1, max_new_tokens=20).tolist() == greedy.tolist()


@pytest.mark.parametrize(
    ("ids", "mask", "named"),
    [
        (None, None, "NoneType"),
        ([[1, 2]], None, "list"),
        (torch.tensor([1, 2]), None, r"\[2\]"),
        (torch.tensor([[1.0]]), None, "float32"),
        (torch.zeros(1, 0, dtype=torch.long), None, "empty"),
        (torch.zeros(0, 3, dtype=torch.long), None, "empty"),
        (torch.tensor([[5, 128]]), None, r"input_ids\[0, 1\] is 128.*0 to 127"),
        (torch.tensor([[5, -1]]), None, r"input_ids\[0, 1\] is -1"),
        (torch.tensor([[5, 6]]), torch.ones(1, 3), r"\[1, 3\]"),
        (torch.tensor([[5, 6]]), torch.tensor([[2, 1]]), "1 for real"),
        (torch.tensor([[5, 6], [5, 0]]), torch.tensor([[1, 1], [1, 0]]), "row 1 is padded on the right.*padding_side"),
        (torch.tensor([[5, 6, 7]]), torch.tensor([[1, 0, 1]]), "row 0 has padding between"),
        (torch.tensor([[5, 6], [5, 0]]), torch.tensor([[1, 1], [0, 0]]), "row 1 is padding alone"),
        (torch.tensor([[5, 6], [5, 0]]), None, "row 1 is padded on the right"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(decoder, ids, mask, named):
    with pytest.raises(InputError, match=f"(?s){named}"):
        generate(decoder, ids, mask, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_length": 4}, "max_length=4"),
        ({"num_beams": 4}, "num_beams"),
        ({"assistant_model": torch.nn.Linear(1, 1)}, "assistant_model"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"max_tokens": 4}, "max_new_tokens"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=False"),
        ({"stop_strings": ["x"]}, "tokenizer=tokenizer"),
    ],
)
def test_options_are_honoured_or_refused_by_name(decoder, options, named):
    with pytest.raises(ArgumentError, match=named):
        generate(decoder, PROMPT, **options)


def test_more_tokens_than_positions_are_refused_naming_the_most_that_fit(decoder):
    with pytest.raises(InputError, match="max_new_tokens=252 at most"):
        generate(decoder, PROMPT, max_new_tokens=253)
    with pytest.raises(InputError, match="shorten the prompt"):
        generate(decoder, PROMPT.repeat(1, 64), max_new_tokens=1)
    with pytest.raises(InputError, match="shorten the prompt"):
        generate(decoder, PROMPT.repeat(1, 70))
    assert generate(decoder, PROMPT, eos_token_id=None, max_new_tokens=252).shape == (1, 256)


def test_the_default_length_is_twenty_tokens_and_said_once(decoder, caplog):
    prompt_module._say_default.cache_clear()
    with caplog.at_level(logging.WARNING):
        shapes = [generate(decoder, PROMPT, eos_token_id=None).shape for _ in range(2)]
    assert shapes == [(1, 24), (1, 24)]
    assert caplog.text.count("20 new tokens") == 1


def test_rows_that_may_end_apart_need_a_token_to_fill_them(decoder):
    for config in (GenerationConfig(), GenerationConfig(pad_token_id=128)):
        with pytest.raises(ArgumentError, match="set pad_token_id"):
            generate(decoder, PROMPT.repeat(2, 1), None, config, stopping_criteria=[lambda *_: True])


def test_the_first_end_id_fills_rows_when_there_is_no_pad_id(decoder):
    config = GenerationConfig(eos_token_id=tuple(range(40, 128)))
    rows = generate(decoder, torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]]), None, config, max_new_tokens=30)
    ended = [next(i for i, token in enumerate(row[2:]) if token >= 40) for row in rows.tolist()]
    assert len(set(ended)) > 1
    for row, end in zip(rows.tolist(), ended, strict=True):
        assert set(row[3 + end :]) <= {40}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_step(decoder, value):
    def spoil(tokens, scores):
        return scores.index_fill(1, torch.tensor([9]), value) if tokens.shape[1] == 7 else scores

    with pytest.raises(MoebiusError, match="step 3: the logits of row 0"):
        generate(decoder, PROMPT, eos_token_id=None, max_new_tokens=9, logits_processor=[spoil])


def test_ruling_out_every_token_is_an_error(decoder):
    with pytest.raises(MoebiusError, match="step 0"):
        generate(decoder, PROMPT, max_new_tokens=2, logits_processor=[lambda _, scores: scores - float("inf")])


def test_equal_logits_give_the_lowest_id(decoder):
    tied = [lambda _, scores: torch.zeros_like(scores).index_fill(1, torch.tensor([30, 9, 77]), 1.0)]
    assert generate(decoder, PROMPT, max_new_tokens=3, logits_processor=tied)[0, 4:].tolist() == [9, 9, 9]


def test_a_streamer_gets_the_prompt_then_each_token_then_the_end(decoder):
    recorder = Recorder()
    tokens = generate(decoder, PROMPT.repeat(2, 1), streamer=recorder, max_new_tokens=5, eos_token_id=None)
    assert recorder.values == [PROMPT.repeat(2, 1).tolist(), *tokens[:, 4:].T.tolist()]
    assert recorder.ended == 1


def test_an_interrupt_leaves_nothing_broken(decoder):
    def interrupt(tokens, scores):
        if tokens.shape[1] == 7:
            raise KeyboardInterrupt
        return scores

    recorder, before = Recorder(), generate(decoder, PROMPT, max_new_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        generate(decoder, PROMPT, streamer=recorder, max_new_tokens=8, logits_processor=[interrupt])
    assert recorder.ended == 1
    assert generate(decoder, PROMPT, max_new_tokens=8).tolist() == before.tolist()


def test_an_iterator_streamer_ends_even_if_generation_fails(talker):
    decoder, _, tokenizer = talker

    def fail(tokens, scores):
        raise RuntimeError("planted")

    streamer = TextIteratorStreamer(tokenizer, timeout=10)
    caught = []

    def run():
        try:
            generate(decoder, PROMPT, streamer=streamer, max_new_tokens=4, logits_processor=[fail])
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(PROMPT[0])
    assert len(caught) == 1


def test_a_text_streamer_follows_one_row(talker):
    decoder, _, tokenizer = talker
    with pytest.raises(ArgumentError, match="one row"):
        generate(decoder, PROMPT.repeat(2, 1), streamer=TextStreamer(tokenizer), max_new_tokens=2)


def new_cache(decoder, capacity):
    return KeyValueCache.for_decoder(decoder.config, batch=1, capacity=capacity, dtype=torch.float32, device="cpu")


def test_a_cache_with_the_prompts_beginning_is_gone_on_from(decoder):
    prompt = torch.arange(3, 15)[None]
    expected = generate(decoder, prompt, max_new_tokens=10)
    cache = new_cache(decoder, 30)
    generate(decoder, prompt, max_new_tokens=4, cache=cache)
    cache.crop(7)
    assert generate(decoder, prompt, max_new_tokens=10, cache=cache).tolist() == expected.tolist()


def test_a_cache_that_does_not_fit_is_refused(decoder):
    with pytest.raises(CapacityError, match=r"holds 8 .* need 9"):
        generate(decoder, PROMPT, max_new_tokens=6, cache=new_cache(decoder, 8))
    cache = new_cache(decoder, 20)
    generate(decoder, PROMPT, max_new_tokens=2, cache=cache)
    with pytest.raises(ArgumentError, match="none to start from"):
        generate(decoder, PROMPT, max_new_tokens=2, cache=cache)


def test_positions_count_real_tokens_and_the_mask_grows(decoder):
    forwards = []
    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: forwards.append(kwargs), with_kwargs=True)
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    generate(decoder, torch.tensor([[5, 6, 7], [0, 0, 9]]), mask, max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    hook.remove()
    positions = [kwargs["position_ids"].tolist() for kwargs in forwards]
    assert positions == [[[0, 1, 2], [0, 0, 0]], [[3], [1]], [[4], [2]]]
    assert [kwargs["attention_mask"].shape[1] for kwargs in forwards] == [3, 4, 5]


def test_a_long_prompt_is_read_in_chunks(decoder, monkeypatch):
    prompt = torch.randint(3, 128, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[1, :23] = 0
    whole = generate(decoder, prompt, mask, max_new_tokens=12, eos_token_id=None)
    monkeypatch.setattr("moebius.generation.engine.PREFILL_CHUNK", 7)
    assert generate(decoder, prompt, mask, max_new_tokens=12, eos_token_id=None).tolist() == whole.tolist()


def test_other_spellings_of_the_prompt(decoder):
    expected = generate(decoder, PROMPT, max_new_tokens=3).tolist()
    assert generate(decoder, inputs=PROMPT, max_new_tokens=3).tolist() == expected
    assert generate(decoder, PROMPT.int(), torch.ones_like(PROMPT).bool(), max_new_tokens=3).tolist() == expected


def test_generated_ids_can_be_trained_on(decoder):
    tokens = generate(decoder, PROMPT, max_new_tokens=6)
    decoder(tokens, labels=tokens).loss.backward()
    decoder.zero_grad()
