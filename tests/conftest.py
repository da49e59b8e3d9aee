"""One thread a process: the tests' tensors are small, and two of them often run at once."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
