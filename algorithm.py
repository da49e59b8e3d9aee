"""The interface of continual-learning algorithms: the hooks that the training loop calls, and classes of one's own.

A subclass of CLAlgorithm in a file of your own runs with `python train.py --cl_algorithm path/to/file.py:MyClass`.
"""

import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import distributed
import grpo
from flags import checked
from grpo import TaskRef, Trajectory

# The modules of our own algorithms.
LIBRARY = ("algorithm", "replay", "regularize", "distill", "merge", "generative", "drift")
HOOKS = re.compile(r"augment_\w+|\w+_hook|_sample_\w+")


@dataclass
class NoFlags:
    """An algorithm without flags."""


class CLAlgorithm:
    """What a continual-learning method adds to GRPO. Every rank holds the same state and makes the same draws for the
    whole batch of all ranks; the ranks then share the batch out.

    replay_ratio: the share of replay in a mixed batch, for the log.
    all_domains: draw batches from every domain from the start, in as many stages as there are domains.
    uses_trajectories: the hooks read trainer.trajectories.
    keeps_no_data: checkpoints from before a domain's end are removed when it has ended.

    The loop sets `trainer` (also `_trainer`). Hooks may read trainer.args (also .config), .model, .tokenizer, .domain,
    .step, .phase ("warmup" or "grpo"), .tasks, .trajectory_buffer, .scores ({domain: mean reward} of the last
    evaluation), .run (the directory), and of this step: .refs_P and .rewards_P_G (tasks and rewards of all ranks; NaN:
    invalid or not needed), .sampled (this rank's new conversations), .trajectories (of all ranks, messages as JSON,
    after the step), .replayed and .replayed_losses (stored conversations and their losses), .batches (this rank's
    micro-batches, see grpo.collate). They may call trainer.log_custom_metric(name, value).
    """

    Flags = NoFlags  # a dataclass: the flags of train.py that the constructor takes beside its own parameters
    trainer = None
    _trainer = property(lambda self: self.trainer)
    replay_ratio = 0.0
    all_domains = False
    uses_trajectories = False
    keeps_no_data = False

    def __init__(self, seed=0, **flags):
        self.flags = checked(self.Flags, flags)
        self.seed = seed

    @classmethod
    def from_args(cls, args):
        """An instance from train.py's flags: those that the constructor names, and if it takes **kwargs those that its
        parents name. A flag that is None does not replace a default."""
        wanted = {}
        for parent in cls.__mro__:
            parameters = inspect.signature(parent.__init__).parameters
            wanted = {**parameters, **wanted}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
            if parent is CLAlgorithm:
                wanted.update(dict.fromkeys(f.name for f in fields(cls.Flags)))
        given = {name: getattr(args, name) for name in wanted if hasattr(args, name)}
        required = [name for name, p in wanted.items() if p is not None and p.default is p.empty]
        return cls(**{name: value for name, value in given.items() if value is not None or name in required})

    def make_buffer(self):
        """The replay.TrajectoryBuffer that the loop offers finished conversations to. None: none is stored, or for a
        class of the user's own that keeps data, one with the flags of the run."""
        return None

    def keeps(self, trajectory: Trajectory) -> bool:
        """Whether a finished conversation is offered to the buffer."""
        return True

    def needs_rewards(self, domain: str) -> bool:
        """Whether this step's conversations of a domain need rewards; an algorithm that says no decides. Those without
        one have no policy gradient."""
        return True

    def augment_batch(self, new_tasks: list[TaskRef], current_domain: str) -> list[TaskRef]:
        """The tasks to roll out: the new ones, and those replayed with them."""
        return new_tasks

    def augment_trajectories(self, new: int, current_domain: str) -> list[Trajectory]:
        """Stored conversations to train on beside a step's `new` ones, demonstrations of the warm start included."""
        return []

    def extra_losses(self, trainer):
        """Yields scalar tensors that are added to the loss of every optimiser step. Each is learnt from, and its graph
        freed, before the next is asked for.

        Every rank computes the same loss, or its part of a mean over ranks: the loop averages over ranks. A penalty on
        weights takes them from policy.trained_parameters(trainer.model), which may be sharded.
        """
        return ()

    def post_step_hook(self, trainer, domain):
        """At the end of each GRPO step, after all of its optimiser steps."""

    def post_task_hook(self, trainer, domain):
        """After a domain is finished and all domains are evaluated."""

    def get_statistics(self) -> dict:
        """For the block after each domain and for the summary: what was replayed, and the buffer. Conversations of GRPO
        are counted apart from demonstrations of the warm start."""
        replayed, buffer = self.trainer.state["replayed"], self.trainer.trajectory_buffer
        if not any(replayed.values()) and buffer is None:
            return {}
        return {
            "total_replay_samples": sum(replayed["grpo"].values()),
            "replay_samples_per_domain": dict(replayed["grpo"]),
            "total_replay_demonstrations": sum(replayed["warmup"].values()),
            "replay_ratio": round(self.replay_ratio, 4),
            **(buffer.get_statistics() if buffer is not None else {}),
        }

    def bytes_kept(self) -> int:
        """The size of what is remembered beside the trajectory buffer."""
        return 0

    def state_dict(self) -> dict:
        """Everything that a resumed run needs, as JSON."""
        return {}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)

    def tensors(self) -> dict:
        """Tensors that a resumed run needs, by name, whole on rank 0 (see policy.gathered). Every rank calls."""
        return {}

    def load_tensors(self, file):
        """Takes back `tensors` from an open safetensors file (keys(), get_tensor(name)), after `load_state_dict`."""


class SequentialCL(CLAlgorithm):
    """One domain after another, and nothing against forgetting: the baseline."""


class JointCL(CLAlgorithm):
    """All domains at once, for as many steps as the sequence takes: what there is to reach without forgetting."""

    all_domains = True


def batches(trainer, trajectories) -> list[dict]:
    """Micro-batches (grpo.collate) of this rank's trajectories; "indices" are the places of their rows in the list."""
    args, device, pad = trainer.args, trainer.model.device, trainer.tokenizer.pad_token_id or 0
    nothing = Trajectory(token_ids=[0, 0], action_mask=[False] * 2, logprobs=[0.0] * 2, turns=[-1] * 2)
    parts = grpo.micro_batches([len(t.token_ids) for t in trajectories], args.micro_batch_tokens)
    if args.shard:  # every pass is one of all ranks: ranks with fewer passes run dummies without a loss
        parts += [[len(trajectories)]] * (max(distributed.all_gather_json(len(parts))) - len(parts))
    rows = [*trajectories, nothing]
    found = [grpo.collate([rows[i] for i in part], args.gamma, device, pad) for part in parts]
    return [{**batch, "indices": part} for batch, part in zip(found, parts, strict=True)]


def load_algorithm(name, algorithms, args) -> CLAlgorithm:
    """algorithms[name], or the class of "path/to/file.py:MyAlgorithm", built from train.py's flags. Raises ValueError
    if there is no such algorithm, file or class."""
    if ":" not in name:
        if name not in algorithms:
            known = ", ".join(algorithms)
            raise ValueError(f"unknown cl_algorithm {name!r}; choose one of {known}, or path/to/file.py:MyAlgorithm")
        return algorithms[name].from_args(args)
    path, _, class_name = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"cl_algorithm: there is no file {path!r}")
    # A name of its own: the user's file may be a changed copy called replay.py.
    spec = importlib.util.spec_from_file_location("rehearse_user_algorithm", path)
    if spec is None:
        raise ValueError(f"cl_algorithm: {path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"cl_algorithm: {path} cannot be imported: {type(error).__name__}: {error}") from error
    algorithm = getattr(module, class_name, None)
    if not (inspect.isclass(algorithm) and issubclass(algorithm, CLAlgorithm)):
        raise ValueError(f"cl_algorithm: {path} has no subclass of replay.CLAlgorithm called {class_name!r}")
    return algorithm.from_args(args)


def library_class(algorithm) -> type:
    """The class of ours that an algorithm is, or derives from."""
    return next(kind for kind in type(algorithm).__mro__ if kind.__module__ in LIBRARY)


def check_hooks(algorithm):
    """Raises ValueError if a class of the user's own has a method that looks like a hook and that nothing calls."""
    library = library_class(algorithm)
    hooks = [name for name in dir(library) if HOOKS.fullmatch(name)]
    for kind in type(algorithm).__mro__[: type(algorithm).__mro__.index(library)]:
        for name in vars(kind):
            if HOOKS.fullmatch(name) and name not in hooks:
                known = f"the hooks of {library.__name__} are {', '.join(hooks)}"
                raise ValueError(f"{kind.__name__}.{name} looks like a hook, but nothing calls it; {known}")


def own_attributes(algorithm, args) -> dict[str, str]:
    """The attributes that a class of the user's own has beside those of our class, as text; none if it writes a
    state_dict of its own. If one changes during a run, a resumed run would lose it."""
    library = library_class(algorithm)
    if type(algorithm).state_dict is not library.state_dict:
        return {}
    known = {"trainer", *vars(library.from_args(args))} if type(algorithm) is not library else vars(algorithm)
    return {name: repr(value) for name, value in vars(algorithm).items() if name not in known}
