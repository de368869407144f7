from pathlib import Path

import pytest
from conftest import sums

from fedbiot_trainer import FedBiOTConfig, run_method
from fedbiot_trainer.output.run_folder import RUN_FILES, folder_name


NAMES = [
    "clinic-a",
    "C++",
    "Zürich 1",
    "..",
    ".",
    "../up",
    "/etc",
    "a/b",
    "a%2Fb",
    "summary.json",
    "a\nb",
    "x" * 300,
    "x" * 301,
]


def test_folders_of_clients_stay_inside_and_apart(tmp_path):
    folders = [(tmp_path / folder_name(name)).resolve() for name in NAMES]
    assert {folder.parent for folder in folders} == {tmp_path.resolve()}
    assert len(set(folders)) == len(NAMES)
    for folder in folders:
        folder.mkdir()
    assert [folder.name for folder in folders[:3]] == NAMES[:3]
    assert not set(RUN_FILES) & {folder.name for folder in folders}


def test_local_only_writes_inside_output_dir(make_args, tokenizer, tmp_path, monkeypatch):
    seen = []

    class Runner:
        def __init__(self, model, args: FedBiOTConfig, client_datasets, **kwargs):
            seen.append(Path(args.output_dir).resolve())
            raise KeyboardInterrupt

    monkeypatch.setattr("fedbiot_trainer.federation.methods.FederatedRunner", Runner)
    with pytest.raises(KeyboardInterrupt):
        run_method("local_only", "m", make_args(), client_datasets={"../../up": sums(0, 2)})
    assert seen[0].parent == (tmp_path / "run").resolve()


def test_numbers_as_names(make_runner):
    run = make_runner(client_datasets={0: sums(0, 4), 1: sums(4, 8)}, num_rounds=1)
    assert run.train().num_examples == {"0": 12, "1": 12}
