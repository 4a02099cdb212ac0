"""A checkpoint's folder from a path or from a repository id of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Nothing that could hold code or a pickle.
ALLOWED_FILES = ("*.safetensors", "*.json", "*.model", "*.txt")

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def resolve_path(
    path_or_repo_id: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of a checkpoint.

    An existing folder is returned as it is. Otherwise a string of the form "org/name" is
    downloaded through huggingface_hub (extra `hub`) into its cache, ALLOWED_FILES only, from
    `endpoint` or the library's default. Raises OSError for a file, for what is not found and for
    a download that fails, ImportError where the extra is not installed, TypeError for what is
    neither a string nor a path.
    """
    if not isinstance(path_or_repo_id, (str, os.PathLike)):
        kind = type(path_or_repo_id).__name__
        raise TypeError(f"path_or_repo_id is {kind}, expected a path or an 'org/name' id")
    path = Path(path_or_repo_id)
    if path.is_dir() and path_or_repo_id != "":  # "" would be the current folder
        return path
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file, expected a checkpoint folder")
    if not isinstance(path_or_repo_id, str) or not _REPO_ID.fullmatch(path_or_repo_id):
        name = repr(os.fspath(path_or_repo_id))
        raise FileNotFoundError(f"{name}: no such folder, and not an 'org/name' id")
    return _download(path_or_repo_id, endpoint, revision, cache_dir)


def _download(
    repo_id: str, endpoint: str | None, revision: str | None, cache_dir: str | Path | None
) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ImportError(
            f"{repo_id} is no folder; to download it: pip install 'internvl-rt[hub]'"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            endpoint=endpoint,
            cache_dir=cache_dir,
            allow_patterns=list(ALLOWED_FILES),
        )
    except errors.GatedRepoError:
        raise PermissionError(f"{repo_id}: access to this repository must be asked for") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(f"{repo_id}: no such folder or repository") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{repo_id}: no revision {revision!r}") from None
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(f"{repo_id}: the download failed: {reason[0][:200]}") from None
    return Path(folder)
