"""What can be reached from an object: raw data must not be, once its task has ended."""

import gc
import sys

import numpy as np
import torch


def reachable(root):
    """Every object that can be reached from `root`."""
    seen, stack = {}, [root]
    while stack:
        for child in gc.get_referents(stack.pop()):
            if id(child) not in seen and not isinstance(child, (type, type(sys), type(gc.collect))):
                seen[id(child)] = child
                stack.append(child)
    return seen.values()


def runs_in(root, runs) -> int:
    """How many of the runs of integers occur one after the other in a list, array or tensor that can be reached."""
    texts = []
    for found in [root, *reachable(root)]:
        if isinstance(found, torch.Tensor) and found.device.type != "meta":
            found = found.detach().flatten().numpy() if found.dtype != torch.bfloat16 else np.empty(0)
        if isinstance(found, np.ndarray) and found.dtype.kind in "iuf":
            whole = found.dtype.kind != "f" or bool((found == found.round()).all())
            found = found.flatten().astype(int).tolist() if whole and found.size else []
        if isinstance(found, (list, tuple)) and found and all(type(value) is int for value in found):
            texts.append(f", {', '.join(map(str, found))}, ")
    return sum(any(f", {', '.join(map(str, run))}, " in text for text in texts) for run in runs)
