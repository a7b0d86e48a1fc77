"""What a fresh environment must do with an installed ponder_hf: convert, generate, save, load. Prints the versions."""

import platform
import sys
import tempfile
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ponder_hf


torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
plain = LlamaForCausalLM(LlamaConfig(vocab_size=67, **sizes)).eval()
model = ponder_hf.PonderingForCausalLM.from_base(plain, pondering_steps=3, pondering_top_k=20).eval()
prompt = torch.arange(3, 9)[None]
settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
text = model.generate(prompt, **settings)
assert text.shape == (1, 26), text.shape
assert torch.equal(model.generate(prompt, num_draft_tokens=3, **settings), text)
assert not torch.equal(model(prompt).logits, plain(prompt).logits)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    assert ponder_hf.inspect_code(folder)["status"] == "same"
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(again(prompt).logits, model(prompt).logits)
assert "site-packages" in ponder_hf.__file__, ponder_hf.__file__
assert ponder_hf.__version__ == version("ponder-hf") == sys.argv[1], ponder_hf.__version__
print(
    f"Python {platform.python_version()}, transformers {version('transformers')}, torch {torch.__version__}, "
    f"ponder_hf {ponder_hf.__version__}"
)
