"""Small tokenizers of the kinds that checkpoints come with, built on the spot, and folders of theirs."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The expert that a token visits is chosen by a router; no expert may be lost.",
    "def route(hidden_states, top_k):\n    return softmax(hidden_states @ gate.T).topk(top_k)\n",
    "Two roads diverged in a wood, and I took the one less travelled by. Don't stop, it's fine!",
    "Mixture of experts: eine Mischung von Experten, 専門家の混合, смесь экспертов.",
] * 3

TEXTS = [
    "",
    "The router chose expert 7.",
    " leading and  double   spaces \n\n\ttabs ",
    "Don't stop , it 's fine ! Is it ?",
    "専門家の混合 中文字符 한국어",
    "emoji 🙂👩‍👩‍👧 and é e\u0301 ﬁ",
    "<s>special</s><|im_end|> inside<|im_start|>text",
    "x" * 50,
]

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_bpe() -> tokenizers.Tokenizer:
    """As Qwen's and GPT's: bytes as letters, merges, special tokens outside."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def metaspace_bpe() -> tokenizers.Tokenizer:
    """As Llama's and Mixtral's: words marked by a metaspace, unknown characters by bytes, <s> put first."""
    letters = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    letters.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False, limit_alphabet=60
    )
    letters.train_from_iterator(CORPUS, trainer)
    description = json.loads(letters.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < 3]
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def word_level() -> tokenizers.Tokenizer:
    """One id a word; what it does not know is <unk>."""
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece() -> tokenizers.Tokenizer:
    """As BERT's: its decoding leaves spaces before punctuation."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


BUILDERS = {
    "byte_level_bpe": byte_level_bpe,
    "metaspace_bpe": metaspace_bpe,
    "word_level": word_level,
    "word_piece": word_piece,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "byte_level_bpe": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
    "metaspace_bpe": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
    "word_level": {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"},
    "word_piece": {"unk_token": "[UNK]", "pad_token": "[PAD]", "clean_up_tokenization_spaces": True},
}


def save_folder(kind: str, folder: Path, **config: Any) -> Path:
    """A model folder's tokenizer files for one of BUILDERS."""
    folder.mkdir(parents=True, exist_ok=True)
    BUILDERS[kind]().save(str(folder / "tokenizer.json"))
    raw = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **CONFIGS[kind], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    return folder
