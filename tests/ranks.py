"""Two ranks on one machine."""

import torch
import torch.multiprocessing


def on_two_ranks(function, tmp_path, *args) -> list:
    """function(*args) on each of two gloo ranks; [rank] -> its result (anything that torch.save takes)."""
    path = str(tmp_path / function.__name__)
    # Forked, because importing everything anew takes longer than what the ranks do.
    torch.multiprocessing.start_processes(_rank, [path, function, args], nprocs=2, start_method="fork")
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in (0, 1)]


def _rank(rank, path, function, args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}.sync", rank=rank, world_size=2)
    torch.save(function(*args), f"{path}.{rank}")
    torch.distributed.destroy_process_group()
