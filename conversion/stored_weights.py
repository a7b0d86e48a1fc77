"""What the safetensors files of a checkpoint say about themselves: names, shapes and dtypes; and whether it is NaN."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import TensorInfo
from safetensors import SafetensorError, safe_open

from ponder_hf.errors import first_line, reading
from ponder_hf.modeling import PonderingError

from .files import ADAPTER_CONFIG, read_json


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# safetensors' names of the floating-point dtypes that a plain checkpoint is made of.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {stored: str(dtype).removeprefix("torch.") for stored, dtype in FLOATING.items()}

_LFS_POINTER = b"version https://git-lfs"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Map each tensor's name in one safetensors file to huggingface_hub's TensorInfo.

    Raises:
        PonderingError: the file is truncated, or not a safetensors file at all.
    """
    with reading(path):
        with open(path, "rb") as file:
            start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise PonderingError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
        if start[8:9] != b"{":  # behind the eight bytes with its length, the header is a JSON object
            raise PonderingError(f"{path} is not a safetensors file: get it again, or convert it to safetensors")
        try:
            with safe_open(path, framework="pt"):  # the Hub's client does not look at the data's offsets
                return parse_local_safetensors_file_metadata(path).tensors
        except SafetensorError as error:
            problem = _damage(path, 8 + int.from_bytes(start[:8], "little")) or f"is damaged: {first_line(error)}"
            raise PonderingError(f"{path} {problem}; get it again") from error


def _damage(path: Path, end_of_header: int) -> str | None:
    """How the length of a safetensors file is wrong, or None where something else is."""
    size = path.stat().st_size
    if size < end_of_header:
        return f"is truncated: it has {size:,} bytes and ends within its header"
    with suppress(
        SafetensorsParsingError, TypeError, ValueError, LookupError, AttributeError
    ):  # the header is anything
        tensors = parse_local_safetensors_file_metadata(path).tensors
        expected = end_of_header + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
        if size != expected:
            problem = "is truncated" if size < expected else "has bytes that belong to no weight"
            return f"{problem}: it has {size:,} bytes where its header says {expected:,}"
    return None


def shard_names(folder: Path) -> list[str] | None:
    """The names of the files that hold the weights of the checkpoint in `folder`, or None if it has none."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        return None
    return sorted(set(_weight_map(folder).values()))


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    valid = isinstance(weight_map, dict) and all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        for name in weight_map.values()
    )
    if not weight_map or not valid:
        raise PonderingError(f"{folder / INDEX} does not map weights to safetensors files beside it: get it again")
    return weight_map


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Map the name of every weight in the checkpoint in `folder` to huggingface_hub's TensorInfo.

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


def warnings_of_nan(source: str, weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """A line that names the first weight which holds NaN, or none. Minus infinity may be meant: it forbids a token.

    Args:
        source: what the message calls the checkpoint.
        weights: names and tensors; each is read once, and nothing of its size is made.
    """
    names = [name for name, tensor in weights if tensor.is_floating_point() and tensor.numel() and _has_nan(tensor)]
    if not names:
        return []
    more = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
    return [f"{source} holds NaN in {names[0]}{more}, so the model predicts nothing: get its weights again"]


def _has_nan(tensor: torch.Tensor) -> bool:
    return bool(tensor.max().isnan())


def stored_weights(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and tensors in these safetensors files, one after another, but those of dtypes that cannot be NaN."""
    for name in names:
        with reading(folder / name), safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                if file.get_slice(key).get_dtype() in FLOATING:
                    yield key, file.get_tensor(key)


def num_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """What the tensors take in their files."""
    return sum(end - start for start, end in (tensor.data_offsets for tensor in tensors.values()))


def stored_dtype(
    source: str, tensors: Mapping[str, TensorInfo], unused: Collection[str] = (), is_quantised: bool = False
) -> torch.dtype:
    """The dtype to load a checkpoint in so that no weight loses anything: the widest of those that are stored.

    What config.json says does not count.

    Args:
        source: what messages call the checkpoint.
        tensors: as read_headers gives them.
        unused: names of stored tensors that are no weights of the model, such as the mask buffers of old checkpoints.
        is_quantised: the configuration says so, and some weights may be integers.

    Raises:
        PonderingError: the weights are quantised, or one is no floating-point number.
    """
    used = {name: tensor for name, tensor in tensors.items() if name not in unused}
    for name, tensor in used.items():
        if tensor.dtype.startswith(("F8", "F4", "F6")):
            raise PonderingError(
                f"{source} is quantised ({name} is stored as {tensor.dtype}): use the full-precision checkpoint"
            )
    dtypes = {FLOATING[tensor.dtype] for tensor in used.values() if tensor.dtype in FLOATING}
    if not dtypes:
        raise PonderingError(f"{source} holds no floating-point weights: it is not a language model's checkpoint")
    for name, tensor in used.items():
        if (
            tensor.dtype not in FLOATING and not is_quantised
        ):  # loading would make floating-point numbers of them without a word
            raise PonderingError(
                f"{source} has {name} stored as {tensor.dtype}, which is no floating-point number: get it again"
            )
    return reduce(torch.promote_types, dtypes)


# Rewrites pickled weights as safetensors beside them, every tensor, and runs no code of theirs.
_MAKE_SAFETENSORS = (
    "import glob, torch, huggingface_hub as h; {place}; h.save_torch_state_dict({{k: v for f in "
    "glob.glob(F + '/{pickles}') for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}}, F)"
)


def no_weights(source: str, names: Collection[str], place: str) -> str:
    """What to say of a checkpoint without safetensors files.

    Args:
        source: what the message calls it. names: of its files.
        place: a line of Python that names its folder, with h for huggingface_hub: "F=..."
    """
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    weights = [name for name in pickles if name.startswith("pytorch_model")]
    others = [name for name in names if name.endswith(".safetensors")]
    if ADAPTER_CONFIG in names:
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
