"""Training, by transformers' Trainer and its arguments."""

from .draft_heads import train_draft_heads
from .gate import separate_gate
from .options import TrainOptions
from .run import train
from .trainer import PonderingTrainer


__all__ = ["PonderingTrainer", "TrainOptions", "separate_gate", "train", "train_draft_heads"]
