"""Train a LoRA adapter for a pondering model with PEFT, load it again, merge it, and generate.

    python examples/lora.py MODEL TEXT OUTPUT

MODEL is a pondering checkpoint, a folder or a Hub id (`ponder-hf convert` makes one), TEXT a plain text file, OUTPUT a
new folder for `adapter/` and `merged/`. LoRA acts on the same layers as in the plain backbone, in every pass.
"""

import argparse
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import ponder_hf  # noqa: F401 - makes the Auto classes know pondering models
from ponder_hf.training.lora import default_target_modules


def adapt(model):
    """Put LoRA layers into a pondering model; a learned gate, where there is one, is trained whole."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=default_target_modules(model.config.base_config),
        modules_to_save=["pondering_gate"] if model.pondering_gate is not None else None,
    )
    return get_peft_model(model, config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--block", type=int, default=128, help="tokens in a row")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = torch.tensor(tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"])
    blocks = ids[: len(ids) // arguments.block * arguments.block].view(-1, arguments.block)
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    held_out, training = rows[: len(rows) // 10 + 1], rows[len(rows) // 10 + 1 :]

    model = adapt(AutoModelForCausalLM.from_pretrained(arguments.model))
    model.print_trainable_parameters()
    settings = TrainingArguments(
        output_dir=str(arguments.output / "checkpoints"),
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        logging_steps=10,
        save_strategy="no",
        label_names=["labels"],
        report_to="none",
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=default_data_collator,  # blocks are equally long: nothing to pad
    )
    print("held-out loss before:", trainer.evaluate()["eval_loss"])
    trainer.train()
    print("held-out loss after: ", trainer.evaluate()["eval_loss"])
    model.save_pretrained(arguments.output / "adapter")  # small: MODEL is needed next to it

    # Without ponder_hf installed, give trust_remote_code=True here.
    adapted = AutoPeftModelForCausalLM.from_pretrained(arguments.output / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(arguments.output / "merged")  # stands alone, with the code that loads it anywhere
    tokenizer.save_pretrained(arguments.output / "merged")

    text = tokenizer.decode(held_out[0]["input_ids"][:16], skip_special_tokens=True)
    prompt = tokenizer(text, return_tensors="pt").to(merged.device)
    print(tokenizer.decode(merged.generate(**prompt, max_new_tokens=40)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
