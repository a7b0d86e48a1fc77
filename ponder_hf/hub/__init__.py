"""The Hub: what of a folder is pushed, the model card, what a checkpoint is, and what its code is.

| file | what is in it |
| --- | --- |
| `push.py`, `push_contents.py` | push a checkpoint or a model; which files belong there, and which must not go |
| `card.py`, `card.md` | the model card: its facts, its text, and how a person's edits are kept |
| `trainer_uploads.py` | what a Trainer leaves on the Hub |
| `inspection.py` | what a checkpoint is, without its weights |
| `code.py`, `releases.json` | whether the code in a checkpoint is a release's |
"""

from .code import inspect_code
from .inspection import inspect_checkpoint
from .push import push, push_model
from .trainer_uploads import CodeOnPush


__all__ = ["CodeOnPush", "inspect_checkpoint", "inspect_code", "push", "push_model"]
