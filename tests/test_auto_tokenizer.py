"""A tokenizer by folder or by hub id, from the cache as huggingface_hub lays it out."""

import pytest

from moebius import AutoTokenizer, CheckpointError, TokenizerError
from tests.test_package import imported_by
from tests.tokenizer_builders import byte_level_bpe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """models--org--tiny with a tokenizer and no weights."""
    home = tmp_path / "models--org--tiny"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    byte_level_bpe().save(str(snapshot / "tokenizer.json"))
    return tmp_path


def test_a_hub_id_needs_no_weights(cache):
    tokenizer = AutoTokenizer.from_pretrained("org/tiny", cache_dir=cache, local_files_only=True, padding_side="right")
    assert tokenizer.decode(tokenizer("def f")["input_ids"]) == "def f"
    assert tokenizer.padding_side == "right"


def test_a_folder_is_taken_as_it_is(cache):
    folder = cache / "models--org--tiny" / "snapshots" / COMMIT
    assert AutoTokenizer.from_pretrained(str(folder)).encode("x") == AutoTokenizer.from_pretrained(folder).encode("x")


def test_what_is_not_there_is_said(cache, tmp_path):
    with pytest.raises(CheckpointError, match="org/other"):
        AutoTokenizer.from_pretrained("org/other", cache_dir=cache, local_files_only=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        AutoTokenizer.from_pretrained("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        AutoTokenizer.from_pretrained(tmp_path / "empty")


def test_it_needs_no_torch():
    assert not imported_by("from moebius import AutoTokenizer").intersection({"torch", "transformers"})
