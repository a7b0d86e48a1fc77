"""Train a small pondering model from scratch on text files, with a tokenizer of its own.

    python examples/train_small.py ../shared/data/text/novels-train.txt.gz small-model

With the defaults (1.3 million parameters, S = 3, 1.6 million tokens) it takes about twenty minutes on one core. The
documentation's measurements of generation are made with such a model; docs/cost.md names the arguments.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ponder_hf import PonderingForCausalLM
from ponder_hf.data.text import read_text


VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"


def read_pieces(paths, characters):
    """The first `characters` characters of these files, in pieces."""
    pieces, count = [], 0
    for piece in read_text(paths):
        pieces.append(piece.text)
        count += len(piece.text)
        if count >= characters:
            break
    return pieces


def train_tokenizer(pieces):
    """A byte-level BPE tokenizer of VOCAB_SIZE entries."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(pieces, vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="a text file, .gz or not")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps")
    parser.add_argument("--block", type=int, default=256, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=8, help="rows in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--characters", type=int, default=12_000_000, help="how much of the text to use")
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--pondering-top-k", type=int)
    parser.add_argument("--pondering-gate", default="none", help="none (as measured), random_signs, ...")
    parser.add_argument("--intermediate-loss-weight", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} exists and is not empty: give a new folder")

    set_seed(arguments.seed)
    pieces = read_pieces([arguments.text], arguments.characters)
    tokenizer = train_tokenizer(pieces)
    ids = torch.tensor([token for row in tokenizer(pieces)["input_ids"] for token in row])
    blocks = ids[: len(ids) // arguments.block * arguments.block].view(-1, arguments.block)
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    held_out, training = rows[:100], rows[100:]
    if not training:
        parser.error(f"{arguments.text} gives {len(rows)} blocks of {arguments.block} tokens, but 100 are held out")

    config = GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = PonderingForCausalLM.from_base(
        GPTNeoXForCausalLM(config),
        pondering_steps=arguments.pondering_steps,
        pondering_top_k=arguments.pondering_top_k,
        pondering_gate=arguments.pondering_gate,
        intermediate_loss_weight=arguments.intermediate_loss_weight,
    )
    settings = TrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.rows,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=arguments.steps // 50,
        adam_beta2=0.95,
        weight_decay=0.01,
        logging_steps=20,
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to="none",
        seed=arguments.seed,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,  # blocks are equally long: nothing to pad
    )
    trainer.train()
    print("held-out loss:", trainer.evaluate()["eval_loss"])
    trainer.save_model()


if __name__ == "__main__":
    main()
