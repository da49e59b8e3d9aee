"""generative.py: the rule of rehearsal, privacy, and generative replay of the agent."""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from law import small_run, steps_of
from privacy import reachable, runs_in
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
import distributed
import generative
import policy
from generative import VAE, GenerativeReplayCL, Rehearsal, TokenVAE, distillation_loss, replay_weights
from grpo import Trajectory
from replay import Buffer


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_weights_give_every_task_the_same_share():
    assert [replay_weights(n) for n in (1, 2, 5)] == [(1.0, 0.0), (0.5, 0.5), (0.2, 0.8)]
    with pytest.raises(ValueError, match="from 1, got 0"):
        replay_weights(0)


def test_distillation_is_cross_entropy_to_the_softened_teacher():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(6, 5)), rng.normal(size=(6, 3))
    p, q = np.exp(teacher / 2), np.exp(student / 2)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    total = -(p * np.log(q[:, :3])).sum()  # the two new classes have target 0
    loss = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), 2.0)
    assert loss.item() == pytest.approx(4 * total / 6, rel=1e-12)
    same = torch.from_numpy(teacher).requires_grad_()
    distillation_loss(same, torch.from_numpy(teacher), 2.0).backward()
    assert same.grad.abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------- rehearsal


def rehearsal(conditions=0, components=0, **settings):
    torch.manual_seed(0)
    return Rehearsal(VAE(64, (16,), 4, 0.1, conditions, components), **settings)


def task(k, n=20):
    rng = torch.Generator().manual_seed(k)
    return torch.rand(n, 64, generator=rng), (torch.arange(n) % 2 + 2 * k).tolist()


def offer(replayer, k):
    for x, y in zip(*task(k), strict=True):
        replayer.offer(x.clone(), y if replayer.generator.num_conditions else None)


def learn(replayer, *tasks):
    for k in tasks:
        offer(replayer, k)
        for _ in range(3):
            replayer.teach_generator(8)
        replayer.end_task()


def shown_to(replayer, monkeypatch):
    """The parts of each update of the generator from here on. It does not learn."""
    parts = []
    monkeypatch.setattr(replayer.generator, "learn", lambda optimizer, shown: parts.append(shown) or 0.0)
    return parts


def test_current_and_generated_parts_have_the_shares_of_their_tasks(monkeypatch):
    replayer = rehearsal()
    learn(replayer, 0, 1)
    shown = shown_to(replayer, monkeypatch)
    replayer.offer(task(2)[0][0])
    replayer.teach_generator(5)
    [((new, x, _), (old, made, _))] = shown
    assert (new, old) == replay_weights(3) and len(x) == len(made) == 5
    assert torch.equal(x, task(2)[0][:1].expand(5, -1))


def test_the_prior_is_fitted_to_as_much_of_each_task():
    """At a task's end, before its memory is dropped; of earlier tasks, to samples of the old generator."""
    replayer = rehearsal(conditions=6, components=2)
    fitted = []
    replayer.generator.fit_prior = lambda batches: fitted.append(list(batches))
    learn(replayer, 0, 1, 2)
    assert len(fitted) == 3
    for n, batches in enumerate(fitted, 1):
        x, condition = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.bincount(condition, minlength=6).tolist() == [10] * 2 * n + [0] * (6 - 2 * n)
        assert torch.allclose(x[:20].sum(0), task(n - 1)[0].sum(0))


def test_the_old_generator_is_frozen_at_the_tasks_end():
    replayer = rehearsal(conditions=6)
    learn(replayer, 0)
    old = replayer.old_generator
    before = [p.clone() for p in old.parameters()]
    learn(replayer, 1)
    assert replayer.old_generator is not old and equal(before, old.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in replayer.old_generator.parameters())
    assert not any(module.training for module in replayer.old_generator.modules())


def holds(root, samples):
    tensors = [t.detach().flatten() for t in reachable(root) if isinstance(t, torch.Tensor)]
    numbers = torch.cat([t.float() for t in tensors if t.numel()])
    return [bool(torch.isin(sample, numbers).all()) for sample in samples]


def test_nothing_of_a_finished_task_is_kept():
    """Gradients and moments, too: a unit that is active for one sample only has it as its gradient."""
    replayer = rehearsal(conditions=6, components=10, memory_size=15)
    offer(replayer, 0)
    replayer.teach_generator(8)
    assert sum(holds(replayer, task(0)[0])) == len(replayer.memory.items) == 15 and replayer.memory.seen == 20
    replayer.end_task()
    assert replayer.memory == Buffer(15) and not any(holds(replayer, task(0)[0]))
    assert not replayer.generator_optimizer.state
    assert not any(p.grad is not None for p in replayer.generator.parameters())
    learn(replayer, 1)
    assert not any(holds(replayer, torch.cat([task(0)[0], task(1)[0]])))


def test_conditions_are_drawn_evenly_or_at_random_over_those_seen():
    even, random = rehearsal(conditions=6), rehearsal(conditions=6, task_balanced=False)
    for replayer in (even, random):
        learn(replayer, 2, 0)
        assert replayer.old_conditions == [4, 5, 0, 1]
        counts = sum(torch.bincount(replayer.generated(6)[1], minlength=6) for _ in range(400))
        # Not always the same ones twice.
        assert counts[2:4].sum() == 0 and (counts[[0, 1, 4, 5]] - 600).abs().max() < 75
    assert torch.bincount(even.generated(400)[1], minlength=6).tolist() == [100, 100, 0, 0, 100, 100]
    counts = torch.stack([torch.bincount(random.generated(400)[1], minlength=6)[[0, 1, 4, 5]] for _ in range(200)])
    assert counts.double().var(0).mean() == pytest.approx(400 / 4 * 3 / 4, rel=0.25)  # of independent draws


def test_labels_need_not_be_contiguous(monkeypatch):
    """Each has a number of its own in the generator, in the order of first appearance."""
    replayer = rehearsal(conditions=2, components=1)
    for label in (7, 3):
        replayer.offer(torch.full((64,), label / 10), label)
        replayer.teach_generator(4)
        replayer.end_task()
    assert (replayer.conditions, replayer.old_conditions) == ([7, 3], [7, 3])
    monkeypatch.setattr(replayer.old_generator, "generate", lambda number, condition: condition)
    rows, labels = replayer.generated(10)
    assert sorted(labels.tolist()) == [3] * 5 + [7] * 5 and rows.tolist() == [int(k == 3) for k in labels]
    replayer.offer(torch.zeros(64), 3)
    shown = shown_to(replayer, monkeypatch)
    replayer.teach_generator(4, (torch.zeros(2, 64), torch.tensor([3, 7])))
    assert [condition.tolist() for _, _, condition in shown[0]] == [[1] * 4, [1, 0]]
    with pytest.raises(ValueError, match=r"the generator has 2 conditions, \[7, 3\]: no room for 9"):
        replayer.offer(torch.zeros(64), 9)


def test_misuse_of_rehearsal_is_named():
    with pytest.raises(ValueError, match="before the first task has ended"):
        rehearsal().generated(3)
    with pytest.raises(ValueError, match="no sample of the current task"):
        rehearsal().teach_generator(2)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        rehearsal(memory_size=0)


# ------------------------------------------------------------------------------------------------------- the agent


def agent(**settings):
    return GenerativeReplayCL(["airline", "retail"], **{"window": 4, "window_batch": 6, "memory_size": 20, **settings})


def test_conversations_are_cut_into_windows_and_back(monkeypatch):
    monkeypatch.setattr(generative, "VOCABULARY", 8)
    algorithm = agent()
    algorithm.number([[100, 14, 14, 61, 40], [61, 181]])
    assert algorithm.symbols == [0, 14, 40, 61, 100, 181]  # sorted: the order of the conversation is not kept
    algorithm.number([[2, 4, 6, 14]])
    assert algorithm.symbols == [0, 14, 40, 61, 100, 181, 2, 4]  # no room for 6
    assert algorithm.rehearsal.generator.used == 8
    windows = torch.stack(algorithm.as_windows([100, 14, 14, 61, 40, 6, 181, 61, 4, 2]))
    assert windows.tolist() == [[4, 1, 1, 3], [2, 0, 0, 0], [7, 6, 0, 0]]
    ids, sampled = algorithm.as_tokens(torch.tensor([[4, 1, 0, 3], [6, 3, 5, 2]]))
    assert ids.tolist() == [[50, 7, 0, 0], [1, 30, 90, 20]]
    assert sampled.tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]


def test_generated_windows_can_be_read(monkeypatch):
    monkeypatch.setattr(generative, "VOCABULARY", 8)
    algorithm = agent()
    algorithm.number([[100, 14, 61, 40]])  # tokens 7, 20, 30 (sampled), 50
    for condition in (0, 1):
        algorithm.rehearsal.offer(torch.tensor([1, 2, 3, 4]), condition)
    algorithm.rehearsal.end_task()
    made = [torch.tensor([[4, 3, 3, 1], [2, 0, 4, 4]]), torch.tensor([[3, 0, 0, 0], [0, 0, 0, 0]])]
    monkeypatch.setattr(TokenVAE, "generate", lambda self, number, condition: made[condition[0]])
    expected = "[airline] (50)<<(30)(30)>>(7)\n\n[airline] (20)\n\n[retail] <<(30)>>\n\n[retail] \n"
    assert algorithm.show_windows(FakeTrainer(None)) == expected


@pytest.fixture(scope="module")
def policies():
    """A policy, and another one with the same tokenizer."""
    return [policy.load_policy("tiny", "float32", "cpu", seed=seed)[0] for seed in (0, 1)]


class FakeTrainer:
    """What the hooks look at."""

    def __init__(self, model, domain="airline", conversations=()):
        self.model, self.domain, self.tokenizer = model, domain, self
        turns = [-1, 0, 0] * 10
        self.trajectories = [Trajectory(domain, token_ids=ids, turns=turns[: len(ids)]) for ids in conversations]
        self.run = Path(tempfile.mkdtemp())

    @staticmethod
    def decode(ids):
        return "".join(f"({token})" for token in ids)


def conversations(seed):
    return torch.randint(3, 60, (12, 16), generator=torch.Generator().manual_seed(seed)).tolist()


def as_symbols(ids):
    return [2 * token + (k % 3 > 0) for k, token in enumerate(ids)]


def train_domain(algorithm, model, domain, conversations) -> FakeTrainer:
    trainer = FakeTrainer(model, domain, conversations)
    assert list(algorithm.extra_losses(trainer)) == []
    algorithm.post_step_hook(trainer, domain)
    algorithm.post_task_hook(trainer, domain)
    return trainer


def trained_agent(policies, **settings):
    algorithm = agent(**settings)
    train_domain(algorithm, policies[0], "airline", conversations(0))
    return algorithm


def half_way(policies):
    """An agent in its second domain, and the trainer."""
    algorithm, trainer = trained_agent(policies), FakeTrainer(policies[0], "retail", conversations(1))
    algorithm.post_step_hook(trainer, "retail")
    algorithm.trainer = trainer
    return algorithm, trainer


def learnt(parts):
    """The value of a loss that comes in parts, each of which adds its gradient."""
    return sum(part.backward() or part.item() for part in parts)


def test_the_policy_is_held_to_the_frozen_ones_distributions(policies, monkeypatch):
    """The loss and its gradient against whole log-softmaxes of two models, in float64."""
    algorithm = trained_agent(policies, replay_weight=0.6)
    frozen_weights = [p.clone() for p in policies[0].parameters()]
    learner = copy.deepcopy(policies[1])
    sampled = [k for k, symbol in enumerate(algorithm.symbols) if symbol % 2]
    read = [k for k, symbol in enumerate(algorithm.symbols) if k and symbol % 2 == 0]
    rows = [[read[0], sampled[3], sampled[1], read[2]], [sampled[4], sampled[0], 0, read[1]], [0, 1, 2, 3]]
    counted = [[1, 2], [1]]  # of each row: those that were sampled, without a first token and what is behind the end
    monkeypatch.setattr(algorithm.rehearsal, "generated", lambda number: (torch.tensor(rows), torch.tensor([0, 0, 0])))
    for chunk, at_once in ((2**26, 3), (1, 3), (2**26, 1)):  # whole; one distribution, one window at a time
        monkeypatch.setattr(policy, "CHUNK", chunk)
        algorithm.windows_at_once = at_once
        learner.zero_grad()
        loss = learnt(algorithm.extra_losses(FakeTrainer(learner, "retail")))
        teacher, student = copy.deepcopy(policies[0]).double(), copy.deepcopy(learner).double()
        student.zero_grad()
        total = 0.0
        for row, places in zip(rows[:2], counted, strict=True):
            ids = torch.tensor([[algorithm.symbols[k] // 2 for k in row[: row.index(0) if 0 in row else None]]])
            for place in places:
                p = teacher(ids).logits[0, place - 1].softmax(-1)
                log_q = student(ids).logits[0, place - 1].log_softmax(-1)
                total = total + (p * (p.log() - log_q)).sum()
        expected = 0.6 * 0.5 * total / 3
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for mine, other in zip(learner.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-3, atol=1e-7)
    assert equal(policies[0].parameters(), frozen_weights)
    assert equal(learner.parameters(), policies[1].parameters())  # only the forward pass had the teacher's weights
    statistics = algorithm.get_statistics()
    assert statistics["windows generated"] == {"airline": 9, "retail": 0}
    assert statistics["distillation KL"]["retail"] == pytest.approx(loss / 0.6 / 0.5, rel=1e-3)
    rows[:] = [[0, 1, 2, 3]] * 3  # nothing is sampled: no gradient
    learner.zero_grad()
    assert learnt(algorithm.extra_losses(FakeTrainer(learner, "retail"))) == 0
    assert not any(p.grad.any() for p in learner.parameters() if p.grad is not None)


def test_the_generator_of_the_agent_is_rehearsed_and_keeps_no_conversation(policies, monkeypatch):
    algorithm = agent()
    first, second = conversations(0), [[60 + token for token in ids] for ids in conversations(1)]
    trainer = FakeTrainer(policies[0], conversations=first)
    algorithm.post_step_hook(trainer, "airline")
    windows = torch.cat([torch.stack(algorithm.as_windows(as_symbols(ids))) for ids in first])
    assert algorithm.rehearsal.memory.seen == 12 * 4 and len(algorithm.rehearsal.memory.items) == 20
    raw = [way[k : k + 4] for ids in first for way in (ids, as_symbols(ids)) for k in range(len(ids) - 3)]
    assert runs_in(algorithm, windows.tolist()) >= 20 and runs_in(first, raw) > 100
    algorithm.post_task_hook(trainer, "airline")
    for held in (algorithm, algorithm.state_dict(), algorithm.rehearsal.tensors()):
        assert runs_in(held, windows.tolist()) == runs_in(held, raw) == 0
    shown = shown_to(algorithm.rehearsal, monkeypatch)
    trainer = FakeTrainer(policies[0], "retail", second)
    algorithm.post_step_hook(trainer, "retail")
    assert len(shown) == 6
    offered = {tuple(w.tolist()) for ids in second for w in algorithm.as_windows(as_symbols(ids))}
    for (new, x, condition), (old, _, old_condition) in shown:
        assert (new, old) == (0.5, 0.5) and set(condition.tolist()) == {1} and set(old_condition.tolist()) == {0}
        assert all(tuple(window) in offered for window in x.tolist())
    algorithm.post_task_hook(trainer, "retail")
    statistics = algorithm.get_statistics()
    assert statistics["bytes of the windows dropped"] == 2 * 20 * 4 * 4
    kept = [*algorithm.rehearsal.old_generator.state_dict().values(), *policies[0].parameters()]
    algorithm.trainer = trainer
    assert algorithm.bytes_kept() == sum(t.nbytes for t in kept)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_domain_without_conversations_is_passed_over(policies, ranks, monkeypatch):
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: None)  # of two equal ranks
    monkeypatch.setattr(distributed, "all_gather_json", lambda value: [value] * ranks)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    algorithm = agent()
    for domain, found in (("airline", []), ("retail", conversations(0))):
        trainer = train_domain(algorithm, policies[0], domain, found)
    assert algorithm.rehearsal.tasks_done == 1 and algorithm.rehearsal.old_conditions == [1]
    learnt(algorithm.extra_losses(trainer))
    generated = algorithm.get_statistics()["windows generated"]
    assert generated["airline"] == 0 < generated["retail"]


def test_statistics_say_how_much_is_copied_and_what_found_no_room(policies, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(generative, "VOCABULARY", 20)
    algorithm = agent(generator_update_freq=1 / 300)
    train_domain(algorithm, policies[0], "airline", [[5, 6, 7, 8]] * 12)
    statistics = algorithm.get_statistics()
    assert statistics["equal to the nearest real window"]["airline"] == 1.0  # there was one to learn
    assert statistics["cut for lack of vocabulary"]["airline"] == 0.0
    algorithm.post_step_hook(FakeTrainer(policies[0], "retail", conversations(0)), "retail")
    assert algorithm.get_statistics()["cut for lack of vocabulary"]["retail"] > 0.9
    assert all(window.any() for window, _ in algorithm.rehearsal.memory.items)
    raw = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0]])
    made = torch.tensor([[1, 2, 9, 9], [9, 2, 3, 4], [1, 2, 0, 0], [0, 0, 0, 0]])
    algorithm.rehearsal.old_generator.generate = lambda number, condition: made
    assert algorithm.likeness(raw, "airline", 4) == pytest.approx((0.5 + 0.75 + 1 + 0) / 4)


def test_generators_and_moments_move_together(policies):
    """As after a resumed run's load, on the CPU; "meta" stands for a GPU."""
    rehearsal = half_way(policies)[0].rehearsal
    rehearsal.to(torch.device("meta"))
    moments = [m for state in rehearsal.generator_optimizer.state.values() for m in (state["exp_avg"], state["step"])]
    tensors = [*rehearsal.generator.state_dict().values(), *rehearsal.old_generator.state_dict().values(), *moments]
    assert len(moments) > 10 and all(t.device.type == "meta" for t in tensors)


@pytest.mark.parametrize("hook", ["post_step_hook", "post_task_hook", "extra_losses"])
def test_every_hook_moves_the_generator_first(policies, monkeypatch, hook):
    """After a load it is on the CPU, and any of them may be the next."""
    algorithm = trained_agent(policies)
    calls = []
    monkeypatch.setattr(algorithm.rehearsal, "to", lambda device: calls.append(device))
    for name in ("offer", "end_task", "generated"):
        original = getattr(algorithm.rehearsal, name)
        monkeypatch.setattr(algorithm.rehearsal, name, lambda *a, f=original: calls.append("used") or f(*a))
    trainer = FakeTrainer(policies[0], "retail", conversations(1))
    list(getattr(algorithm, hook)(trainer, *([] if hook == "extra_losses" else ["retail"])) or ())
    assert calls[0] == policies[0].device and "used" in calls


def test_the_agents_generator_comes_back_from_a_checkpoint(policies, tmp_path):
    algorithm, trainer = half_way(policies)
    other = agent()
    other.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    other.trainer = trainer
    save_file(algorithm.tensors(), tmp_path / "saved")
    with safe_open(tmp_path / "saved", "pt") as tensors:
        other.load_tensors(tensors)
    losses, found = [], []
    for each in (algorithm, other):
        each.post_step_hook(trainer, "retail")
        losses.append(learnt(each.extra_losses(trainer)))
        found.append(sorted(each.rehearsal.tensors().items()))
    assert losses[0] == losses[1]
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    assert equal(*([tensor for _, tensor in tensors] for tensors in found))


WRONG = {"window": 1, "window_batch": 0, "memory_size": 0, "replay_weight": 0.0}
WRONG |= {"generator_update_freq": 0, "generator_dropout": 1.0, "generator_hidden_dims": [0]}


@pytest.mark.parametrize("name", WRONG)
def test_settings_of_the_agent_that_cannot_work_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be (greater|less) than .*, got"):
        agent(**{name: WRONG[name]})


class Louder(GenerativeReplayCL):
    def make_generator(self):
        return TokenVAE(64, self.flags.window, width=8, num_conditions=len(self.order))


def test_another_generator_is_one_method(policies):
    algorithm = Louder(["airline", "retail"], window=4, window_batch=6)
    train_domain(algorithm, policies[0], "airline", conversations(0))
    assert algorithm.rehearsal.old_generator.embedding.weight.shape == (64, 8)
    assert learnt(algorithm.extra_losses(FakeTrainer(policies[1], "retail"))) > 0


def test_the_generators_layers_are_flags():
    generator = agent(generator_hidden_dims=[8, 5], generator_dropout=0.3).rehearsal.generator
    for network, inputs, widths in ((generator.encoder, 4 * 32 + 2, [8, 5]), (generator.decoder, 32 + 2, [5, 8])):
        assert [network[k].in_features for k in (0, 3)] == [inputs, widths[0]]
        assert [network[k].out_features for k in (0, 3)] == widths and network[2].p == network[5].p == 0.3


EVERY = [(1 / 6, [6, 6, 6, 6]), (0.2, [5, 5, 5, 5]), (0.4, [2, 3, 2, 3]), (1, [1, 1, 1]), (3, [0, 0, 1, 0, 0, 1])]


@pytest.mark.parametrize("freq, updates", EVERY)
def test_the_generator_is_updated_every_so_many_steps(policies, monkeypatch, freq, updates):
    """Also by a run that is resumed before each step."""
    trainer, state, found = FakeTrainer(policies[0], conversations=conversations(0)), "{}", []
    for _ in updates:
        algorithm = agent(generator_update_freq=freq)
        algorithm.load_state_dict({**algorithm.state_dict(), **json.loads(state)})
        shown = shown_to(algorithm.rehearsal, monkeypatch)
        algorithm.post_step_hook(trainer, "airline")
        state = json.dumps(algorithm.state_dict())
        found.append(len(shown))
    assert found == updates


# ------------------------------------------------------------------------------------------------------ a whole run


def test_generative_replay_keeps_no_conversation_of_a_finished_domain(tmp_path):
    flags = "--cl_algorithm generative_replay --window 8 --generator_update_freq 0.5 --window_batch 3 --memory_size 100"
    flags += " --generator_hidden_dims 32 16 --generator_dropout 0.1 --task_order airline telecom retail"
    raw, files = {}, []
    post_task_hook = generative.GenerativeReplayCL.post_task_hook

    def look(algorithm, trainer, domain):
        windows = [[k for k in window.tolist() if k] for window, _ in algorithm.rehearsal.memory.items]
        symbols = [[algorithm.symbols[k] for k in window] for window in windows]
        raw[domain] = [windows, symbols, [[symbol // 2 for symbol in window] for window in symbols]]
        post_task_hook(algorithm, trainer, domain)

    remove_old = checkpoint.remove_old

    def removing(run, keep=checkpoint.KEEP):
        remove_old(run, keep)
        left = []
        for folder in checkpoint.checkpoints(run):
            texts = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
            left.append([*texts, *(load_file(path) for path in folder.rglob("*.safetensors"))])
        files.append({"keep": keep, "left": left})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generative.GenerativeReplayCL, "post_task_hook", look)
        patch.setattr(checkpoint, "remove_old", removing)
        summary = small_run(tmp_path, *flags.split(), "--checkpoint_every", "100", "--run_name", "r")
    assert set(raw) == {"airline", "telecom", "retail"} and all(len(windows) > 5 for windows, *_ in raw.values())
    ways = [window for domain in raw.values() for way in domain for window in way if len(window) == 8]
    alone = [found["left"] for found in files if found["keep"] == 1]
    assert [len(left) for left in alone] == [1, 1, 1] and [runs_in(left, ways) for left in alone] == [0, 0, 0]
    assert any(runs_in(found["left"], ways) > 5 for found in files)  # while a domain is trained, its own are there
    statistics = summary["statistics"]
    # Two warm-up steps and two of GRPO in each later domain; three windows a step, evenly over the domains seen.
    assert sum(statistics["windows generated"].values()) == 2 * 4 * 3
    assert statistics["windows generated"]["retail"] == 0 < statistics["windows generated"]["telecom"]
    assert set(statistics["generator loss"]) == {"airline", "telecom", "retail"}
    assert set(statistics["distillation KL"]) == {"telecom", "retail"}
    tokens = sum(len(window) for windows, *_ in raw.values() for window in windows)
    assert statistics["bytes of the windows dropped"] == 4 * tokens
    assert ["extra_loss" in r for r in steps_of(tmp_path / "r")] == [False] * 2 + [True] * 4
    shown = [(tmp_path / "r" / f"generated_after_{d}.txt").read_text() for d in ("airline", "telecom", "retail")]
    counts = [[text.count(f"[{d}]") for d in ("airline", "telecom", "retail")] for text in shown]
    assert counts == [[3, 0, 0], [3, 3, 0], [3, 3, 3]]
    assert all("<<" in text for text in shown)
