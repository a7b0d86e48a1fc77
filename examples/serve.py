"""Serve pondering checkpoints to OpenAI clients: `python examples/serve.py [options of transformers serve]`.

transformers serve looks the class of a model up in transformers itself, whatever Auto classes know: it is put there.
Needs `pip install "ponder-hf[serve]"`.
"""

import sys

import transformers
from transformers.cli.transformers import main

from ponder_hf import PonderingForCausalLM


if __name__ == "__main__":
    transformers.PonderingForCausalLM = PonderingForCausalLM
    sys.argv[:1] = ["transformers", "serve"]
    main()
