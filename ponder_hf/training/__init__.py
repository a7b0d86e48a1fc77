"""Training, by transformers' Trainer and its arguments."""
