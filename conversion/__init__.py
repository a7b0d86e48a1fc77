"""To and from plain checkpoints and the checkpoints of the method's authors. Installed as `ponder_hf.conversion`.

| file | what is in it |
| --- | --- |
| `convert.py`, `export.py` | a pondering checkpoint from a plain one, and back |
| `checkpoint.py` | find a checkpoint, in a folder or on the Hub, and see that it is whole |
| `files.py` | the names of its files, and which go along; `read_json` |
| `stored_weights.py` | names, shapes and dtypes of its weights, none of which is read |
| `load_model.py` | the model and the tokenizer in it |
| `whole_folder.py` | write a folder whole or not at all |
"""

from .checkpoint import Checkpoint, open_checkpoint
from .convert import convert
from .export import export
from .load_model import check_tokenizer, load_pondering, load_tokenizer


__all__ = ["Checkpoint", "check_tokenizer", "convert", "export", "load_pondering", "load_tokenizer", "open_checkpoint"]
