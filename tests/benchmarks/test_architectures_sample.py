import importlib.util
import re
from pathlib import Path

import pytest
import transformers
from conftest import needs_experts, slow
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


pytestmark = pytest.mark.architectures

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks" / "architectures.py")
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)

SAMPLE = {
    "llama": "supported",
    "glm4_moe": "supported",
    "bamba": "supported",
    "gemma3": "supported",
    "deepseek_v4": "refused: .* rather than one hidden state for each",
    "gemma4_text": "refused: .* depends on how many there are",
    "diffllama": "refused: .* depends on the layer's position",
    "xlstm": "not tried: transformers makes no tiny model of it",
}


EXPERTS = ("glm4_moe", "deepseek_v4")
QUICK = ("llama", "gemma4_text", "xlstm")


@pytest.mark.parametrize(
    "model_type",
    [
        *QUICK,
        *(slow(name) for name in SAMPLE if name not in (*QUICK, *EXPERTS)),
        *(pytest.param(name, marks=[pytest.mark.slow, needs_experts]) for name in EXPERTS),
    ],
)
def test_sample_is_as_the_table_says(model_type, tmp_path):
    outcome = architectures.try_architecture(model_type, tmp_path)
    assert re.match(SAMPLE[model_type], outcome.verdict), outcome
    (row,) = [row for row in architectures.TABLE.read_text().splitlines() if row.startswith(f"| {model_type} |")]
    if outcome.verdict == "supported":
        assert row.endswith(f"| {outcome.targets} | {outcome.teachers} | {outcome.start} |")


def test_table_has_every_architecture_and_none_that_fails():
    table = architectures.TABLE.read_text()
    assert "## Failing" not in table
    if f"transformers {transformers.__version__} knows" not in table:
        pytest.skip("the table is of another version of transformers")
    assert [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if f"| {name} |" not in table] == []
