"""The result on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainingArguments


def push_folder(
    folder: Path, args: TrainingArguments, repo_id: str | None, private: bool | None, token: str | None
) -> str:
    """
    Upload a folder to a model repository, which is made if it is not there.

    Args:
        folder (`Path`): What to upload.
        args (`TrainingArguments`): Its `hub_model_id`, `hub_private_repo` and `hub_token` stand in for what is `None`.
            To the branch `hub_revision`, which is made if it is not there.
        repo_id (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*): As on the Hub.

    Returns:
        `str`: Address of the commit.

    Raises:
        ValueError: If no repository is named.
    """
    repo_id = repo_id or args.hub_model_id
    if repo_id is None:
        raise ValueError("`repo_id` is None and `hub_model_id` is not set, so there is nowhere to push to.")
    api = HfApi(token=token or args.hub_token)
    private = args.hub_private_repo if private is None else private
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if args.hub_revision is not None:
        api.create_branch(repo_id, branch=args.hub_revision, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=args.hub_revision))
