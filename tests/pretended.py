"""GPUs that are not there: tensors that say they lie on one, compute on the CPU, and refuse to meet those of another.

`Pretended` reports the device "pretend:0", "pretend:1", ... and holds its numbers on the CPU, so whatever code asks
of a device (where to put a new tensor, whether it is a CPU) is answered as a GPU would answer it. Within `Watch`,
an operation on tensors of different devices is an error, as on GPUs, and what makes the host wait is counted.

Registering the device changes what torch finds on this machine, so this is imported in processes of its own only.
"""

import collections

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    def device_count(self):
        return 2

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
torch.inference_mode = torch.no_grad  # in which such tensors have no views
torch.autograd.set_multithreading_enabled(False)  # torch has no threads for devices that are not there

_COPIES = {"aten::_to_copy", "aten::copy_", "aten::to"}
# What GPUs have no kernel for in bfloat16.
_NOT_IN_BFLOAT16 = {"aten::_embedding_bag_per_sample_weights_backward"}
# Every one of them waits until the device has caught up.
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}


class Pretended(torch.Tensor):
    """A tensor on a device that is not there. numbers: what it holds, on the CPU."""

    @staticmethod
    def __new__(cls, numbers, device, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=device,
            requires_grad=requires_grad,
        )

    def __init__(self, numbers, device, requires_grad=False):
        self.numbers = numbers

    def __repr__(self):
        return f"Pretended({self.numbers!r}, {self.device})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.tolist:  # which torch does not let subclasses have
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():  # results on the CPU are tensors like any other
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {}, None)


class Watch(TorchDispatchMode):
    """Within it, new tensors lie where they are asked for. waits, uploads: {operation: how often}.

    waits: what makes the host wait for the device. uploads: copies from the CPU to a device.
    """

    # torch then does not start the device up.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self):
        super().__init__()
        self.waits, self.uploads = collections.Counter(), collections.Counter()

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) then goes through here, too
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {}, self)


def _run(function, args, kwargs, watch):
    name = function._schema.name
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    if name in _NOT_IN_BFLOAT16 and pretended and pretended[0].dtype == torch.bfloat16:
        raise NotImplementedError(f"{name} is not implemented for bfloat16 on GPUs")
    asked = kwargs.get("device")
    is_copy = name in _COPIES
    if not is_copy:
        _check_devices(name, tensors, pretended)
    if asked is not None:
        target = torch.device(asked)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "aten::copy_":
        target = args[0].device
    else:
        target = pretended[0].device if pretended else torch.device("cpu")
    if watch is not None:
        _count(watch, name, function, args, tensors, pretended, target, is_copy)
    inner_args, inner_kwargs = tree_map(
        lambda value: value.numbers if isinstance(value, Pretended) else value, (args, kwargs)
    )
    if name == "aten::_to_copy" and pretended and target.type == "cpu":
        return function(*inner_args, **inner_kwargs).clone()
    out = function(*inner_args, **inner_kwargs)
    if target.type != "pretend":
        return out
    if target.index is None:
        target = torch.device("pretend:0")
    out = tree_map(lambda value: Pretended(value, target) if isinstance(value, torch.Tensor) else value, out)
    if (is_copy and name != "aten::copy_") or not pretended:
        return out
    return return_and_correct_aliasing(function, args, kwargs, out)


def _check_devices(name, tensors, pretended):
    devices = {str(tensor.device) for tensor in pretended}
    if pretended and not name.startswith(("aten::index", "aten::_index_put")):  # which take indices from the CPU
        devices |= {"cpu" for tensor in tensors if not isinstance(tensor, Pretended) and tensor.ndim}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {sorted(devices)}")


def _count(watch, name, function, args, tensors, pretended, target, is_copy):
    if is_copy and pretended and target.type == "cpu":
        watch.waits["copy to the CPU"] += 1
    elif is_copy and target.type == "pretend" and any(not isinstance(tensor, Pretended) for tensor in tensors):
        watch.uploads[name] += 1
    elif pretended and name in _WAITS:
        watch.waits[name] += 1
    elif name in ("aten::index", "aten::index_put_", "aten::index_put") and pretended:
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
        watch.waits["index by a mask"] += len(masks)
        uploads = [i for i in args[1] if i is not None and not isinstance(i, Pretended)]
        watch.uploads["index"] += len(uploads)


def put(module, device):
    """Move a module's own parameters and buffers, and its children's, to a pretended device; in place."""
    for part in module.modules():
        for tensors, wrap in ((part._parameters, nn.Parameter), (part._buffers, lambda tensor: tensor)):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, Pretended):
                    moved = Pretended(tensor.detach(), torch.device(device))
                    tensors[name] = wrap(moved) if wrap is nn.Parameter else moved
    return module
