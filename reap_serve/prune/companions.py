"""What lies beside a checkpoint's weights: which files go along unchanged, and which stay behind and are named."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from reap_serve.errors import InputFileError
from reap_serve.prune.checkpoint import WEIGHT_SUFFIXES, require_inside
from reap_serve.weight_headers import Tensor, read_shard

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_PREFIX = "adapter_"
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True, slots=True)
class Companions:
    """The files beside the weights, as paths below the checkpoint.

    Attributes:
        carried: Go along unchanged: tokenizer, templates, licences, remote code, weights in folders of their own.
        left_out: Weights that no loader of this checkpoint reads or that hold experts, and adapters of the base.
    """

    carried: tuple[str, ...]
    left_out: tuple[str, ...]

    def leaving_out(self, relative: str) -> Companions:
        """The same, with a file that is not carried either."""
        return Companions(tuple(each for each in self.carried if each != relative), (*self.left_out, relative))


def companions(
    directory: Path, rewritten: Collection[str], shards: Collection[str], depends: Callable[[Tensor], bool]
) -> Companions:
    """Sorts the files beside the weights. Hidden files and indices of weights are neither carried nor named.

    Args:
        directory: The checkpoint.
        rewritten: Files that the output has anew.
        shards: Names of the weight files that are cut.
        depends: Whether a tensor depends on the experts.

    Raises:
        InputFileError: One is a link out of the checkpoint.
    """
    carried: list[str] = []
    left_out: list[str] = []
    for folder, names in _folders(directory):
        is_top = folder == directory
        has_adapter = ADAPTER_CONFIG in names
        weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
        holds_experts = not is_top and any(_holds(folder / name, depends) for name in weights)
        for name in names:
            path = folder / name
            relative = path.relative_to(directory).as_posix()
            is_weight = name in weights
            if relative in rewritten or (is_top and (relative in shards or name.endswith(INDEX_SUFFIX))):
                continue
            is_adapter = has_adapter and (not is_top or name.startswith(ADAPTER_PREFIX))
            is_copy = is_weight and is_top
            if is_adapter or is_copy or (holds_experts and (is_weight or name.endswith(INDEX_SUFFIX))):
                left_out.append(relative)
            else:
                require_inside(directory, path)
                carried.append(relative)
    return Companions(tuple(carried), tuple(left_out))


def _folders(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__pycache__")))
        yield Path(folder), sorted(name for name in files if not name.startswith("."))


def _holds(path: Path, depends: Callable[[Tensor], bool]) -> bool:
    """Whether a weight file in a folder holds experts, or may: only safetensors says what it holds."""
    if path.suffix != ".safetensors":
        return True
    try:
        return any(depends(tensor) for tensor in read_shard(path).tensors)
    except InputFileError:
        return True
