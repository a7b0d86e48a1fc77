"""From files and data sets to blocks of token ids."""

from .blocks import Blocks, StreamedBlocks, check_apart, load_blocks, split_held_out


__all__ = ["Blocks", "StreamedBlocks", "check_apart", "load_blocks", "split_held_out"]
