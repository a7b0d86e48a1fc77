"""What is measured: each run with all its settings, and the tables that they make."""

import dataclasses
import json
from dataclasses import dataclass, replace


VOCABULARY = 256  # bytes
BLOCK = 128
BATCH = 16


@dataclass(frozen=True)
class Run:
    """One training run; it starts from random weights or from those of its base.

    Args:
        label: what it is, within its text.
        text: see texts.py.
        family: of the backbone: "gpt_neox", "llama" or "gpt2".
        text_bytes: only the first so many bytes are trained on; 0: all.
        pondering_steps: S, 0: transformers' own plain model.
        fields: further pondering fields, as pairs of name and value.
        sampled: phases of the training, each as its end (a share of all steps) and the probabilities of S = 0, 1, ...
            Empty: always `pondering_steps`.
        feeds_back_hidden_state: the ablation without the vocabulary.
        gate_start, gate_rate: what the gate starts at, and its learning rate by the model's.
        gate_signs: it starts at that with random signs.
        gate_matrix: the ablation with a matrix from 0 in place of a factor for each dimension.
        steps: optimiser steps, those of the base not counted.
        warmup: share of the steps.
        vocabulary: number of tokens, 256: bytes.
        block: tokens in a row.
        half: the model computes in bfloat16, its weights and the optimiser stay in float32.
        compiled: its training steps are compiled by torch.
    """

    label: str
    text: str
    steps: int
    layers: int = 2
    width: int = 128
    family: str = "gpt_neox"
    text_bytes: int = 0
    pondering_steps: int = 0
    fields: tuple = ()
    sampled: tuple = ()
    feeds_back_hidden_state: bool = False
    gate_start: float = 0.0
    gate_rate: float = 1.0
    gate_signs: bool = False
    gate_matrix: bool = False
    base: "Run | None" = None
    batch: int = BATCH
    learning_rate: float = 2e-3
    constant_rate: bool = False
    warmup: float = 0.05
    weight_decay: float = 0.01
    dropout: float = 0.0
    evaluate_every: int = 100
    seed: int = 0
    vocabulary: int = VOCABULARY
    block: int = BLOCK
    half: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.text}-{self.label}-seed{self.seed}"

    @property
    def ponders(self) -> bool:
        return bool(self.pondering_steps) and not self.feeds_back_hidden_state

    def as_json(self) -> dict:
        """As it stands in a result: lists for tuples."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def with_seed(run: Run, seed: int) -> Run:
    """The same run, and its base, with another seed."""
    return replace(run, seed=seed, base=run.base and replace(run.base, seed=seed))


def gated(start: float = 0.0, rate: float = 10.0, **fields: float | int | str) -> dict:
    """Settings of a run with a gate."""
    return {"fields": (("pondering_gate", "zero_init"), *fields.items()), "gate_start": start, "gate_rate": rate}


def ungated(**fields: float | int) -> dict:
    """Settings of a run as the paper has it."""
    return {"fields": tuple(fields.items())}


def trained_on(text: str = "python", **shape: str | int) -> Run:
    """Continued training: a plain base of 300 steps, then 400 steps more.

    Args:
        shape: fields of a Run; its label gets them in front.
    """
    prefix = "".join(f"{value}-" for value in shape.values())
    base = Run(f"{prefix}base300", text, 300, batch=8, constant_rate=True, **shape)
    return replace(base, label=f"{prefix}on-plain", steps=400, constant_rate=False, base=base)


def pondering_on(plain: Run, label: str, **settings) -> Run:
    """As this run of continued training, but pondering."""
    label = plain.label.removesuffix("plain") + f"S3-{label}"
    return replace(plain, label=label, pondering_steps=3, **settings)


def gate() -> list[Run]:
    """Continued training with and without a gate. One seed, to choose from."""
    plain = trained_on()
    return [
        plain,
        pondering_on(plain, "ungated", **ungated()),
        pondering_on(plain, "gate0x1", **gated(rate=1)),
        pondering_on(plain, "gate0x3", **gated(rate=3)),
        pondering_on(plain, "gate0x10", **gated()),
        pondering_on(plain, "gate0x30", **gated(rate=30)),
        pondering_on(plain, "gate0x100", **gated(rate=100)),
        pondering_on(plain, "gate0x300", **gated(rate=300)),
        pondering_on(plain, "matrix0x1", **gated(rate=1), gate_matrix=True),
        pondering_on(plain, "gate1x10", **gated(start=1.0)),
        pondering_on(plain, "gate0.3x10", **gated(start=0.3)),
    ]


def finalists() -> list[Run]:
    """Continued training: the best of `gate` on other texts, families and widths. Three seeds."""
    runs = []
    for seed in range(3):
        for plain in (
            trained_on(),
            trained_on("shakespeare", family="llama"),
            trained_on("novels", width=192),
            trained_on("python", family="gpt2", width=192),
        ):
            chosen = [
                plain,
                pondering_on(plain, "gate0x100", **gated(rate=100)),
                pondering_on(plain, "matrix0x1", **gated(rate=1), gate_matrix=True),
                pondering_on(plain, "gate0x10", **gated()),
                pondering_on(plain, "ungated", **ungated()),
                pondering_on(plain, "gate0x30", **gated(rate=30)),
                pondering_on(plain, "matrix0x3", **gated(rate=3), gate_matrix=True),
            ]
            runs += [with_seed(run, seed) for run in chosen]
    return runs


def settings() -> list[Run]:
    """Continued training with a gate from 0: everything else. One seed, to choose from."""
    plain = trained_on()

    def pondering(label: str, **settings) -> Run:
        return pondering_on(plain, f"gate0x100-{label}", **{**gated(rate=100), **settings})

    return [
        plain,
        pondering_on(plain, "gate0x100", **gated(rate=100)),
        pondering_on(plain, "matrix0x3", **gated(rate=3), gate_matrix=True),
        pondering("lr5e-4", learning_rate=5e-4),
        replace(plain, label="on-plain-lr5e-4", learning_rate=5e-4),
        pondering("lr4e-3", learning_rate=4e-3),
        replace(plain, label="on-plain-lr4e-3", learning_rate=4e-3),
        pondering("intermediate0.1", **gated(rate=100, intermediate_loss_weight=0.1)),
        pondering("warmup0", warmup=0.0),
        pondering("warmup0.2", warmup=0.2),
        pondering("K8", **gated(rate=100, pondering_top_k=8)),
        pondering("K32", **gated(rate=100, pondering_top_k=32)),
        pondering("input3", **gated(rate=100, input_scale=3.0)),
        pondering("embedding11.3", **gated(rate=100, embedding_scale=128**0.5)),
        pondering_on(plain, "ungated-warmup0.2", warmup=0.2),
        pondering_on(plain, "gate0.1x10", **gated(start=0.1)),
        pondering_on(plain, "gate0x1000", **gated(rate=1000)),
    ]


def scratch() -> list[Run]:
    """From scratch: what the paper leaves open. One seed, to choose from."""
    plain = Run("plain", "python", 500, batch=8)

    def pondering(label: str, **settings) -> Run:
        return replace(plain, label=f"S3-{label}", pondering_steps=3, **settings)

    return [
        plain,
        pondering("ungated", **ungated()),
        pondering("gate0x100", **gated(rate=100)),
        pondering("signs1x10", **gated(start=1.0), gate_signs=True),
        pondering("matrix0x1", **gated(rate=1), gate_matrix=True),
        pondering("gate1x10", **gated(start=1.0)),
        pondering("gate0x10", **gated()),
        pondering("input3", **ungated(input_scale=3.0)),
        pondering("embedding11.3", **ungated(embedding_scale=128**0.5)),
        pondering("embedding11.3-input3", **ungated(embedding_scale=128**0.5, input_scale=3.0)),
        pondering("intermediate0.1", **ungated(intermediate_loss_weight=0.1)),
        pondering("K32", **ungated(pondering_top_k=32)),
        replace(plain, label="plain-lr4e-3", learning_rate=4e-3),
        pondering("lr4e-3", **ungated(), learning_rate=4e-3),
    ]


def signs() -> list[Run]:
    """From scratch: a gate that starts at random signs, the best of `scratch`, on more texts, seeds and families."""
    runs = []
    for seed in range(2):
        for plain in (
            Run("500-plain", "shakespeare", 500, batch=8),
            Run("500-llama-plain", "novels", 500, batch=8, family="llama"),
        ):
            prefix = plain.label.removesuffix("plain")
            ponders = replace(plain, label=f"{prefix}S3-ungated", pondering_steps=3)
            runs += [
                replace(run, seed=seed)
                for run in (
                    plain,
                    ponders,
                    replace(ponders, label=f"{prefix}S3-signs1x10", **gated(start=1.0), gate_signs=True),
                    replace(ponders, label=f"{prefix}S3-signs1x1", **gated(start=1.0, rate=1), gate_signs=True),
                )
            ]
    return runs


EVEN = (0.25, 0.25, 0.25, 0.25)
MOSTLY_3 = (0.05, 0.05, 0.1, 0.8)
ALWAYS_0, ALWAYS_1, ALWAYS_2, ALWAYS_3 = (1.0,), (0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 1.0)


def elastic() -> list[Run]:
    """One model for every S: how S is drawn in training from scratch, at the same tokens."""
    fixed = Run("S3-800", "shakespeare", 800, batch=8, pondering_steps=3, evaluate_every=200)

    def drawn(label: str, *phases, **settings) -> Run:
        return replace(fixed, label=f"drawn-{label}", sampled=phases, **settings)

    return [
        fixed,
        replace(fixed, label="plain-800", pondering_steps=0),
        drawn("mostly-3", (1.0, MOSTLY_3)),
        drawn("even", (1.0, EVEN)),
        replace(fixed, label="S3-800-intermediate0.1", **ungated(intermediate_loss_weight=0.1)),
        replace(fixed, label="S3-800-gate0x10", **gated()),
        drawn("mostly-3-gate0x10", (1.0, MOSTLY_3), **gated()),
        drawn("grows", (0.25, ALWAYS_0), (0.5, ALWAYS_1), (0.75, ALWAYS_2), (1.0, ALWAYS_3)),
        drawn("even-then-3", (0.5, EVEN), (1.0, ALWAYS_3)),
        drawn("3-then-even", (0.7, ALWAYS_3), (1.0, EVEN)),
        drawn("even-1-to-3", (1.0, (0.0, 1.0, 1.0, 1.0))),
        drawn("grows-then-mostly-3", (0.2, ALWAYS_0), (0.4, ALWAYS_1), (1.0, MOSTLY_3)),
        replace(fixed, label="S3-800-intermediate0.03", **ungated(intermediate_loss_weight=0.03)),
        replace(fixed, label="S1-800", pondering_steps=1),
        replace(fixed, label="S2-800", pondering_steps=2),
        # With the arithmetic of fixed S = 3: 4 passes a step there, 2.5 here.
        drawn("even-1280", (1.0, EVEN), steps=1280),
    ]


def elastic_on() -> list[Run]:
    """The same in continued training with a gate from 0, where every S starts as good as the base."""
    plain = trained_on()

    matrix = {**gated(rate=1), "gate_matrix": True}

    def drawn(label: str, *phases, gate: str = "gate0x100", **settings) -> Run:
        settings = settings or gated(rate=100)
        return replace(plain, label=f"on-drawn-{label}-{gate}", pondering_steps=3, sampled=phases, **settings)

    return [
        plain,
        pondering_on(plain, "gate0x100", **gated(rate=100)),
        drawn("even", (1.0, EVEN)),
        drawn("mostly-3", (1.0, MOSTLY_3)),
        drawn("grows", (0.33, ALWAYS_1), (0.67, ALWAYS_2), (1.0, ALWAYS_3)),
        pondering_on(plain, "gate0x100-intermediate0.1", **gated(rate=100, intermediate_loss_weight=0.1)),
        pondering_on(plain, "matrix0x1", **matrix),
        drawn("mostly-3", (1.0, MOSTLY_3), gate="matrix0x1", **matrix),
        drawn("grows", (0.33, ALWAYS_1), (0.67, ALWAYS_2), (1.0, ALWAYS_3), gate="matrix0x1", **matrix),
        drawn("grows-then-mostly-3", (0.33, ALWAYS_1), (0.67, ALWAYS_2), (1.0, MOSTLY_3), gate="matrix0x1", **matrix),
        drawn("grows-late", (0.5, ALWAYS_1), (0.75, ALWAYS_2), (1.0, ALWAYS_3), gate="matrix0x1", **matrix),
    ]


def limited() -> list[Run]:
    """205 KB of text over and over (15 epochs): tokens are what is scarce. Stopped at the best of the curve."""
    return [run for dropout in (0.1, 0.0) for seed in range(3) for run in _limited(205_000, seed, dropout)]


def limited_sizes() -> list[Run]:
    """The same with half and with twice the text. One seed."""
    return [*_limited(102_500), *_limited(410_000)]


def _limited(num_bytes: int, seed: int = 0, dropout: float = 0.1) -> list[Run]:
    """15 epochs of a text, and what the arithmetic of S = 3 buys otherwise: four times the layers or the epochs."""
    steps, kilobytes = 3 * num_bytes // 205, num_bytes // 1000
    plain = Run(
        f"{kilobytes}k-plain-dropout{dropout:g}",
        "shakespeare",
        steps,
        text_bytes=num_bytes,
        batch=8,
        dropout=dropout,
        weight_decay=0.1 if dropout else 0.01,
        evaluate_every=steps // 15,
        seed=seed,
    )
    return [
        plain,
        replace(plain, label=plain.label.replace("plain", "S3"), pondering_steps=3),
        replace(plain, label=plain.label.replace("plain", "8layers"), layers=8),
        replace(
            plain, label=plain.label.replace("plain", "plain-x4"), steps=4 * steps, evaluate_every=4 * steps // 15
        ),
    ]


def tokens() -> list[Run]:
    """The same tokens for all, and what the same arithmetic buys otherwise. Three seeds."""
    plain = Run("2layers", "shakespeare", 800, evaluate_every=200)

    def of_seed(seed: int) -> list[Run]:
        return [
            plain,
            replace(plain, label="2layers-S3", pondering_steps=3),
            replace(plain, label="4layers", layers=4),
            replace(plain, label="2layers-S1", pondering_steps=1),
            replace(plain, label="2layers-fed-back3", pondering_steps=3, feeds_back_hidden_state=True),
            replace(plain, label="2layers-width192", width=192),
            replace(plain, label="8layers", layers=8),
            replace(plain, label="2layers-x4", steps=3200, evaluate_every=800),
            replace(plain, label="2layers-S2", pondering_steps=2),
        ]

    return [with_seed(run, seed) for seed in range(3) for run in of_seed(seed)]


def texts() -> list[Run]:
    """The heart of `tokens` on other texts, and on tokens of a small vocabulary in place of bytes. Two seeds."""
    runs = []
    for seed in range(2):
        for text in ("novels", "python", "wikitext"):
            plain = Run("2layers", text, 800, evaluate_every=200, seed=seed)
            runs += _and_deeper(plain)
        runs += _and_deeper(Run("2layers-V2048", "novels", 1600, evaluate_every=400, seed=seed, vocabulary=2048))
    return runs


def _and_deeper(plain: Run) -> list[Run]:
    """A plain run of 2 layers, the same with S = 3, with twice the layers, and with four times the tokens."""
    label, longer = plain.label, {"steps": 4 * plain.steps, "evaluate_every": 4 * plain.evaluate_every}
    return [
        plain,
        replace(plain, label=f"{label}-S3", pondering_steps=3),
        replace(plain, label=label.replace("2layers", "4layers"), layers=4),
        replace(plain, label=f"{label}-x4", **longer),
    ]


def scaling() -> list[Run]:
    """Sizes: loss against parameters, tokens and arithmetic. Two seeds."""
    plain = Run("1layers", "novels", 800, evaluate_every=200)
    sizes = [(layers, steps) for steps in (0, 3, 1) for layers in (1, 2, 4)] + [(8, 0), (16, 0)]
    runs = [
        replace(plain, label=f"{layers}layers" + f"-S{steps}" * bool(steps), layers=layers, pondering_steps=steps)
        for layers, steps in sizes
    ]
    return [with_seed(run, seed) for seed in range(2) for run in runs]


def shapes() -> list[Run]:
    """Layers and widths of Pythia-14M and -31M on bytes of novels, 100 million of them. Needs a GPU."""
    runs = []
    for name, width, learning_rate in (("14M", 128, 2e-3), ("31M", 256, 1e-3)):
        plain = Run(f"{name}-plain", "novels", 3052, layers=6, width=width, learning_rate=learning_rate)
        plain = replace(plain, block=512, batch=64, half=True, evaluate_every=305, warmup=0.01)
        runs += [
            plain,
            replace(plain, label=f"{name}-S3", pondering_steps=3),
            replace(plain, label=f"{name}-12layers", layers=12),
        ]
    return runs


TABLES = {
    "gate": gate(),
    "finalists": finalists(),
    "settings": settings(),
    "scratch": scratch(),
    "signs": signs(),
    "elastic": elastic(),
    "elastic-on": elastic_on(),
    "limited": limited(),
    "limited-sizes": limited_sizes(),
    "tokens": tokens(),
    "texts": texts(),
    "scaling": scaling(),
    "shapes": shapes(),
}
