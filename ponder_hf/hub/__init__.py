"""The Hub: what of a folder is pushed, the model card, what a checkpoint is, and what its code is."""

from .code import inspect_code
from .inspection import inspect_checkpoint
from .model import push_model
from .push import push
from .trainer_uploads import CodeOnPush


__all__ = ["CodeOnPush", "inspect_checkpoint", "inspect_code", "push", "push_model"]
