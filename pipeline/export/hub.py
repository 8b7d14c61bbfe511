"""A finished folder as a repository of the hub: what would go there, and sending it."""

import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from pipeline.errors import StillroomError


def list_upload(folder: Path) -> Mapping[str, int]:
    """What would be sent: path inside the repository -> bytes, in order of the paths."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def check_repository(name: str) -> None:
    """Refuse what can be no name of a repository, before any work.

    Raises:
        StillroomError: it is none.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise StillroomError(f"--push {name}: {str(error).splitlines()[0]}") from error


def push(folder: Path, name: str, private: bool = False) -> str:
    """Create the repository where there is none, send the folder, and return its address.

    The token is the one of `hf auth login` or of the environment.

    Raises:
        StillroomError: no network, no token or no right to write there; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload by Stillroom"
        )
    except (HTTPError, OSError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise StillroomError(
            f"--push {name}: {reason}; {folder} stands, send it with"
            f" `hf upload {name} {os.fspath(folder)}` once `hf auth login` works"
        ) from error
    return str(commit.repo_url)
