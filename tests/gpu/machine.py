"""The device that is measured: its name, its clock, its memory."""

import datetime
import statistics
import time
import warnings

import torch
import transformers

from ponder_hf.devices import name_of


def described(device):
    """One cell of a table: the device, versions, the date."""
    return f"{name_of(device)}, torch {torch.__version__}, transformers {transformers.__version__}, {today()}"


def today():
    return str(datetime.date.today())


def synchronise(device):
    """Wait until the device has done what it was given."""
    if device.type == "cpu":
        return
    if hasattr(torch, "accelerator") and hasattr(torch.accelerator, "synchronize"):
        torch.accelerator.synchronize()
    else:
        getattr(torch, device.type).synchronize()


def forget_memory(device):
    """Give cached memory back, and begin the peak anew."""
    module = getattr(torch, device.type, None)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        if device.type != "cpu" and hasattr(module, name):
            getattr(module, name)()


def peak_memory(device):
    """Peak memory in GB since it was last forgotten; None where torch does not tell."""
    module = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "max_memory_allocated"):
        return None
    return module.max_memory_allocated() / 1e9


def seconds(function, device, rounds, warm_up=1):
    """The median time of a call; the first ones warm up."""
    times = []
    for index in range(warm_up + rounds):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        if index >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def seed(number=0):
    """Begin the same random numbers again, on every device."""
    torch.manual_seed(number)


def count_waits(function):
    """How often a call makes the host wait for CUDA, as far as torch notices."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught)
