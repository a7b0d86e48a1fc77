"""From files and data sets to blocks of token ids."""
