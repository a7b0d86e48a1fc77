"""transformers' own shared model tests on pondering models: `make upstream`."""
