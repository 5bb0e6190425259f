"""Folders for the Hub, by huggingface_hub's own upload."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from utils import UserError

# what the library raises of a network or a server: those of its client, and OSError offline
FAILURES = (HTTPError, OSError, RuntimeError, ValueError)


def check_upload(repo: str, send: bool) -> None:
    """Raise UserError, before anything is computed, where the name cannot be one of the Hub or,
    with send, nothing could be sent to it."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--upload: {repo}: {_line(error)}") from None
    if "/" not in repo:
        raise UserError(f"--upload: {repo} is no name of a repository; give OWNER/NAME")
    if not send:
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError("--upload: HF_HUB_OFFLINE is set; unset it, or take --dry-run")
    if get_token() is None:
        raise UserError(
            "--upload: no token of the Hub; log in by `hf auth login` or set HF_TOKEN (--dry-run "
            "needs none)"
        )
    try:
        HfApi().whoami()
    except FAILURES as error:
        raise UserError(f"--upload: {constants.ENDPOINT}: {_line(error)}") from None


def list_files(folder: Path, repo: str) -> str:
    """What an upload would send, a line for each file with its bytes."""
    sizes = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    lines = [f"{size:>15,}  {name}" for name, size in sizes.items()]
    total = f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files for {repo}; nothing is sent"
    return "\n".join([*lines, total])


def upload(folder: Path, repo: str) -> str:
    """Send a folder; the address of the repository, which is private where it is new. Raises
    UserError."""
    api = HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except FAILURES as error:
        raise UserError(f"--upload: {repo}: {_line(error)}; the folder is {folder}") from None
    return str(url)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
