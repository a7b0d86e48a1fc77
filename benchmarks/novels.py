"""Small models on ../shared/data/text: what the benchmarks of quality train and measure them with."""

import gzip
import math
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ponder_hf import PonderingForCausalLM
from ponder_hf.data.blocks import Blocks
from ponder_hf.demo.simple_training import train


FOLDER = Path("../shared/data/text")


def read_blocks(folder, characters, vocab_size, block_size):
    """Training and held-out token ids, (N, block_size) each, by a byte-level BPE tokenizer trained on the text.

    Args:
        folder: holds novels-train.txt.gz and novels-valid.txt.gz, of different books.
        characters: to read for training; a twentieth of it is read for measuring.
    """
    texts = []
    for name, share in (("novels-train.txt.gz", characters), ("novels-valid.txt.gz", characters // 20)):
        with gzip.open(folder / name, "rt", encoding="utf-8") as file:
            texts.append(file.read(share))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[0].split("\n\n"), vocab_size=vocab_size, show_progress=False)
    for text in texts:
        ids = [token for part in tokenizer.encode_batch(text.split("\n\n")) for token in part.ids]
        yield torch.tensor(ids[: len(ids) // block_size * block_size]).view(-1, block_size)


def small_backbone(vocab_size, hidden_size, num_layers, block_size):
    """A random GPT-NeoX of this shape; the caller seeds."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            intermediate_size=4 * hidden_size,
            max_position_embeddings=block_size,
        )
    )


def add_shape_arguments(parser):
    """What a benchmark that trains small models lets its user choose."""
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--characters", type=int, default=12_000_000)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps")
    parser.add_argument("--learning-rate", type=float, default=2e-3)


def trained_model(arguments, rows, seed, **pondering_fields):
    """A pondering model trained from scratch for `arguments.steps` steps; the seed decides weights and order."""
    torch.manual_seed(seed)
    backbone = small_backbone(arguments.vocab_size, arguments.hidden_size, arguments.layers, arguments.block)
    model = PonderingForCausalLM.from_base(backbone, **pondering_fields)
    train(
        model,
        Blocks(rows).shuffled(seed),
        label=", ".join(f"{name} {value}" for name, value in pondering_fields.items()),
        seed=seed,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        warmup_steps=math.ceil(arguments.steps / 20),
        logging_steps=max(1, arguments.steps),
        use_cpu=True,
    )
    return model


@torch.no_grad()
def losses_and_agreement(model, rows, batch_size=8):
    """Held-out loss of each pass 0 .. S in nats per token, and how often passes 0 .. S-1 have the last one's argmax.

    Args:
        rows: (N, T) token ids.
    """
    model.eval()
    num_passes = model.config.pondering_steps + 1
    losses, agreement, batches = torch.zeros(num_passes), torch.zeros(num_passes - 1), rows.split(batch_size)
    for batch in batches:
        output = model(input_ids=batch, labels=batch, output_pondering=True, use_cache=False)
        share = len(batch) / len(rows)
        losses += share * torch.stack(output.pondering_losses)
        last = output.logits.argmax(-1)
        agreement += share * torch.stack(
            [(logits.argmax(-1) == last).float().mean() for logits in output.pondering_logits]
        )
    return losses.tolist(), agreement.tolist()
