"""Memory of evaluating all passes: the peak beyond the model, for one row of many tokens and a large vocabulary.

    python -m benchmarks evaluation_memory

"forward" is the model's own forward pass with the logits of all passes, for comparison.
"""

import sys

from benchmarks.peak_memory import print_peaks
from ponder_hf import measure_passes


WAYS = {
    "measure_passes": measure_passes,
    "with entropies": lambda model, ids: measure_passes(model, ids, entropies=True),
    "forward": lambda model, ids: model(ids, labels=ids, output_pondering=True, use_cache=False),
}


def main(argv=None):
    """Print one row for each way."""
    return print_peaks("evaluation_memory", __doc__.splitlines()[0], WAYS, argv, tokens=2048, vocab_size=152_000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
