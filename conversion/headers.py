"""Read what a checkpoint's safetensors files say about themselves, without reading any weight.

A file is 8 bytes with the length of the header, the header (JSON: name to dtype, shape and data offsets), then data.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ponder_hf import PonderingError
from ponder_hf.errors import first_line, reading


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """dtype as safetensors writes it ("BF16"), shape, and the bytes that the tensor takes in the file."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_header(path):
    """Map each tensor's name in one safetensors file to a StoredTensor.

    Raises:
        PonderingError: the file is truncated, or not a safetensors file at all.
    """
    with reading(path), open(path, "rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        if _LFS_POINTER.startswith(start) and file.read(len(_LFS_POINTER) - 8) == _LFS_POINTER[8:]:
            raise PonderingError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= _MAX_HEADER or file.read(1) not in (b"{", b""):
            raise PonderingError(f"{path} is not a safetensors file: get it again, or convert it to safetensors")
        if length > size - 8:
            raise PonderingError(
                f"{path} is truncated: it has {size:,} bytes and ends within its header; get it again"
            )
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header)
        tensors, end = _parse(entries)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PonderingError(f"{path} is not a safetensors file: its header cannot be read; get it again") from error
    expected = 8 + length + end
    if size != expected:
        problem = "is truncated" if size < expected else "has bytes that belong to no weight"
        raise PonderingError(
            f"{path} {problem}: it has {size:,} bytes where its header says {expected:,}; get it again"
        )
    return tensors


def _parse(entries):
    tensors, end = {}, 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), last - first)
        end = max(end, last)
    return tensors, end


def read_json(path):
    """The JSON object in a file.

    Raises:
        PonderingError: the file cannot be read, or holds something else.
    """
    with reading(path):
        text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise PonderingError(f"{path} is not valid JSON ({first_line(error)}): get it again") from error
    if not isinstance(content, dict):
        raise PonderingError(f"{path} does not hold a JSON object: get it again")
    return content


def shard_names(folder):
    """The names of the files that hold the weights of the checkpoint in `folder`, or None if it has none."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        return None
    return sorted(set(_weight_map(folder).values()))


def _weight_map(folder):
    weight_map = read_json(folder / INDEX).get("weight_map")
    valid = isinstance(weight_map, dict) and all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        for name in weight_map.values()
    )
    if not weight_map or not valid:
        raise PonderingError(f"{folder / INDEX} does not map weights to safetensors files beside it: get it again")
    return weight_map


def read_headers(folder):
    """Map the name of every weight in the checkpoint in `folder` to a StoredTensor.

    Raises:
        PonderingError: weights are missing, unreadable, truncated, pickled, or not where the index says.
    """
    names = shard_names(folder)
    if names is None:
        names = sorted(path.name for path in folder.iterdir())
        raise PonderingError(no_weights(str(folder), names, f"F={str(folder)!r}"))
    tensors = {}
    for name in names:
        if not (folder / name).is_file():
            raise PonderingError(f"{folder} lacks {name}, which {INDEX} names: get that file again under that name")
        tensors.update(read_header(folder / name))
    if names != [WEIGHTS]:
        lost = sorted(set(_weight_map(folder)) - set(tensors))
        if lost:
            raise PonderingError(
                f"{folder / INDEX} names the weight {lost[0]}, which no file has: get the shards again"
            )
    return tensors


# Rewrites pickled weights as safetensors beside them, every tensor, and runs no code of theirs.
_MAKE_SAFETENSORS = (
    "import glob, torch, huggingface_hub as h; {place}; h.save_torch_state_dict({{k: v for f in "
    "glob.glob(F + '/{pickles}') for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}}, F)"
)


def no_weights(source, names, place):
    """What to say of a checkpoint without safetensors files.

    Args:
        source: what the message calls it. names: of its files.
        place: a line of Python that names its folder, with h for huggingface_hub: "F=..."
    """
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    weights = [name for name in pickles if name.startswith("pytorch_model")]
    others = [name for name in names if name.endswith(".safetensors")]
    if "adapter_config.json" in names:
        return f"{source} is a PEFT adapter: merge it into its base model and save that first"
    if others:
        return f"{source} has {others[0]} but neither {WEIGHTS} nor {INDEX}: give the file its own name back"
    if pickles:
        pattern = "pytorch_model*.bin" if weights else pickles[0]
        command = _MAKE_SAFETENSORS.format(place=place, pickles=pattern)
        return (
            f"{source} has only pickled weights ({(weights or pickles)[0]}), which are never read: convert it to "
            f'safetensors first, by python -c "{command}", and give the folder F'
        )
    return f"{source} has no weights: {WEIGHTS} or {INDEX} must lie in it"
