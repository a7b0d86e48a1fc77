"""The dtype of a checkpoint's weights: what is stored, not what config.json says."""

from functools import reduce

import torch

from ponder_hf import PonderingError


# safetensors' names of the floating-point dtypes that a plain checkpoint is made of.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(source, unused=()):
    """The dtype to load `source` in so that no weight loses anything: the widest of those that are stored.

    Args:
        source: a Source.
        unused: names of stored tensors that are no weights of the model, such as the mask buffers of old checkpoints.

    Raises:
        PonderingError: the weights are quantised, or none is a floating-point number.
    """
    used = {name: tensor for name, tensor in source.tensors.items() if name not in unused}
    for name, tensor in used.items():
        if tensor.dtype.startswith(("F8", "F4", "F6")):
            raise PonderingError(
                f"{source.name} is quantised ({name} is stored as {tensor.dtype}): use the full-precision checkpoint"
            )
    dtypes = {FLOATING[tensor.dtype] for tensor in used.values() if tensor.dtype in FLOATING}
    if not dtypes:
        raise PonderingError(f"{source.name} holds no floating-point weights: it is not a language model's checkpoint")
    return reduce(torch.promote_types, dtypes)
