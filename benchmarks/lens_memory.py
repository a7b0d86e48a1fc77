"""Memory of a lens: the peak beyond the model, for a text of many tokens and a large vocabulary.

    python -m benchmarks lens_memory

"forward" is the model's own forward pass with the logits of all passes, for comparison.
"""

import sys

from benchmarks.peak_memory import print_peaks
from ponder_hf.lenses import read_passes


WAYS = {
    "lens": lambda model, ids: read_passes(model, ids[0].cpu()),
    "forward": lambda model, ids: model(ids, output_pondering=True, use_cache=False),
}


def main(argv=None):
    """Print one row for each way."""
    return print_peaks("lens_memory", __doc__.splitlines()[0], WAYS, argv, tokens=2000, vocab_size=150_000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
