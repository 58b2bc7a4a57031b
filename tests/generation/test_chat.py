"""A conversation reads each token once, and says what a fresh reading of the whole would say."""

import json

import pytest

from moebius.errors import ArgumentError, InputError, SaveError, TokenizerError
from moebius.generation import Chat, TextIteratorStreamer, generate
from moebius.generation.chat import common_prefix
from moebius.tokenizer import Tokenizer
from tests.tokenizer_builders import byte_level_bpe

TEMPLATE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role[0] + ' ' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>a ' }}{% endif %}"""
FORGETFUL = TEMPLATE.replace("{%- for m in messages %}", "{%- for m in messages[-3:] %}")
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def chat(talker):
    decoder, _, tokenizer = talker
    tokenizer.chat_template = TEMPLATE
    return Chat(decoder, tokenizer, generation_config=None, **OPTIONS)


def fresh_reply(chat, messages):
    prompt = chat._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = generate(chat._decoder, **prompt, generation_config=chat._config)
    new = [index for index in output[0, prompt.input_ids.shape[1] :].tolist() if index != 2]
    return chat._tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["whole", "forgetful"])
def test_every_reply_is_that_of_a_fresh_reading(chat, template):
    chat._tokenizer.chat_template = template
    for text in ["Hi", "and?", "so 専", "Hi", "bye"]:
        expected = fresh_reply(chat, [*chat.messages, {"role": "user", "content": text}])
        assert chat.send(text) == expected
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 5


def test_what_was_read_is_not_read_again(chat):
    chat.send("A first question, longer than the second")
    assert chat.reused_tokens == 0
    first = len(chat._tokenizer("<|im_start|>u A first question, longer than the second<|im_end|>").input_ids)
    chat.send("second")
    assert chat.reused_tokens >= first


def test_a_reset_starts_anew_with_a_system_prompt(chat):
    chat.send("Hi")
    chat.reset("Be brief.")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    expected = fresh_reply(chat, [*chat.messages, {"role": "user", "content": "Hi"}])
    assert chat.send("Hi") == expected


def test_a_reply_is_streamed(chat):
    streamer = TextIteratorStreamer(chat._tokenizer, skip_prompt=True, timeout=1, skip_special_tokens=True)
    reply = chat.send("Hi", streamer=streamer)
    assert "".join(streamer) == reply


def test_a_reply_ends_before_its_stop_string(chat):
    reply = chat.send("Hi")
    stop = next(char for char in reply[1:] if char.isascii())
    chat.reset()
    cut = chat.send("Hi", stop_strings=[stop])
    assert cut == reply[: reply.index(stop)]
    assert chat.messages[-1]["content"] == cut


def test_an_interrupt_leaves_the_conversation_as_it_was(chat):
    class Interrupting:
        def __init__(self, after):
            self.after = after

        def put(self, value):
            self.after -= 1
            if self.after < 0:
                raise KeyboardInterrupt

        def end(self):
            pass

    chat.send("Hi")
    before = list(chat.messages)
    for after in (0, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            chat.send("what now", streamer=Interrupting(after))
        assert chat.messages == before
    expected = fresh_reply(chat, [*before, {"role": "user", "content": "and?"}])
    assert chat.send("and?") == expected


def test_a_conversation_goes_on_from_its_file(chat, tmp_path):
    chat.reset("Be brief.")
    chat.send("Grüße 専")
    chat.save(tmp_path / "chat.json")
    other = Chat(chat._decoder, chat._tokenizer, generation_config=None, **OPTIONS)
    other.load(tmp_path / "chat.json")
    assert other.messages == chat.messages
    assert other.send("more") == chat.send("more")


@pytest.mark.parametrize("content", ["{", "{}", '["Hi"]', '[{"content": "no role"}]', None])
def test_a_file_that_is_no_conversation_is_refused(chat, tmp_path, content):
    path = tmp_path / "chat.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"chat\.json"):
        chat.load(path)
    assert chat.messages == []


def test_a_conversation_that_cannot_be_written_says_where(chat, tmp_path):
    with pytest.raises(SaveError, match="nowhere"):
        chat.save(tmp_path / "nowhere" / "chat.json")
    assert json.loads("[]") == chat.messages


def test_a_tokenizer_without_a_template_is_refused_when_spoken_to(talker):
    decoder = talker[0]
    chat = Chat(decoder, Tokenizer(byte_level_bpe()), generation_config=None, **OPTIONS)
    with pytest.raises(TokenizerError, match="no chat template"):
        chat.send("Hi")


def test_options_are_checked_before_anything_is_said(talker):
    decoder, _, tokenizer = talker
    with pytest.raises(ArgumentError, match="num_beams"):
        Chat(decoder, tokenizer, generation_config=None, num_beams=2)


def test_an_option_switched_off_stays_off(talker):
    decoder, _, tokenizer = talker
    assert Chat(decoder, tokenizer, generation_config=None, top_k=None, do_sample=True)._config.top_k == 0


def test_a_conversation_that_outgrows_the_positions_is_refused(chat):
    with pytest.raises(InputError, match="positions"):
        chat.send("x " * 300)
    assert chat.messages == []
    assert chat.send("Hi")


def test_common_prefix_counts_leading_ids_that_agree():
    assert [common_prefix(a, b) for a, b in [([], [1]), ([1, 2], [1, 2, 3]), ([1, 2], [1, 3]), ([4], [5])]] == [
        0,
        2,
        1,
        0,
    ]
