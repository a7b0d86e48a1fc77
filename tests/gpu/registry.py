"""The list of checks, and how one of them is run."""

import time
import traceback
from dataclasses import dataclass

import torch

from .machine import forget_memory, seed, synchronise


CHECKS = {}  # by name: (function, dtypes)
BOTH = (torch.float32, torch.bfloat16)


class LeftOut(Exception):
    """This check cannot be made here; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where a check runs. is_tiny: only to see that the check itself works, on whatever device."""

    device: torch.device
    dtype: torch.dtype
    is_tiny: bool = False

    @property
    def tolerance(self):
        """How far results may be apart, over the norm of what is right."""
        return 2e-4 if self.dtype == torch.float32 else 5e-2

    def close(self, found, expected, factor=1.0):
        """Raise unless two tensors, wherever they lie, are the same up to rounding."""
        assert found.shape == expected.shape, f"shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        found, expected = (tensor.detach().cpu().double() for tensor in (found, expected))
        error = (found - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error <= factor * self.tolerance, f"off by {error:.1e} of its norm"


def check(*dtypes):
    """Register a function of a Place as a check, of one or of both data types."""

    def register(function):
        CHECKS[function.__name__.replace("_", " ")] = (function, dtypes or BOTH)
        return function

    return register


def all_checks():
    """Names as `check, dtype`, in order."""
    from . import checks, generation_checks  # noqa: F401 (they register themselves)

    return [f"{name}, {str(dtype)[6:]}" for name, (_, dtypes) in CHECKS.items() for dtype in dtypes]


def run_check(name, device, is_tiny):
    """Run one check. Returns (a row: name, outcome, detail, seconds; whether the device still works)."""
    name, _, dtype = name.rpartition(", ")
    place = Place(device, getattr(torch, dtype), is_tiny)
    row = {"check": name, "dtype": dtype, "outcome": "ok", "detail": ""}
    start = time.perf_counter()
    seed()
    try:
        row["detail"] = CHECKS[name][0](place) or ""
        synchronise(device)
    except LeftOut as reason:
        row |= {"outcome": "left out", "detail": str(reason)}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        row |= {"outcome": "FAILED", "detail": f"{type(error).__name__} at {where}: {lines[0]}"[:600]}
        row["traceback"] = traceback.format_exc()
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row, _still_works(device)


def _still_works(device):
    # After an assertion within a kernel every further call fails, in this process.
    try:
        forget_memory(device)
        synchronise(device)
        return bool(torch.ones(1, device=device).sum().item() == 1)
    except RuntimeError:
        return False
