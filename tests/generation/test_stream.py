"""Streamed text: the pieces joined are the decoding of all the tokens, whatever the language or the tokenizer."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.generation.stream import StopGate, TextDecoder, TextIteratorStreamer, TextStreamer
from moebius.tokenizer import Tokenizer
from tests.tokenizer_builders import BUILDERS, TEXTS

TOKENIZERS = {kind: Tokenizer(build()) for kind, build in BUILDERS.items()}


def pieces_of(tokenizer, ids, **options):
    decoder = TextDecoder(tokenizer, options)
    return [decoder.push(index) for index in ids] + [decoder.finish()]


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_join_to_the_whole_text(kind, skip):
    tokenizer = TOKENIZERS[kind]
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=skip)) == whole


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=30))
def test_pieces_of_any_byte_level_tokens_join_to_the_whole_text(ids):
    tokenizer = TOKENIZERS["byte_level_bpe"]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.text(max_size=4) | st.sampled_from(["</s>", " ", "router"]), max_size=8))
def test_pieces_with_byte_fallback_join_to_the_whole_text(parts):
    tokenizer = TOKENIZERS["metaspace_bpe"]
    ids = [index for part in parts for index in tokenizer(part, add_special_tokens=False).input_ids]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 419), max_size=30))
def test_fallback_bytes_that_are_no_text_are_neither_lost_nor_doubled(ids):
    tokenizer = TOKENIZERS["metaspace_bpe"]
    assert len("".join(pieces_of(tokenizer, ids))) >= len(tokenizer.decode(ids))


def test_no_piece_holds_half_a_character():
    tokenizer = TOKENIZERS["byte_level_bpe"]
    ids = tokenizer("専門家 🙂👩‍👩‍👧 é").input_ids
    pieces = pieces_of(tokenizer, ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces.count("") > 3  # bytes that wait for the rest of their character


def test_text_comes_as_soon_as_it_is_whole():
    tokenizer = TOKENIZERS["byte_level_bpe"]
    ids = tokenizer("The router chose").input_ids
    assert all(pieces_of(tokenizer, ids)[:-1])


def stream(streamer, prompt_ids, ids):
    streamer.put(torch.tensor([prompt_ids]))
    for index in ids:
        streamer.put(torch.tensor([index]))
    streamer.end()


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_the_text_streamer_prints_as_it_goes(capsys, skip_prompt):
    tokenizer = TOKENIZERS["byte_level_bpe"]
    prompt, answer = tokenizer("Two roads").input_ids, tokenizer(" diverged 🙂").input_ids
    streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt)
    for _ in range(2):  # a streamer can be used again
        stream(streamer, prompt, answer)
        assert capsys.readouterr().out == ("" if skip_prompt else "Two roads") + " diverged 🙂\n"


def test_special_tokens_can_be_left_out(capsys):
    tokenizer = TOKENIZERS["byte_level_bpe"]
    stream(TextStreamer(tokenizer, skip_special_tokens=True), [1], tokenizer("Hi<|im_end|>").input_ids)
    assert capsys.readouterr().out == "Hi\n"


def test_the_iterator_gives_the_same_text():
    tokenizer = TOKENIZERS["metaspace_bpe"]
    ids = tokenizer("専門家 🙂 chose the expert").input_ids
    streamer = TextIteratorStreamer(tokenizer, timeout=1)
    stream(streamer, ids[:1], ids[1:])
    assert "".join(streamer) == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", [["expert"], ["rt t"], ["chose", "expert"], [" "], ["never"], ["專"]])
def test_a_stop_string_never_leaks_even_in_part(stop):
    tokenizer = TOKENIZERS["byte_level_bpe"]
    text = "The router chose the expert that was chosen 専門家"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=1, stop_strings=stop)
    stream(streamer, [5], tokenizer(text).input_ids)
    cut = min((text.find(s) for s in stop if s in text), default=len(text))
    pieces = list(streamer)
    assert "".join(pieces) == text[:cut]
    given = ""
    for piece in pieces[:-1]:
        given += piece
        assert text[:cut].startswith(given)


@settings(deadline=None)
@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_gate_lets_through_all_that_comes_before_the_first_stop(text, stops):
    gate, out = StopGate(stops), io.StringIO()
    for char in text:
        out.write(gate.push(char))
        held = len(text) - len(out.getvalue())
        assert held >= 0
    out.write(gate.finish())
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    first_end = min(ends, default=None)
    starts = [text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == first_end]
    assert out.getvalue() == (text if first_end is None else text[: min(starts)])
