"""The Hub: what of a folder is pushed, the model card, and what the code in a checkpoint is."""

from .code import inspect_code
from .push import push


__all__ = ["inspect_code", "push"]
