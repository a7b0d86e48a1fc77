"""To and from plain checkpoints and the checkpoints of the method's authors. Installed as `ponder_hf.conversion`."""

from .convert import convert
from .export import export
from .loading import load_pondering
from .source import Source, open_source
from .tokenizer import check_tokenizer, load_tokenizer


__all__ = ["Source", "check_tokenizer", "convert", "export", "load_pondering", "load_tokenizer", "open_source"]
