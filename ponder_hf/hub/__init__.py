"""The Hub: what of a folder is pushed, the model card, and what the code in a checkpoint is."""

from .code import inspect_code
from .model import push_model
from .push import push
from .training import CodeOnPush


__all__ = ["CodeOnPush", "inspect_code", "push", "push_model"]
