import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for path in (ROOT / "benchmarks").glob("*.py")
    if path.stem not in ("common", "nvflare_client", "architectures")
)
NVFLARE = Path.home() / ".cache" / "fedbiot-trainer" / "nvflare-venv"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_runs(script, tmp_path):
    """Only that it runs and writes its rows: the figures are in benchmarks/README.md."""
    if script.stem == "versus_nvflare" and not NVFLARE.exists():
        pytest.skip("NVFlare's environment is not installed: run benchmarks/versus_nvflare.py once")
    if script.stem == "deployment":
        pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedbiot-trainer[nvflare]'")
    command = [sys.executable, str(script), "--quick", "--json", str(tmp_path / "rows.json")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=300)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows
    assert all({"ratio_median", "ratio_min", "ratio_max", "target"} <= row.keys() for row in rows)
