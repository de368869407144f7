"""The result on the Hugging Face Hub."""

import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainingArguments


ADAPTER_CONFIG = "adapter_config.json"


def push_folder(
    folder: Path, args: TrainingArguments, repo_id: str | None, private: bool | None, token: str | None
) -> str:
    """
    Upload a PEFT folder to a model repository, which is made if it is not there. A base model that is a folder of this machine
    is not named in it: nobody else has it there.

    Args:
        folder (`Path`): What to upload.
        args, repo_id, private, token: As for [`make_repository`].

    Returns:
        `str`: Address of the commit.
    """
    api, repo_id = make_repository(args, repo_id, private, token)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(folder, Path(place, folder.name)))
        config = json.loads((copy / ADAPTER_CONFIG).read_text())
        if Path(config["base_model_name_or_path"] or "").is_dir():
            config["base_model_name_or_path"] = None
            (copy / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))
        return str(api.upload_folder(repo_id=repo_id, folder_path=copy, revision=args.hub_revision))


def make_repository(
    args: TrainingArguments, repo_id: str | None = None, private: bool | None = None, token: str | None = None
) -> tuple[HfApi, str]:
    """
    Make a model repository, if it is not there. A run that will push does it first, to fail now where it cannot.

    Args:
        args (`TrainingArguments`): Its `hub_model_id`, or else the name of its `output_dir`, `hub_private_repo` and
            `hub_token` stand in for what is `None`. Its branch `hub_revision` is made as well.
        repo_id (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*): As on the Hub.

    Returns:
        `tuple[HfApi, str]`: What to upload with, and the repository's full name.
    """
    api = HfApi(token=token or args.hub_token)
    private = args.hub_private_repo if private is None else private
    name = repo_id or args.hub_model_id or Path(args.output_dir or "").absolute().name
    repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
    if args.hub_revision is not None:
        api.create_branch(repo_id, branch=args.hub_revision, exist_ok=True)
    return api, repo_id
