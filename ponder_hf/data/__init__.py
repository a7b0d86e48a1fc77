"""From files and data sets to blocks of token ids."""

from .blocks import check_apart, load_blocks, split_held_out
from .packing import Blocks
from .stream import StreamedBlocks


__all__ = ["Blocks", "StreamedBlocks", "check_apart", "load_blocks", "split_held_out"]
