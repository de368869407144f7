"""What a run leaves in `output_dir`."""

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
from pathlib import Path

from ..config import FedBiOTConfig
from ..shared.processes import is_main_process
from ..shared.records import RoundRecord, RunSummary
from .figures import plot_rounds
from .model_card import write_model_card


RUN_FILES = ("rounds.jsonl", "summary.json", "rounds.png", "emulator_package", "client_lora", "state")
ROUNDS = "rounds.jsonl"
LOCK = ".lock"
MAX_FOLDER_NAME = 200  # bytes
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


class RunFolder:
    """
    The folder of one run: `emulator_package/`, `client_lora/`, `state/`, `rounds.jsonl`, `summary.json` and
    `rounds.png`. Every process has one; the main one writes.

    Args:
        args ([`FedBiOTConfig`]): Configuration.
        model_name (`str`, *optional*): The full model, by name or path, for the PEFT folder and its model card.

    Attributes:
        path, package, client_lora, state, rounds (`Path`): The folder, and what is in it.
    """

    def __init__(self, args: FedBiOTConfig, model_name: str | None):
        self.args, self.model_name = args, model_name
        self.path = Path(args.output_dir)
        self.package, self.client_lora = self.path / "emulator_package", self.path / "client_lora"
        self.state, self.rounds = self.path / "state", self.path / ROUNDS
        self._lock: int | None = None
        self._rounds_drawn = 0

    def check_free(self):
        """
        Check that a new run can be made here.

        Raises:
            ValueError: If the folder holds another run and `args.overwrite_output_dir` is off.
        """
        left = self._left_by_another_run()
        if left and not self.args.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` is '{self.path}', which holds another run ({', '.join(left)}). Go on with it by "
                "`resume_from_checkpoint=True`, choose another folder, or set `overwrite_output_dir=True` to delete what "
                "that run left."
            )

    def _left_by_another_run(self) -> list[str]:
        return [name for name in RUN_FILES if (self.path / name).exists()]

    def claim(self):
        """
        Make the folder this run's own until its process ends.

        Raises:
            ValueError: If another run is going on in it.
        """
        if not is_main_process() or self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.path)
        if self._lock is None:
            raise ValueError(
                f"`output_dir` is '{self.path}', in which another run is going on. Choose another folder, or wait for it."
            )

    def release(self):
        """Let other runs use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self):
        """Delete what an earlier run left."""
        if is_main_process():
            for name in self._left_by_another_run():
                path = self.path / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def add_record(self, record: RoundRecord):
        """Put a round's record on disk."""
        if is_main_process():
            with self.rounds.open("a") as file:
                file.write(record.to_json() + "\n")
                file.flush()
                os.fsync(file.fileno())

    def set_records(self, records: list[RoundRecord]):
        """Let `rounds.jsonl` have just these records."""
        if is_main_process():
            part = self.rounds.with_suffix(".part")
            part.write_text("".join(record.to_json() + "\n" for record in records))
            part.rename(self.rounds)

    def save(self, records: list[RoundRecord], summary: RunSummary | None):
        """Write the model card, the figures and, if the run has ended, its summary."""
        if not is_main_process():
            return
        self.save_card(self.client_lora, summary)
        if summary is not None:
            summary.write(self.path / "summary.json")
        if len(records) != self._rounds_drawn:
            plot_rounds(records, self.path / "rounds.png")
            self._rounds_drawn = len(records)

    def save_card(self, folder: str | Path, summary: RunSummary | None):
        """Write the model card of the result into a folder."""
        write_model_card(folder, self.model_name, self.args, summary)


def lock_folder(folder: Path) -> int | None:
    """Keep other processes out of a folder. Returns the descriptor that does, while it is open; `None` if another one has."""
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def folder_name(client: str) -> str:
    """
    A folder name for a client: its own where that can be one, and for every name another, inside the folder that it is
    put in.
    """
    name = re.sub(r'[/\\:*?"<>|%\x00-\x1f]', lambda found: f"%{ord(found[0]):02X}", client)
    if name.startswith(".") or name in RUN_FILES:  # `.`, `..`, hidden, or in the way of the run's own
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name.encode()) > MAX_FOLDER_NAME:
        name = f"{name.encode()[:MAX_FOLDER_NAME].decode(errors='ignore')}%{hashlib.sha256(client.encode()).hexdigest()[:16]}"
    return name


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
