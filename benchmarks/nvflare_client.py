"""NVFlare's side of `versus_nvflare.py`: the job, and the script that each of its clients runs. Needs NVFlare only."""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


class Adapter(torch.nn.Module):
    """The server's model: the LoRA alone, which is all that is exchanged. The server needs no base model."""

    def __init__(self, file: str):
        super().__init__()
        self.tensors = load_file(file)

    def state_dict(self, *args, **kwargs):
        return self.tensors

    def load_state_dict(self, state_dict, strict=True, assign=False):
        self.tensors = dict(state_dict)


def count_frames() -> dict[str, int]:
    """Count every byte of the frames that this process's connections to NVFlare's network send and receive."""
    from nvflare.fuel.f3.connection import Connection
    from nvflare.fuel.f3.drivers.socket_conn import SocketConnection

    count = {"sent": 0, "received": 0}
    send, receive = SocketConnection.send_frame, Connection.process_frame

    def counted_send(self, frame):
        count["sent"] += len(frame)
        return send(self, frame)

    def counted_receive(self, frame):
        count["received"] += len(frame)
        return receive(self, frame)

    SocketConnection.send_frame, Connection.process_frame = counted_send, counted_receive
    return count


def make_trainer(folder: Path, settings: dict, name: str, callbacks: list):
    """Full-model LoRA fine-tuning with TRL, as in NVFlare's own example."""
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        SFTConfig(
            str(folder / name),
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            **settings["training"],
        ),
        train_dataset=load_from_disk(folder / "data" / name),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(**settings["lora"]),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def export(folder: Path, settings: dict):
    """Write the job to `folder / "job"`, and the LoRA to start from."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    model = make_trainer(folder, settings, settings["clients"][0], []).model
    save_file(get_peft_model_state_dict(model), folder / "lora.safetensors")
    recipe = FedAvgRecipe(
        name="job",
        model={"class_path": "nvflare_client.Adapter", "args": {"file": str(folder / "lora.safetensors")}},
        min_clients=len(settings["clients"]),
        num_rounds=settings["num_rounds"],
        train_script=__file__,
        train_args=f"client {folder}",
        server_expected_format=ExchangeFormat.PYTORCH,
    )
    # How often a client asks for a task; 2 s by default, which a round as short as this one would mostly be.
    recipe.add_server_config({"server": {"task_request_interval": 0.1}})
    recipe.export(str(folder))


def client(folder: Path, settings: dict):
    """Train in every round, and note the bytes that have passed when a round's model has arrived."""
    import nvflare.client.hf as flare
    from transformers import TrainerCallback

    count = count_frames()

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            with open(folder / f"{name}.jsonl", "a") as file:
                file.write(json.dumps({"time": time.time(), **count}) + "\n")

    flare.init()
    name = flare.get_site_name()
    trainer = make_trainer(folder, settings, name, [Note()])
    # Ours starts every round with a fresh optimizer too, and writes no checkpoints.
    flare.patch(trainer, restore_state=False, local_steps=settings["local_steps"])
    while flare.is_running():
        trainer.train()


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    {"export": export, "client": client}[sys.argv[1]](folder, json.loads((folder / "settings.json").read_text()))
