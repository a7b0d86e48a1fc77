"""Which device a model runs on: the one that is asked for, or the best that is there."""

from typing import Any

import torch

from .modeling import PonderingError


def default_device() -> torch.device:
    """The accelerator of this machine (CUDA, MPS, XPU, ...), or the CPU where there is none."""
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None and hasattr(accelerator, "current_accelerator"):
        found = accelerator.current_accelerator() if accelerator.is_available() else None
        return torch.device("cpu") if found is None else torch.device(found.type)
    for name in ("cuda", "xpu", "mps"):  # torch before 2.6
        module = getattr(torch, name, None)
        if module is not None and hasattr(module, "is_available") and module.is_available():
            return torch.device(name)
    return torch.device("cpu")


def read_device(name: str | torch.device | None = None) -> torch.device:
    """The device that `name` means, such as "cpu", "cuda" or "cuda:1"; None: the default.

    Raises:
        PonderingError: torch knows no such device, or it is not here.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.ones(1, device=device).add(1).cpu()  # a device may be known and still not be there
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PonderingError(
            f"the device {name!r} cannot be used ({reason[0].rstrip('.')}): this machine has {_found()}"
        ) from error
    return device


def training_device(name: str | torch.device | None = None) -> torch.device:
    """As read_device, of the devices that Trainer trains on: the CPU and the first accelerator.

    Raises:
        PonderingError: it is none of these.
    """
    device = read_device(name)
    if device.index or device.type not in ("cpu", default_device().type):
        variable = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}.get(device.type)
        hint = f"set {variable}={device.index}" if device.index and variable else "leave out `device`"
        raise PonderingError(f"Trainer does not train on {name!r} but on the CPU or the first accelerator: {hint}")
    return device


def name_of(device: torch.device) -> str:
    """The device's name as its maker gives it, where torch tells; otherwise its type."""
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "get_device_name"):
        return module.get_device_name(device)
    return device.type


def _found():
    device = default_device()
    if device.type == "cpu":
        return "cpu"
    module = getattr(torch, device.type)
    count = module.device_count() if hasattr(module, "device_count") else 1
    return f"cpu and {device.type}" + (f":0 .. {device.type}:{count - 1}" if count > 1 else "")
