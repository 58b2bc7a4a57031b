"""Our tokenizer encodes and decodes as transformers' AutoTokenizer does on the same folder."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from moebius.errors import ArgumentError, TokenizerError
from moebius.tokenizer import AutoTokenizer, Tokenizer
from moebius.tokenizer.token_bytes import TokenBytes
from tests.tokenizer_builders import BUILDERS, CORPUS, TEXTS, byte_level_bpe, metaspace_bpe, save_folder

KINDS = list(BUILDERS)


@pytest.fixture(params=KINDS, scope="module")
def pair(request, tmp_path_factory):
    folder = save_folder(request.param, tmp_path_factory.mktemp(request.param))
    return AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_transformers(pair, special):
    ours, theirs = pair
    for text in [*TEXTS, *CORPUS[:4]]:
        assert ours(text, add_special_tokens=special).input_ids == theirs(text, add_special_tokens=special).input_ids
        assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)


@pytest.mark.parametrize("skip", [True, False])
def test_decoded_texts_are_those_of_transformers(pair, skip):
    ours, theirs = pair
    rows = [theirs(text).input_ids for text in TEXTS]
    assert ours.batch_decode(rows, skip_special_tokens=skip) == theirs.batch_decode(rows, skip_special_tokens=skip)
    assert ours.decode(rows[1][0], skip_special_tokens=skip) == theirs.decode(rows[1][0], skip_special_tokens=skip)
    clean = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": True}
    assert ours.batch_decode(rows, **clean) == theirs.batch_decode(rows, **clean)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "truncation": True, "max_length": 6},
        {"padding": "max_length", "max_length": 30},
        {"padding": "max_length", "max_length": 9, "truncation": True},
        {"max_length": 5},
        {"max_length": 5, "truncation": True, "add_special_tokens": False},
    ],
)
def test_padding_and_truncation_are_those_of_transformers(pair, side, options):
    ours, theirs = pair
    texts = ["The router", "Two roads diverged in a wood, and I", "x"]
    mine, reference = ours(texts, padding_side=side, **options), theirs(texts, padding_side=side, **options)
    assert mine.input_ids == reference["input_ids"]
    assert mine.attention_mask == reference["attention_mask"]


def test_special_tokens_and_sizes_are_those_of_transformers(pair):
    ours, theirs = pair
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs))
    assert ours.get_vocab() == theirs.get_vocab()
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)


def test_a_special_token_missing_from_the_vocabulary_gets_the_next_id(tmp_path):
    folder = save_folder("byte_level_bpe", tmp_path, pad_token="[PAD]", image_token="<img>")
    ours, theirs = AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.pad_token_id == theirs.pad_token_id == ours.vocab_size
    assert ours("a<img>b [PAD]").input_ids == theirs("a<img>b [PAD]").input_ids


def test_added_tokens_of_the_config_are_known(tmp_path):
    added = {"400": {"content": "<tool>", "special": False, "lstrip": False, "rstrip": True, "normalized": False}}
    folder = save_folder("byte_level_bpe", tmp_path, added_tokens_decoder=added, extra_special_tokens=["<extra>"])
    ours, theirs = AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "call <tool>  now<extra>!"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids, True) == theirs.decode(theirs(text).input_ids, True)


def test_the_special_tokens_map_counts_in_folders_without_added_tokens_decoder(tmp_path):
    folder = save_folder("byte_level_bpe", tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"


def test_llama_class_folders_encode_alike(tmp_path):
    folder = save_folder("metaspace_bpe", tmp_path, tokenizer_class="LlamaTokenizerFast", add_bos_token=True)
    ours, theirs = AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[1:]:
        assert ours(text).input_ids == theirs(text).input_ids


def test_tensors_come_ready_for_generate():
    tokenizer = Tokenizer(byte_level_bpe(), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    encoding = tokenizer(["a", "the router"], padding=True, return_tensors="pt").to("cpu")
    assert set(dict(**encoding)) == {"input_ids", "attention_mask"}
    assert encoding.input_ids.dtype == torch.int64
    assert encoding.attention_mask[0].tolist() == [0] * (encoding.input_ids.shape[1] - 1) + [1]
    assert tokenizer("a", return_tensors="pt").input_ids.shape == (1, 1)


def test_padding_is_on_the_left_unless_the_config_says_otherwise(tmp_path):
    assert Tokenizer(byte_level_bpe()).padding_side == "left"
    folder = save_folder("byte_level_bpe", tmp_path, padding_side="right")
    assert AutoTokenizer.from_pretrained(folder).padding_side == "right"


@pytest.mark.parametrize("silent", [True, False])
def test_padding_and_truncation_set_in_tokenizer_json_give_defaults_alone(tmp_path, silent):
    folder = save_folder("word_level", tmp_path, pad_token=None)
    if silent:
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_padding(direction="right", pad_id=1, pad_token="<pad>", length=9)
    backend.enable_truncation(3)
    backend.save(str(folder / "tokenizer.json"))
    ours, theirs = AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["expert", "The router is chosen by a token"]
    assert ours(texts).input_ids == theirs(texts)["input_ids"]
    assert (ours.padding_side, ours.pad_token) == (theirs.padding_side, theirs.pad_token)


def test_arguments_of_from_pretrained_win_over_the_files(tmp_path):
    folder = save_folder("byte_level_bpe", tmp_path / "a", padding_side="right")
    options = {"padding_side": "left", "pad_token": "<|im_start|>", "use_fast": True}
    ours = AutoTokenizer.from_pretrained(folder, **options)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, **options)
    assert ours(["a", "b c"], padding=True).input_ids == theirs(["a", "b c"], padding=True)["input_ids"]
    ours.save_pretrained(tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b").pad_token == "<|im_start|>"


@pytest.mark.parametrize("option", [{"use_fast": False}, {"trust_remote_code": True}, {"gguf_file": "x"}])
def test_options_of_from_pretrained_that_cannot_be_taken_are_refused(tmp_path, option):
    with pytest.raises(ArgumentError, match=next(iter(option))):
        AutoTokenizer.from_pretrained(save_folder("word_level", tmp_path), **option)


def test_padding_without_a_pad_token_is_refused_until_one_is_set():
    tokenizer = Tokenizer(byte_level_bpe(), eos_token="<|endoftext|>")
    with pytest.raises(ArgumentError, match="pad token"):
        tokenizer(["a", "b c"], padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["a", "b c"], padding=True).input_ids[0][0] == tokenizer.eos_token_id


def test_rows_of_different_lengths_make_no_tensor():
    with pytest.raises(ArgumentError, match="padding=True"):
        Tokenizer(byte_level_bpe())(["a", "the router"], return_tensors="pt")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"return_tensors": "tf"}, "return_tensors"),
        ({"padding": "short"}, "padding"),
        ({"padding": True, "padding_side": "up"}, "padding_side"),
        ({"max_length": 0, "truncation": True, "add_special_tokens": True}, "max_length=0"),
    ],
)
def test_arguments_without_meaning_are_refused_by_name(options, named):
    tokenizer = Tokenizer(metaspace_bpe(), pad_token="</s>")
    with pytest.raises(ArgumentError, match=named):
        tokenizer(["a"], **options)


@pytest.mark.parametrize("text", [None, 3, [1, 2], ["a", None]])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(ArgumentError, match="text"):
        Tokenizer(byte_level_bpe())(text)


def test_a_post_processor_with_an_unknown_token_is_refused_when_read(tmp_path, capfd):
    path = save_folder("metaspace_bpe", tmp_path) / "tokenizer.json"
    description = json.loads(path.read_text())
    description["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_text_that_utf8_cannot_carry_is_refused():
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        Tokenizer(byte_level_bpe())("\ud800")


def test_a_folder_without_tokenizer_json_names_both_ways_out(tmp_path):
    with pytest.raises(TokenizerError, match=r"(?s)no tokenizer.json.*convert.*token ids"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TokenizerError, match="nowhere"):
        AutoTokenizer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": 3}'),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b"{]"),
        ("tokenizer_config.json", b'{"eos_token": 7}'),
        ("tokenizer_config.json", b'{"eos_token": {"text": "x"}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": "y"}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", b'{"extra_special_tokens": 5}'),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": [1], "template": "x"}]}'),
        ("tokenizer_config.json", b'{"chat_template": {"default": 3}}'),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}'),
        ("special_tokens_map.json", b"nope"),
        ("added_tokens.json", b'{"<a>": "b"}'),
        ("chat_template.json", b"nope"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, file, content):
    folder = save_folder("byte_level_bpe", tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        AutoTokenizer.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert str(folder / file) in str(caught.value) or str(folder) in str(caught.value)


def test_an_untouched_tokenizer_is_saved_as_byte_copies(tmp_path):
    folder = save_folder("metaspace_bpe", tmp_path / "a", chat_template="{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    copied = {path.relative_to(tmp_path / "b"): path.read_bytes() for path in (tmp_path / "b").rglob("*.js*")}
    assert copied == {name: (folder / name).read_bytes() for name in copied}
    assert len(copied) == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "b").chat_templates["rag"] == "rag"


def test_a_tokenizer_made_or_changed_here_is_read_back_alike_by_both(tmp_path):
    made = Tokenizer(byte_level_bpe(), eos_token="<|im_end|>", chat_template={"default": "{{ 1 }}", "rag": "{{ 2 }}"})
    made.pad_token = "[PAD]"
    made.save_pretrained(tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert made(text).input_ids == ours(text).input_ids == theirs(text).input_ids
    assert ours.pad_token_id == theirs.pad_token_id == made.pad_token_id
    assert (ours.eos_token, ours.chat_templates) == ("<|im_end|>", made.chat_templates)


def test_a_tokenizer_loaded_and_then_changed_is_saved_changed(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_folder("word_level", tmp_path / "a"))
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b").eos_token == "<end>"


def test_importing_the_tokenizer_loads_neither_torch_nor_transformers():
    code = "import sys, moebius.tokenizer; print([m for m in ('torch', 'transformers', 'jinja2') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_tokenizer_can_be_copied_and_pickled(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(
        save_folder("word_level", tmp_path, chat_template="{{ messages|length }}")
    )
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied(CORPUS[0]) == tokenizer(CORPUS[0])
        assert copied.apply_chat_template([{"role": "user"}], tokenize=False) == "1"


def test_token_bytes_of_a_text_join_to_it():
    for backend in (byte_level_bpe(), metaspace_bpe()):
        token_bytes = TokenBytes(backend)
        for text in TEXTS:
            ids = backend.encode("a " + backend.normalizer.normalize_str(text) if backend.normalizer else text).ids
            joined = b"".join(map(token_bytes, ids)).decode(errors="replace")
            assert joined.endswith(backend.decode(ids, skip_special_tokens=False).removeprefix("a "))


def test_ids_beyond_the_vocabulary_have_no_bytes():
    backend: tokenizers.Tokenizer = byte_level_bpe()
    assert TokenBytes(backend)(10_000) == b""


def test_folders_are_given_as_text_or_path(tmp_path: Path):
    folder = save_folder("word_level", tmp_path)
    assert AutoTokenizer.from_pretrained(str(folder))("expert") == AutoTokenizer.from_pretrained(folder)("expert")
