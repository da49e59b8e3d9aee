"""algorithm.py: how an algorithm gets its flags, and classes of one's own."""

import json
from types import SimpleNamespace

import pytest
import torch
from law import small_args, small_run, steps_of
from safetensors import safe_open
from safetensors.torch import save_file

import algorithm
import generative
import regularize
import replay
import train


class Optional(replay.CLAlgorithm):
    def __init__(self, eval_max_tasks, max_context=7, **kwargs):
        super().__init__(**kwargs)
        self.found = (eval_max_tasks, max_context)


def test_a_flag_that_is_none_leaves_a_default_and_fills_what_has_none():
    assert Optional.from_args(SimpleNamespace(eval_max_tasks=None, max_context=None)).found == (None, 7)
    assert Optional.from_args(SimpleNamespace(eval_max_tasks=2, max_context=3)).found == (2, 3)


class Fixed(replay.ReplayCL):
    def __init__(self, replay_ratio):
        super().__init__(replay_ratio=replay_ratio)


def test_a_constructor_without_kwargs_gets_what_it_names_only():
    args = SimpleNamespace(replay_ratio=0.3, replay_strategy="recent", seed=9)
    made = Fixed.from_args(args)
    assert (made.replay_ratio, made.flags.replay_strategy, made.seed) == (0.3, "random", 0)
    made = replay.ReplayCL.from_args(args)
    assert (made.replay_ratio, made.flags.replay_strategy, made.seed) == (0.3, "recent", 9)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--cl_algorithm ewc", [regularize.EWC]),
        ("--cl_algorithm online_ewc", [regularize.OnlineEWC]),
        ("--cl_algorithm lwf", [regularize.LwF]),
        ("--cl_algorithm lwf --ewc_lambda 2", [regularize.LwF, regularize.EWC]),
        ("--cl_algorithm ewc --lwf_coef 2", [regularize.EWC, regularize.LwF]),
        ("--cl_algorithm replay --ewc_lambda 2 --lwf_coef 2", [replay.ReplayCL, regularize.EWC, regularize.LwF]),
        ("--cl_algorithm generative_replay --lwf_coef 2", [generative.GenerativeReplayCL, regularize.LwF]),
        ("--cl_algorithm sequential --ewc_lambda 0 --lwf_coef 0", [replay.SequentialCL]),
    ],
)
def test_flags_choose_the_list_of_algorithms(flags, expected, tmp_path):
    args = small_args(tmp_path, *flags.split(), "--temperature", "0.6")
    main = algorithm.load_algorithm(args.cl_algorithm, train.ALGORITHMS, args)
    found = [main, *regularize.penalties(args, main)]
    assert [type(a) for a in found] == expected
    for a in found:
        if isinstance(a, regularize.EWC):
            assert a.ewc_lambda == (args.ewc_lambda or 1.0) and a.temperature == 0.6
        if isinstance(a, regularize.OnlineEWC):
            assert a.ewc_decay == 0.95
        if isinstance(a, regularize.LwF):
            assert a.lwf_coef == (args.lwf_coef or 0.01)


@pytest.mark.parametrize(
    "name, message",
    [
        ("magic", "'magic'; choose one of sequential, joint, replay"),
        ("nowhere.py:Magic", "no file 'nowhere.py'"),
        ("replay.py:Magic", "no subclass of replay.CLAlgorithm called 'Magic'"),
        ("README.md:Magic", "'README.md' is not a Python file"),
    ],
)
def test_an_algorithm_that_is_not_there_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        algorithm.load_algorithm(name, train.ALGORITHMS, train.Args())


class Helper:
    def _sample_replay_taskz(self):
        """A misspelt hook, in a class beside."""


@pytest.mark.parametrize("name", ["_sample_tasks", "post_epoch_hook", "augment_everything", "_sample_replay_taskz"])
@pytest.mark.parametrize("base", [replay.SequentialCL, replay.AdaptiveReplayCL, generative.GenerativeReplayCL])
def test_a_method_that_looks_like_a_hook_and_is_none_is_an_error_by_name(base, name):
    arguments = (["airline"],) if base is generative.GenerativeReplayCL else ()
    parents = (Helper, base) if hasattr(Helper, name) else (base,)
    own = type("Own", parents, {} if hasattr(Helper, name) else {name: lambda self: None})
    with pytest.raises(
        ValueError, match=rf"\.{name} looks like a hook, .* the hooks of {base.__name__} are .*augment_batch"
    ):
        algorithm.check_hooks(own(*arguments))
    for hook in ("augment_batch", "post_step_hook", "extra_losses", "sample_other"):
        algorithm.check_hooks(type("Own", (base,), {hook: lambda self: None})(*arguments))
    algorithm.check_hooks(base(*arguments))
    algorithm.check_hooks(type("Own", (replay.ReplayCL,), {"_sample_replay_tasks": lambda self: None})())


@pytest.mark.parametrize("name", train.ALGORITHMS)
def test_what_is_saved_before_a_domain_has_ended_is_loaded(name, tmp_path):
    """It is nothing, of most algorithms."""
    flags = {"der": "--replay_kind trajectories"}
    args = small_args(tmp_path, "--cl_algorithm", name, *flags.get(name, "").split())
    args.lwf_coef = None if name == "joint" else 1.0
    first = algorithm.load_algorithm(name, train.ALGORITHMS, args)
    for saved in (first, *regularize.penalties(args, first)):
        saved.trainer = SimpleNamespace(model=torch.nn.Linear(1, 1))
        save_file(saved.tensors(), tmp_path / "tensors")
        with safe_open(tmp_path / "tensors", "pt") as file:
            saved.load_state_dict(json.loads(json.dumps(saved.state_dict())))
            saved.load_tensors(file)


OWN = """
from replay import SequentialCL

class L2(SequentialCL):
    def extra_losses(self, trainer):
        yield 1e-4 * sum(p.square().sum() for p in trainer.model.parameters())
"""


def test_a_loss_of_the_users_own_stands_beside_lwf_and_ewc(tmp_path):
    """Its graph goes through the weights that LwF exchanges to read the frozen policy."""
    (tmp_path / "own.py").write_text(OWN)
    flags = f"--cl_algorithm {tmp_path / 'own.py'}:L2 --lwf_coef 0.1 --ewc_lambda 1 --num_iterations 2 --run_name r"
    summary = small_run(tmp_path, *flags.split())
    assert summary["statistics"]["tasks held"] == 2
    assert all(r["extra_loss"] > 0 for r in steps_of(tmp_path / "r"))
