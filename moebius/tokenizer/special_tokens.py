"""Special tokens as attributes: `tokenizer.pad_token = tokenizer.eos_token`, `tokenizer.pad_token_id`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebius.tokenizer.tokenizer import Tokenizer


class SpecialToken:
    """The text of one special token, or None; setting it makes the text a token if it was none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: "Tokenizer", owner: type) -> str | None:
        return tokenizer.special_tokens.get(self.name)

    def __set__(self, tokenizer: "Tokenizer", text: str | None) -> None:
        tokenizer.set_special_token(self.name, text)


class SpecialTokenId:
    """The id of the special token whose attribute is this one's name without `_id`, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.token_name = name.removesuffix("_id")

    def __get__(self, tokenizer: "Tokenizer", owner: type) -> int | None:
        text = tokenizer.special_tokens.get(self.token_name)
        return None if text is None else tokenizer.backend_tokenizer.token_to_id(text)
