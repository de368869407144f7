"""A site of `test_namespace_faults.py`, which is told by a file in its folder what to do wrong."""

import time
from pathlib import Path

from safetensors.torch import load

from fedbiot_trainer.cli.join import make_site
from fedbiot_trainer.wire.frame import unpack
from fedbiot_trainer.wire.messages import ClientUpdate


PACE = 0.5  # seconds that a round takes at least


def faulty(file: str) -> "FaultySite":
    return FaultySite(file)


class FaultySite:
    """
    What `join` has set up, but for a training for which `fault` in its folder says:

    `hold`: it lasts until the file is gone; `held` is there as soon as it has begun. Once for each of the others:
    `garbage`: it answers with its own text. `raise`: it fails, with its text in the error. `pose`: the answer bears another's
    name. `old`: it is the last round's. `large`: all in it is a hundred times what it should be.
    """

    def __init__(self, file: str):
        self.site, self.folder = make_site(file), Path(file).parent
        self.fault = self.folder / "fault"
        self.last = b""

    def answer(self, kind: str, payload: bytes) -> bytes:
        if kind != "fit":
            return self.site.answer(kind, payload)
        time.sleep(PACE)
        fault = self.fault.read_text() if self.fault.is_file() else ""
        if fault == "hold":
            (self.folder / "held").touch()
            while self.fault.exists():
                time.sleep(0.1)
            (self.folder / "held").unlink(missing_ok=True)
        elif fault:
            self.fault.unlink()
        answer = self.site.answer(kind, payload)
        answer, self.last = self._wrong(fault, answer), answer
        return answer

    def _wrong(self, fault: str, answer: bytes) -> bytes:
        secret = self.site.train_dataset[0]["prompt"]
        if fault == "garbage":
            return secret.encode()
        if fault == "raise":
            raise ValueError(f"{self.folder} has {secret}")
        if fault == "old":
            return self.last
        if fault in ("pose", "large"):
            update = read_update(answer)
            if fault == "pose":
                update.client = "south"
            else:
                update.client_lora = {key: 100 * tensor for key, tensor in update.client_lora.items()}
            return update.to_bytes()
        return answer


def read_update(answer: bytes) -> ClientUpdate:
    """An update, unchecked."""
    manifest, tensors = unpack("client update", answer)
    lora = {name.partition("/")[2]: tensor for name, tensor in load(bytes(tensors)).items()}
    return ClientUpdate(**{name: manifest[name] for name in ClientUpdate.manifest_fields}, client_lora=lora)
