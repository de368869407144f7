import json
from types import SimpleNamespace

import pytest

from fedbiot_trainer.output.hub import push_folder


@pytest.mark.parametrize("base", ["org/model", None, "local"])
def test_a_base_on_this_machine_is_not_named_on_the_hub(tmp_path, monkeypatch, base):
    (tmp_path / "local").mkdir()
    name = str(tmp_path / "local") if base == "local" else base
    folder = tmp_path / "client_lora"
    folder.mkdir()
    text = json.dumps({"base_model_name_or_path": name, "r": 8})
    (folder / "adapter_config.json").write_text(text)
    uploaded = {}

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, name, private, exist_ok):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, revision):
            uploaded.update(json.loads((folder_path / "adapter_config.json").read_text()))
            return "address"

    monkeypatch.setattr("fedbiot_trainer.output.hub.HfApi", Api)
    args = SimpleNamespace(
        hub_token=None, hub_private_repo=None, hub_model_id=None, output_dir="run", hub_revision=None
    )
    assert push_folder(folder, args, "me/lora", None, None) == "address"
    assert uploaded == {"base_model_name_or_path": None if base == "local" else base, "r": 8}
    assert (folder / "adapter_config.json").read_text() == text  # here it is
