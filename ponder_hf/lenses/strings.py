"""What token ids are to people."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase


_NOTHING = "\N{REPLACEMENT CHARACTER}"  # what tokenizers write where bytes are no character
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes in place of a space


def token_strings(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> dict[int, str]:
    """The text of each token by itself, with its leading space.

    A token that is a part of a character is shown as the tokenizer's own name of it, an id that the tokenizer does not
    know (models pad their vocabulary) as <ID>.
    """
    return {token_id: _string(tokenizer, token_id) for token_id in token_ids}


def _string(tokenizer, token_id):
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:
        return f"<{token_id}>"
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    if piece.startswith(_SPACE) and not text.startswith(" "):  # which SentencePiece's decoders cut off at the start
        text = f" {text}"
    return piece if _NOTHING in text or not text else text


def visible(text: str) -> str:
    """The text of a token with its white space to be seen, in one line."""
    for character, shown in ((" ", "␣"), ("\n", "↵"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(character, shown)
    return "".join(character if character.isprintable() else "·" for character in text)
