"""What a run leaves in `output_dir`."""

import importlib.metadata
import json
import shutil
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import HfApi

from .config import FedBiOTConfig
from .model_card import write_model_card
from .report import plot_rounds
from .server import FederatedServer
from .sharding import is_main_process


RUN_FILES = ("rounds.jsonl", "summary.json", "rounds.png", "emulator_package", "client_lora")
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


class RunFolder:
    """
    The folder of one run: `emulator_package/`, `client_lora/`, `rounds.jsonl`, `summary.json` and `rounds.png`. Every
    process has one; the main one writes.

    Args:
        args ([`FedBiOTConfig`]): Configuration.
        model_name (`str`, *optional*): The full model, by name or path, for the PEFT folder and its model card.

    Raises:
        ValueError: If the folder holds another run and `args.overwrite_output_dir` is off.
    """

    def __init__(self, args: FedBiOTConfig, model_name: str | None):
        self.args, self.model_name = args, model_name
        self.path = Path(args.output_dir)
        self.records: list[dict] = []
        left = self._left_by_another_run()
        if left and not args.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` is '{self.path}', which holds another run ({', '.join(left)}). Choose another folder, or "
                "set `overwrite_output_dir=True` to delete what that run left."
            )

    def _left_by_another_run(self) -> list[str]:
        return [name for name in RUN_FILES if (self.path / name).exists()]

    def claim(self):
        """Make the folder, and delete what an earlier run left there."""
        if not is_main_process():
            return
        for name in self._left_by_another_run():
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.path.mkdir(parents=True, exist_ok=True)

    def write_package(self, server: FederatedServer) -> int:
        """Write the emulator package and return its size in bytes."""
        return server.package().save(self.path / "emulator_package", server.processing_class)

    def save_loras(self, server: FederatedServer):
        """Write the client LoRA for the full model, and both LoRAs into the emulator package."""
        if is_main_process():
            server.package().save_loras(self.path / "emulator_package")
            server.save_client_lora(self.path / "client_lora", self.model_name)

    def save_round(self, server: FederatedServer, record: dict):
        """Put a round's result on disk: a crash in a later round loses nothing."""
        self.records.append(record)
        if is_main_process():
            with (self.path / "rounds.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        self.save_loras(server)

    def save(self, server: FederatedServer, summary: dict):
        """Write everything but the package's model; `summary` is empty if the run did not end."""
        self.save_loras(server)
        if not is_main_process():
            return
        write_model_card(self.path / "client_lora", self.model_name, self.args, summary)
        if summary:
            (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if self.records:
            plot_rounds(self.records, self.path / "rounds.png")

    def summarize(self, server: FederatedServer, results: dict, bytes_once: int, seconds: float) -> dict:
        """The content of `summary.json`, less what only the runner knows."""
        phases = sorted({phase for record in self.records for phase in record["seconds"]})
        split = server.split_model.split
        return {
            **results,
            "split": {
                "num_layers": split.num_layers,
                "kept": split.kept,
                "dropped": split.dropped,
                "adapter_layers": split.adapter_indices,
            },
            "rounds": len(self.records),
            "processes": {"number": self.args.world_size, "type": PartialState().distributed_type.value},
            "bytes": {
                "once_per_client": bytes_once,
                "down": self._total("bytes_down"),
                "up": self._total("bytes_up"),
            },
            "seconds": {
                "total": seconds,
                **{phase: sum(record["seconds"].get(phase, 0) for record in self.records) for phase in phases},
            },
            "settings": json.loads(json.dumps(self.args.to_dict(), default=str)),
            "peft_config": json.loads(
                json.dumps(server.split_model.full.peft_config["client"].to_dict(), default=list)
            ),
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }

    def _total(self, key):
        return sum(record[key] for record in self.records) if self.args.use_wire_format else None

    def push_to_hub(self, repo_id: str | None, private: bool | None, token: str | None) -> str:
        """Upload `client_lora/`; see [`FederatedRunner.push_to_hub`]."""
        repo_id = repo_id or self.args.hub_model_id
        if repo_id is None:
            raise ValueError("`repo_id` is None and `hub_model_id` is not set, so there is nowhere to push to.")
        api = HfApi(token=token or self.args.hub_token)
        private = self.args.hub_private_repo if private is None else private
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=self.path / "client_lora"))
