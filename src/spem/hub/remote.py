"""The Hugging Face hub, through its own client: fetching a folder, sending one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from spem.extras import require


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Weights, config and card written by spem",
    **describing: Any,
) -> str:
    """Writes a network as `save_pretrained` does and sends the folder to the hub.

    Args:
        model: The network.
        repo_id: Of the repository, ``owner/name``; it is made if it is not there.
        private: Whether a new repository is private; None is the owner's default.
        token: A token that may write; None takes that of `hf auth login`.
        revision: The branch; None is the main one.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Of the commit.
        describing: ``results``, ``arch``, ``options``, ``images``, ``classes`` and ``license`` of
            `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: As for `save_pretrained`, or ``repo_id`` is no id.
        OSError: The hub refuses, or cannot be reached.
        ImportError: huggingface_hub is not installed.
    """
    from spem.hub.folder import save_pretrained

    check_id(repo_id, "push_to_hub")
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, repo_id=repo_id, **describing)
        return push_folder(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Weights, config and card written by spem",
) -> str:
    """Sends what `save_pretrained` wrote into a folder; other files in it stay here.

    Returns:
        The address of the commit.

    Raises:
        ValueError: ``repo_id`` is no id.
        OSError: The hub refuses, or cannot be reached.
        ImportError: huggingface_hub is not installed.
    """
    from spem.hub.folder import CARD, CONFIG, WEIGHTS

    check_id(repo_id, "push_to_hub")
    hub = require("huggingface_hub", extra="hub", purpose="push_to_hub")
    api = hub.HfApi(token=token, library_name="spem")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            allow_patterns=[CARD, CONFIG, WEIGHTS],
        )
    except _refusals() as error:
        raise OSError(
            f"push_to_hub: cannot write to {repo_id}: {_first_line(error)} "
            f"Log in with `hf auth login`, with a token that may write there."
        ) from error
    except Exception as error:  # a transport has its own exception types
        raise OSError(f"push_to_hub: {repo_id} cannot be reached: {_first_line(error)}") from error
    return str(commit.commit_url)


def fetch(
    repo_id: str,
    files: Sequence[str],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    """The folder into which these files of a repository were fetched, and no others.

    Raises:
        FileNotFoundError: Neither a folder nor an id.
        OSError: The repository cannot be fetched.
        ImportError: huggingface_hub is not installed.
    """
    if not _is_id(repo_id):
        raise FileNotFoundError(
            f"from_pretrained: {repo_id} is neither a folder nor the id of a repository "
            f"(owner/name)."
        )
    hub = require("huggingface_hub", extra="hub", purpose="from_pretrained")
    try:
        folder = hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(files),
            library_name="spem",
        )
    except _refusals() as error:
        raise OSError(
            f"from_pretrained: there is no folder {repo_id}, and the repository of this name "
            f"cannot be fetched: {_first_line(error)}"
        ) from error
    except Exception as error:  # a transport has its own exception types
        raise OSError(
            f"from_pretrained: there is no folder {repo_id}, and the repository of this name "
            f"cannot be reached: {_first_line(error)}"
        ) from error
    return Path(folder)


def check_id(repo_id: str, asker: str) -> None:
    """Raises ValueError unless this is the id of a repository."""
    if not _is_id(repo_id):
        raise ValueError(f"{asker}: {repo_id!r} is no id of a repository. Write owner/name.")


def _is_id(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def _refusals() -> tuple[type[Exception], ...]:
    """What the client raises where it cannot do what it is asked for."""
    errors = require("huggingface_hub.errors", extra="hub", purpose="the hub")
    return (errors.HfHubHTTPError, errors.HFValidationError, OSError)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
