"""`make gpu`: what can only be seen on a GPU, checked and measured by one command.

checks.py and generation_checks.py: each kernel, training, generation, caches, loading, on the device.
training_costs.py and generation_costs.py: what pondering costs there, at Pythia-410m's shape.
__main__.py runs them in processes of their own, so that one that fails costs no other its results.
"""

import os


# Nothing here is on the Hub; read by transformers when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
