"""A small byte-level BPE tokenizer for the tests: every text comes back as it was, id 0 ends one."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXTokenizerFast


END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(text: str, vocab_size: int, positions: int) -> GPTNeoXTokenizerFast:
    """A tokenizer of at most so many entries, trained on a text, for a model of so many positions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return GPTNeoXTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=positions,
    )
