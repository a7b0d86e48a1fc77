"""Fine-tune a pondering model on prompts and completions with TRL's SFTTrainer.

    python examples/sft.py MODEL DATA OUTPUT

MODEL is a pondering checkpoint, a folder or a Hub id (`ponder-hf convert` makes one), DATA a .jsonl file with the
fields `prompt` and `completion`, OUTPUT a new folder. Only completions count in the loss.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import ponder_hf  # noqa: F401 - makes the Auto classes know pondering models


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a prompt and its completion")
    arguments = parser.parse_args()

    rows = load_dataset("json", data_files=arguments.data, split="train").train_test_split(test_size=0.1, seed=0)
    settings = SFTConfig(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        max_length=arguments.max_length,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        logging_steps=10,
        save_steps=arguments.steps,
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model),
        settings,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    )
    print("held-out loss before:", trainer.evaluate()["eval_loss"])
    trainer.train()
    print("held-out loss after: ", trainer.evaluate()["eval_loss"])
    trainer.save_model()  # weights, configuration, tokenizer and the code that loads them anywhere


if __name__ == "__main__":
    main()
