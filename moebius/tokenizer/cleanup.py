"""Undoing the spaces that WordPiece decoding leaves before punctuation and inside English contractions."""

SPACED_PIECES = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def clean_up_spaces(text: str) -> str:
    for spaced, joined in SPACED_PIECES:
        text = text.replace(spaced, joined)
    return text
