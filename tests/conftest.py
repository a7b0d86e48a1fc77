"""What every test relies on: a private Hugging Face home, one thread per test process, seeds, and `../shared`."""

import logging
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch


REPOSITORY = Path(__file__).resolve().parents[1]

# Set before any test module imports transformers, which reads these on import. Each test process has a home of its
# own, so that two of them never copy remote code into the same folder and nothing lands in the user's home.
HUGGING_FACE_HOME = tempfile.mkdtemp(prefix="ponder-hf-tests-")
os.environ.update(
    HF_HOME=HUGGING_FACE_HOME,
    HF_HUB_CACHE=os.path.join(HUGGING_FACE_HOME, "hub"),
    HF_MODULES_CACHE=os.path.join(HUGGING_FACE_HOME, "modules"),
    HF_DATASETS_CACHE=os.path.join(HUGGING_FACE_HOME, "datasets"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    MPLCONFIGDIR=os.path.join(HUGGING_FACE_HOME, "matplotlib"),
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several test processes share the cores. The variable also reaches the programs that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


# Tests run in the order of their files, or in one that this seed decides (`.ci/run`).
ORDER = os.environ.get("PONDER_TEST_ORDER")
# The files that take longest, which start first: otherwise one process is still at work on such a file when the others
# have nothing left. They have few tests, by which pytest-xdist would go, so the Makefile tells it not to.
LONGEST = (
    "faults wave strategies train version gpu startup examples demo train_resume harness endurance paged distributed"
).split()


class DeprecationLog(logging.Handler):
    """Collects the deprecations that transformers writes to its log instead of raising them as warnings."""

    def __init__(self):
        super().__init__(level=logging.WARNING)
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        if "deprecated" in message:
            self.messages.append(f"{record.name}: {message}")


DEPRECATION_LOG = DeprecationLog()
logging.getLogger("transformers").addHandler(DEPRECATION_LOG)


def pytest_unconfigure():
    shutil.rmtree(HUGGING_FACE_HOME, ignore_errors=True)


def pytest_report_header():
    return f"PONDER_TEST_ORDER={ORDER}" if ORDER else "tests in the order of their files, the longest first"


def pytest_collection_modifyitems(items):
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)
    if ORDER:
        shuffle(items, ORDER)
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


def shuffle(items, seed):
    """Put tests in another order, in place: files, and within each file its tests.

    Files stay together, since fixtures of a whole file are made once. Every process must come to the same order.
    """
    chance, files = random.Random(seed), {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
    names = list(files)
    chance.shuffle(names)
    for name in names:
        chance.shuffle(files[name])
    items[:] = [item for name in names for item in files[name]]


@pytest.fixture(autouse=True)
def seeds():
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_logged_deprecations(request):
    """Fail a test during which transformers logged that something it was asked for is deprecated.

    transformers logs most of these once per process, so only the first of several tests is named.
    The mark `deprecated_by_transformers` excuses a test whose deprecated call is transformers' own.
    """
    yield
    messages = DEPRECATION_LOG.messages.copy()
    DEPRECATION_LOG.messages.clear()
    if messages and request.node.get_closest_marker("deprecated_by_transformers") is None:
        pytest.fail("transformers logged a deprecation:\n" + "\n".join(messages))


@pytest.fixture
def float64_throughout(monkeypatch):
    """Backbones compute norms and softmaxes in float64 where they ask for float32.

    So results of two ways to compute the same thing differ by rounding in float64 only. It also keeps eager attention
    from turning wholly masked rows of a float64 batch into NaN.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference checkpoints, data and tokenizers beside the repository.

    The environment variable PONDER_SHARED names another place for it. `.ci/run` looks for the words
    "../shared is absent" in the reasons of skipped tests.
    """
    folder = Path(os.environ.get("PONDER_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip("../shared is absent: this test reads files there (PONDER_SHARED may name another folder)")
    return folder.resolve()
