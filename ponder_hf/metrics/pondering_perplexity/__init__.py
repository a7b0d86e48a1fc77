"""A metric that `evaluate` loads by path: see `ponder_hf.metrics`."""
