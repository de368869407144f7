import re
from pathlib import Path

import pytest
from conftest import save_files, sums


ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SMALL = "num_rounds=1, local_steps=2, initial_alignment_steps=2, alignment_steps=1, report_to='none', use_cpu=True"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """What the README's snippets expect to find: a base model and some files."""
    folder = tmp_path_factory.mktemp("readme")
    return save_files(folder, tokenizer, a=sums(0, 8), b=sums(4, 9), public=sums(20, 30), test=sums(9, 11))


# Later blocks use what earlier ones wrote, as a reader would.
@pytest.mark.parametrize("index", range(2), ids=["runner", "trainers"])
def test_snippet(folder, index, monkeypatch):
    monkeypatch.chdir(folder)
    code = BLOCKS[index].replace("meta-llama/Llama-2-7b-hf", "base")
    code = re.sub(r'FedBiOTConfig\(output_dir=("[^"]+").*?\)', rf"FedBiOTConfig(output_dir=\1, {SMALL})", code)
    code = re.sub(r"LoraConfig\(.*?\)", "LoraConfig(r=4, target_modules='all-linear')", code)
    names = {}
    exec(code, names)
    if index == 0:
        assert names["runner"].summary.rounds == 1
    else:
        assert names["owner"].state.global_step == names["client"].state.global_step == 2
        assert (folder / "emulator_package" / "fedbiot.json").exists()
        assert (folder / "my-client-lora" / "adapter_config.json").exists()


def test_it_is_read_in_ten_minutes():
    assert 700 <= len((ROOT / "README.md").read_text().split()) <= 1100
