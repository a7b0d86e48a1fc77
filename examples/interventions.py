"""Does the content of a thought matter? The loss of a text where something else takes the place of what is pondered.

    python examples/interventions.py MODEL TEXT [--other-text FILE] [--max-blocks N] [--json]

MODEL is a pondering checkpoint, a folder or a Hub id; TEXT a file that it was not trained on. Each row is the loss of
the last pass with one change of every pondering embedding, and how much more that is than without it, in nats per
token with an interval of 95 % over blocks. The changes are the functions of `ponder_hf.lenses.interventions`.
"""

import argparse
import json

from transformers import AutoModelForCausalLM, AutoTokenizer

from ponder_hf.data import load_blocks
from ponder_hf.evaluation import measure_blocks
from ponder_hf.evaluation.passes import ratio
from ponder_hf.lenses import interventions


def changes(model, tokenizer, other_ids):
    """The interventions to compare, from leaving pondering out to giving it more room."""
    steps = model.config.pondering_steps
    frequent = max(set(other_ids), key=other_ids.count)
    yield from (interventions.stop_at(pass_index) for pass_index in range(steps))
    yield interventions.replace_by_mean(model)
    yield interventions.replace_by_token(model, frequent, tokenizer)
    yield interventions.replace_by_noise()
    yield interventions.replace_by_prompt(model, tokenizer, other_ids)
    yield from map(interventions.scale, (0.5, 2.0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument(
        "--other-text", help="whose thoughts are put in; by default the last block of TEXT, which is then not measured"
    )
    parser.add_argument("--block-size", type=int, default=128, help="tokens in a row")
    parser.add_argument("--max-blocks", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()

    def read(path):
        return load_blocks(path, tokenizer, arguments.block_size, max_blocks=arguments.max_blocks)

    blocks = read(arguments.text)
    if arguments.other_text:
        other_ids = read(arguments.other_text).rows[0]
    else:
        blocks.rows, other_ids = blocks.rows[:-1], blocks.rows[-1]
    plain = measure_blocks(model, blocks)
    rows = [{"change": "none", "loss": ratio(plain.losses[-1], plain.tokens)[0]}]
    for intervention in changes(model, tokenizer, other_ids.tolist()):
        with interventions.intervening(model, intervention):
            found = measure_blocks(model, blocks)
        # Of the same tokens, so the difference is far more certain than the losses are.
        more, error = ratio(found.losses[-1] - plain.losses[-1], plain.tokens)
        loss = ratio(found.losses[-1], found.tokens)[0]
        rows.append({"change": intervention.name, "loss": loss, "more": more, "interval": 1.96 * error})
    if arguments.json:
        print(json.dumps({"tokens": int(plain.tokens.sum()), "rows": rows}))
        return
    print(f"{int(plain.tokens.sum()):,} tokens in {len(blocks)} blocks")
    print("\n| change | loss, nats | more |\n| --- | --- | --- |")
    for row in rows:
        more = f"{row['more']:+.4f} ± {row['interval']:.4f}" if "more" in row else ""
        print(f"| {row['change']} | {row['loss']:.4f} | {more} |")


if __name__ == "__main__":
    main()
