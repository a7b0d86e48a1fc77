"""What the tests of the plug-in for vLLM share, and the environment that `make vllm` runs them in."""
