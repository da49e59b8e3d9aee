"""One thread a process: the tests' tensors are small, and two of them often run at once."""

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
