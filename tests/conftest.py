"""One thread a process: the tests' tensors are small, and two of them often run at once."""

import json
import os
import signal

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; the scripts under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the embedded policy in float32; a test that changes the model changes a copy."""
    import policy

    return policy.load_policy("tiny", "float32", "cpu")


@pytest.fixture
def compared(tmp_path):
    """Compares runs with the given summaries, written into folders of their own, and returns the Markdown."""
    import comparison

    def compare(summaries, **kwargs):
        folders = [tmp_path / f"run{k}" for k in range(len(summaries))]
        for folder, values in zip(folders, summaries, strict=True):
            folder.mkdir()
            (folder / "summary.json").write_text(json.dumps(values))
        return comparison.compare(folders, tmp_path / "out", **kwargs)

    return compare
