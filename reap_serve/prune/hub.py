"""A model on the hub, read file by file: headers by range, weights one shard at a time."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Protocol

from reap_serve.errors import ExecutionError, InputFileError
from reap_serve.prune.checkpoint import WEIGHT_SUFFIXES


class RemoteFiles(Protocol):
    """The files of a model that is not on this disk."""

    revision: str

    def weight_files(self) -> dict[str, int]:
        """Size of every .safetensors file at the top, by name."""

    def open(self, file: str) -> BinaryIO:
        """A file to read here and there; only what is read is transferred."""

    def download(self, file: str, folder: Path) -> Path:
        """A whole file on this disk."""

    def download_rest(self) -> Path:
        """A directory with every file but the weights."""


class HubRepository:
    """A repository on the hub, pinned to the commit that its revision names now.

    Args:
        reference: `org/name[@revision]`.

    Raises:
        InputFileError: There is no such repository.
        ExecutionError: The hub could not be reached.
    """

    def __init__(self, reference: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

        self._name, _, revision = reference.partition("@")
        try:
            info = HfApi().model_info(self._name, revision=revision or None, files_metadata=True)
        except (RepositoryNotFoundError, HFValidationError):
            raise InputFileError(f"model {self._name} is not on the hub", "check the name") from None
        except (HfHubHTTPError, OSError) as error:
            raise _unreachable(self._name, error) from None
        self.revision: str = info.sha
        self._sizes = {file.rfilename: int(file.size or 0) for file in info.siblings}

    def weight_files(self) -> dict[str, int]:
        """Size of every .safetensors file at the top, by name."""
        names = sorted(name for name in self._sizes if name.endswith(".safetensors") and "/" not in name)
        return {name: self._sizes[name] for name in names}

    def open(self, file: str) -> BinaryIO:
        """A file to read here and there; only what is read is transferred."""
        from huggingface_hub import HfFileSystem

        handle: BinaryIO = HfFileSystem().open(f"{self._name}@{self.revision}/{file}", "rb", block_size=1 << 20)
        return handle

    def download(self, file: str, folder: Path) -> Path:
        """A whole file on this disk."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(hf_hub_download(self._name, file, revision=self.revision, local_dir=folder))
        except (HfHubHTTPError, OSError) as error:
            raise _unreachable(f"{self._name}/{file}", error) from None

    def download_rest(self) -> Path:
        """A directory with every file but the weights."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        weights = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]
        try:
            return Path(snapshot_download(self._name, revision=self.revision, ignore_patterns=weights))
        except (HfHubHTTPError, OSError) as error:
            raise _unreachable(self._name, error) from None


def _unreachable(what: str, error: Exception) -> ExecutionError:
    return ExecutionError(
        f"{what} could not be downloaded: {str(error).splitlines()[0]}", "check the network; finished files are kept"
    )


def push(directory: Path, repository: str) -> str:
    """Uploads a checkpoint to the hub, to a private repository when it is new.

    Returns:
        The address of the commit.

    Raises:
        ExecutionError: The hub refused or could not be reached; the directory is untouched.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload a checkpoint pruned by reap-serve"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ExecutionError(
            f"{directory} was not uploaded to {repository}: {str(error).splitlines()[0]}",
            "log in with `hf auth login`, then upload the directory",
        ) from None
    return str(commit)
