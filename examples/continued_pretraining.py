"""Make a plain model ponder and continue its pretraining on a text file.

    python examples/continued_pretraining.py BASE TEXT OUTPUT

BASE is a Hub id or a folder, TEXT a plain text file, OUTPUT a new folder. Everything is transformers' own: the
pondering model goes where the plain one would.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from ponder_hf import PonderingForCausalLM
from ponder_hf.callbacks import PonderingCallback


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--block", type=int, default=128, help="tokens in a row")
    arguments = parser.parse_args()

    # The gate starts at zero, so the model starts exactly as its base and learns to use pondering.
    model = PonderingForCausalLM.from_base(arguments.base, pondering_steps=3, pondering_gate="zero_init_matrix")
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)

    ids = torch.tensor(tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"])
    blocks = ids[: len(ids) // arguments.block * arguments.block].view(-1, arguments.block)
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    held_out, training = rows[: len(rows) // 10 + 1], rows[len(rows) // 10 + 1 :]

    settings = TrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        logging_steps=10,
        save_steps=arguments.steps,
        report_to="none",
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,  # blocks are equally long: nothing to pad
    )
    few = {"input_ids": torch.stack([row["input_ids"] for row in held_out[:4]])}
    PonderingCallback(few, every=settings.logging_steps).attach(trainer)  # logs the loss of each pass, and more
    print("held-out loss before:", trainer.evaluate()["eval_loss"])
    trainer.train()
    print("held-out loss after: ", trainer.evaluate()["eval_loss"])
    trainer.save_model()  # weights, configuration, tokenizer and the code that loads them anywhere


if __name__ == "__main__":
    main()
