"""experiments/served.py: its table, and a server that does not start. The experiment itself needs vLLM."""

import json
import sys

import pytest

from experiments import served


def made_run(folder, average, rewards, ratio):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"metrics": {"average": average}}))
    numbers = {"sampler_ratio_max": ratio, "sampler_kl": 1e-3, "sampler_cut": 0.02, "tokens_per_second": 100.0}
    steps = [{"kind": "step", "reward": r, "ratio_first_step": 1 + r / 100, **numbers} for r in rewards]
    lines = [{"kind": "warmup"}, *steps, {"kind": "evaluation"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_an_arm_is_a_row(tmp_path):
    runs = [made_run(tmp_path / "a", 0.4, [0.1, 0.5], 1.1), made_run(tmp_path / "b", 0.6, [0.3, 0.9], 1.2)]
    assert served.curves(runs).tolist() == [[0.1, 0.5], [0.3, 0.9]]
    row = served.row("vllm", runs)
    assert list(row.values()) == ["vllm", "0.50 ± 1.27", "0.45 ± 1.91", "1.0090", "1.2000", "1.0e-03", "2.0%", "100"]


def test_a_server_that_does_not_start_is_named_with_its_log(tmp_path):
    log = tmp_path / "server.log"
    with (
        pytest.raises(ValueError, match=f"vLLM does not start; see {log}"),
        served.serving(sys.executable, tmp_path, "float32", log),
    ):
        pass
    assert "vllm" in log.read_text()
