"""Measuring an agent and what it has forgotten: pass^k, the transfer matrix, metrics, pictures, comparison of runs.

    python eval.py --model_name_or_path runs/NAME/checkpoints/LAST --domains airline retail telecom
    python eval.py --compare runs/a_seed0 runs/a_seed1 runs/b_seed0 runs/b_seed1
    python eval.py --show runs/NAME --worst 3

Data flow: model + tasks -> episodes -> rewards -> one row of R -> cl_metrics -> report.md and pictures.
"""

import concurrent.futures
import csv
import datetime
import functools
import json
import math
import os
import queue
import re
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

import grpo
import oracle
from oracle import litellm  # which sets what it reads at its import

PASS = 1 - 1e-6  # tau2 counts a reward of 1 as a pass (tau2.metrics.agent_metrics.is_successful)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe for every eye
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))  # tells lines apart in greyscale

# ----------------------------------------------------------------------------------------------- metrics


def pass_hat_k(successes, trials, k) -> float:
    """pass^k = C(successes, k) / C(trials, k): the probability that k trials drawn without replacement all pass
    (tau-bench, Yao et al. 2024, arXiv:2406.12045). Not pass@k.

    >>> pass_hat_k(3, 4, 2)
    0.5
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be between 0 and {trials} trials, got {successes}")
    if not 1 <= k <= trials:
        raise ValueError(f"k must be between 1 and {trials} trials, got {k}")
    return math.comb(successes, k) / math.comb(trials, k)


def cl_metrics(R, baseline=None, joint=None) -> dict:
    """Continual-learning metrics of R (T, T), R[i, j] = score on task j after training task i. Higher is better;
    negate errors first. `baseline` (T,): scores before any training; `joint` (T,): of one model trained on all.

    average             mean_j R[T, j]
    backward_transfer   mean_{i<T} (R[T, i] - R[i, i])                     (Lopez-Paz and Ranzato 2017)
    forward_transfer    mean_{i>=2} (R[i-1, i] - baseline_i)               (None without baseline)
    forgetting          mean_{j<T} (max_{l<T} R[l, j] - R[T, j])           (Chaudhry et al. 2018), in [-1, 1]
    intransigence       mean_k (joint_k - R[k, k])                         (None without joint)
    old_task_mean       mean_{j<T} R[T, j]: what some papers call backward transfer; it cannot show forgetting
    With a single task, what compares tasks is 0.0.

    >>> cl_metrics([[0.8, 0.1], [0.3, 0.9]])["forgetting"]
    0.5
    """
    R = np.array(R, dtype=float)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or len(R) == 0:
        raise ValueError(f"R must be a square matrix, got the shape {R.shape}")
    T = len(R)
    for name, values in (("baseline", baseline), ("joint", joint)):
        if values is not None and len(values) != T:
            raise ValueError(f"{name} must have {T} entries, got {len(values)}")
    old, diagonal = R[-1, :-1], np.diag(R)
    forward = None
    if baseline is not None:
        forward = [R[i - 1, i] - baseline[i] for i in range(1, T)]
        forward = round(float(np.mean(forward)), 12) if forward else 0.0
    return {
        "average": round(float(R[-1].mean()), 12),
        "backward_transfer": round(float((old - diagonal[:-1]).mean()), 12) if T > 1 else 0.0,
        "forward_transfer": forward,
        "forgetting": round(float((R[:-1, :-1].max(0) - old).mean()), 12) if T > 1 else 0.0,
        "intransigence": None if joint is None else round(float((np.array(joint) - diagonal).mean()), 12),
        "old_task_mean": round(float(old.mean()), 12) if T > 1 else 0.0,
    }


def interval(values) -> tuple[float, float]:
    """(mean, half width of the 95% confidence interval) over seeds, by Student's t; nan half width for one value."""
    values = np.asarray(values, dtype=float)
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 0.975, 1 to 9 degrees of freedom
    if len(values) < 2:
        return float(values.mean()), math.nan
    t = quantiles[len(values) - 2] if len(values) - 2 < len(quantiles) else 1.96 + 2.5 / len(values)
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(len(values)))


# -------------------------------------------------------------------------------------------- evaluation


class StopRun(RuntimeError):
    """It makes no sense to go on; the message is for the user."""


def score_and_record(episode, trajectory) -> dict:
    """Sets the trajectory's reward and the episode's `reward_info`, and returns all there is to say of the
    conversation, as JSON. Where environment or evaluator failed, the trajectory is invalid and its reward None."""
    parts, episode.reward_info = {}, None
    if trajectory.valid:
        try:
            episode.reward_info = oracle.score(episode)
            trajectory.reward = episode.reward_info.reward
            parts = oracle.reward_parts(episode.task, episode.reward_info)
        except Exception as error:  # named in the record, and counted
            trajectory.valid, trajectory.error = False, f"{type(error).__name__}: {error}"
    return {
        "time": datetime.datetime.now().isoformat(timespec="seconds"),
        "domain": trajectory.domain,
        "task_id": trajectory.task_id,
        "reward": trajectory.reward if trajectory.valid else None,
        "reward_parts": parts,
        "tool_accuracy": oracle.tool_accuracy(episode),
        "termination": trajectory.termination,
        "error": trajectory.error,
        "tokens": sum(trajectory.action_mask),
        "turns": episode.turns,
        "tool_calls": episode.calls,
        "failed_calls": episode.failed_calls,
        "truncated": trajectory.truncated,
        "messages": [m.model_dump(exclude_none=True, exclude={"timestamp", "requestor"}) for m in episode.messages],
    }


def stop_if_invalid(records, max_share):
    """Raises StopRun when a larger share of the conversations ended in an environment error; names the first."""
    invalid = [r for r in records if r["reward"] is None]
    if len(invalid) > max_share * len(records):
        first = invalid[0]
        raise StopRun(
            f"{len(invalid)} of {len(records)} conversations ended in an error of the environment; the first, in "
            f"{first['domain']} task {first['task_id']}: {first['error']}"
        )


def evaluate_tasks(
    model,
    tokenizer,
    tasks_by_domain,
    num_trials=1,
    user="scripted",
    max_turns=30,
    seed=0,
    max_invalid_share=0.5,
    at_once=256,
    label="evaluate",
    known=(),
    on_records=None,
    on_record=None,
    **sampling,
) -> dict:
    """{domain: metrics} for the given tasks, `at_once` conversations at a time on each rank; all ranks get it.
    `model`: a policy, or the litellm name of one behind an API (then without tokenizer; `sampling`: see `play_api`).
    `sampling`: arguments of grpo.rollout; `known`: records of trials that need not be played; `on_records`: called with
    the list of all conversations' records; `on_record(record, episode)`: called on each rank when one of its
    conversations ends, and may raise to stop. Invalid episodes (environment errors) are counted and left out; StopRun
    above `max_invalid_share` of them. The metrics are those of `measure`, and trials and user.
    """
    if num_trials < 1:
        raise ValueError(f"num_trials must be at least 1, got {num_trials}")
    jobs = [
        (domain, task, trial)
        for trial in range(num_trials)
        for domain, tasks in tasks_by_domain.items()
        for task in tasks
    ]
    done = {(r["domain"], r["task_id"], r["trial"]) for r in known}
    todo = [(domain, task, trial) for domain, task, trial in jobs if (domain, task.id, trial) not in done]
    if isinstance(model, str):
        play = functools.partial(play_api, llm=model, seed=seed, **sampling)
    else:
        generator = grpo.seeded_generator(model.device, seed, grpo.rank(), *([len(done)] if done else []))
        play = functools.partial(grpo.rollout, model, tokenizer, generator=generator, **sampling)
    records = []
    with tqdm(
        total=len(todo[grpo.rank() :: grpo.world_size()]), desc=label, leave=False, disable=grpo.rank() > 0
    ) as bar:
        stride = at_once * grpo.world_size()
        for begin in range(0, len(todo), stride):  # as often on every rank: sharded models are gathered each time
            batch = todo[begin : begin + stride][grpo.rank() :: grpo.world_size()]
            episodes = [oracle.Episode(domain, task, user, max_turns) for domain, task, _ in batch]
            trials = {id(episode): trial for episode, (_, _, trial) in zip(episodes, batch, strict=True)}

            def finish(episode, trajectory, trials=trials):
                records.append({**score_and_record(episode, trajectory), "trial": trials[id(episode)]})
                bar.update()
                if on_record is not None:
                    on_record(records[-1], episode)

            play(episodes=episodes, on_finish=finish)
    records = [record for part in grpo.all_gather_json(records) for record in part]
    wanted = {(domain, task.id, trial) for domain, task, trial in jobs}
    records += [record for record in known if (record["domain"], record["task_id"], record["trial"]) in wanted]
    stop_if_invalid(records, max_invalid_share)
    if on_records is not None:
        on_records(records)
    about = {"trials": num_trials, "user": user}
    return {
        domain: {**measure([r for r in records if r["domain"] == domain], domain, tasks, num_trials), **about}
        for domain, tasks in tasks_by_domain.items()
    }


def play_api(episodes, llm, on_finish, concurrency=16, retries=3, temperature=0.7, max_new_tokens=2048, **llm_args):
    """Plays the episodes with an agent behind an API, by its litellm name, `concurrency` of them at a time; what fails
    `retries` times more, with litellm's back-off, makes its episode invalid. `llm_args`: litellm's (api_base, seed).
    """

    def complete(messages, tools):
        limits = {"temperature": temperature, "max_tokens": max_new_tokens, "num_retries": retries, "timeout": 300}
        response = litellm.completion(llm, messages, tools=tools, tool_choice="auto", **limits, **llm_args)
        return response.choices[0], response.get("usage")

    def converse(episode):
        trajectory = grpo.Trajectory(episode.domain, str(episode.task.id))
        try:
            messages = [{"role": "system", "content": episode.system}, *episode.opening()]
            while not episode.done:
                choice, usage = complete(messages, episode.tools)
                trajectory.action_mask += [True] * (usage.completion_tokens if usage else 0)  # their number is known
                trajectory.truncated_turns += choice.finish_reason == "length"
                calls = [
                    {"id": f"call_{len(messages)}_{k}", "type": "function", "function": call.function.model_dump()}
                    for k, call in enumerate(choice.message.tool_calls or [])
                ]
                said = {"role": "assistant", "content": choice.message.content or "", "tool_calls": calls}
                messages.append(said if calls else {"role": "assistant", "content": said["content"]})
                answers = episode.act(said)
                ids = [call["id"] for call in calls] or [None] * len(answers)
                for answer, call_id in zip(answers, ids, strict=False):
                    messages.append({**answer, "tool_call_id": call_id} if answer["role"] == "tool" else answer)
        except Exception as error:  # of the network, the server, or the user: named in the record, and counted
            trajectory.valid = False
            trajectory.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            episode.stop("agent_error")
        trajectory.termination, trajectory.messages = episode.termination, episode.messages
        return episode, trajectory

    pool = concurrent.futures.ThreadPoolExecutor(concurrency)
    try:
        for future in concurrent.futures.as_completed([pool.submit(converse, episode) for episode in episodes]):
            on_finish(*future.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class PolicyRequest:
    """One answer of a local policy, as an episode of a single turn for grpo.rollout."""

    def __init__(self, messages, tools):
        self.domain, self.task, self.system, self.tools = "request", self, messages[0]["content"], tools
        self.id, self.done, self.termination = "0", False, "user_stop"
        self.messages = [_with_parsed_arguments(message) for message in messages[1:]]
        self.answer = concurrent.futures.Future()
        self.said = None

    def opening(self):
        return self.messages

    def act(self, message):
        self.said, self.done = message, True
        return []


def _with_parsed_arguments(message):
    """As chat templates want it; litellm has a call's arguments as JSON text."""
    calls = [
        {
            "type": "function",
            "function": {"name": c["function"]["name"], "arguments": json.loads(c["function"]["arguments"])},
        }
        for c in message.get("tool_calls") or []
    ]
    plain = {"role": message["role"], "content": message.get("content") or ""}
    return {**plain, "tool_calls": calls} if calls else plain


class PolicyProvider(litellm.CustomLLM):
    """Local policies as models that litellm knows by the name policy/PATH, so that tau2's simulated user can be one.
    Requests that wait at the same time are answered in one batch."""

    def __init__(self, model_dtype, device, max_new_tokens=512):
        super().__init__()
        self.model_dtype, self.device, self.max_new_tokens = model_dtype, device, max_new_tokens
        self.waiting = {}  # path -> queue of requests

    def load(self, path):
        model, tokenizer = grpo.load_policy(path, self.model_dtype, self.device)
        self.waiting[path] = queue.SimpleQueue()
        threading.Thread(target=self.serve, args=(model, tokenizer, self.waiting[path]), daemon=True).start()

    def serve(self, model, tokenizer, waiting):
        while True:
            batch = [waiting.get()]
            time.sleep(0.01)  # others come at about the same time
            while not waiting.empty() and len(batch) < 64:
                batch.append(waiting.get())
            for temperature in {temperature for _, temperature in batch}:
                self.answer(model, tokenizer, [r for r, t in batch if t == temperature], temperature)

    def answer(self, model, tokenizer, requests, temperature):
        played = []
        for request in requests:
            try:
                grpo.check_opening(model, tokenizer, request)
                played.append(request)
            except Exception as error:  # too long, or not for this template: of this request alone
                request.answer.set_exception(error)
        try:
            settings = {"temperature": temperature, "max_new_tokens": self.max_new_tokens}
            trajectories = grpo.rollout(model, tokenizer, played, **settings) if played else []
            for request, trajectory in zip(played, trajectories, strict=True):
                request.answer.set_result((request.said, sum(trajectory.action_mask)))
        except Exception as error:
            for request in played:
                request.answer.set_exception(error)

    def completion(self, model, messages, model_response, optional_params, *args, **kwargs):
        """litellm's interface: fills model_response."""
        request = PolicyRequest(messages, optional_params.get("tools"))
        self.waiting[model].put((request, optional_params.get("temperature", 0.0)))
        said, tokens = request.answer.result()
        calls = []
        for k, call in enumerate(said["tool_calls"]):
            function = call["function"]
            if function["name"] is None:
                raise ValueError(function["error"])
            calls.append(
                {
                    "id": f"call_{k}",
                    "type": "function",
                    "function": {**function, "arguments": json.dumps(function["arguments"])},
                }
            )
        model_response.model = model
        model_response.choices[0].message = litellm.Message(content=said["content"] or None, tool_calls=calls or None)
        model_response.usage = litellm.Usage(prompt_tokens=0, completion_tokens=tokens, total_tokens=tokens)
        return model_response


def policy_of_user(user) -> str | None:
    """PATH of "policy:PATH", None for other users. ValueError where there is no such directory."""
    if not user.startswith("policy:"):
        return None
    path = user.removeprefix("policy:")
    if not Path(path).is_dir():
        raise ValueError(f"user {user}: there is no directory {path}")
    return path


def use_policy_as_user(path, model_dtype, device, **llm_args):
    """Makes the local policy at `path` a user by the name policy:PATH, with tau2's guidelines."""
    provider = PolicyProvider(model_dtype, device)
    provider.load(path)
    litellm.custom_provider_map = [{"provider": "policy", "custom_handler": provider}]
    litellm.utils.custom_llm_setup()
    oracle.use_model_as_user(f"policy/{path}", allowed_openai_params=["tools", "tool_choice"], **llm_args)
    oracle.USERS[f"policy:{path}"] = oracle.USERS.pop(f"policy/{path}")


def measure(records, domain, tasks, num_trials) -> dict:
    """Metrics of one domain's records: reward_mean, reward_low and reward_high (95%, `bootstrap`), reward_std (over
    episodes), pass_rate, pass_hat_1 ... pass_hat_<num_trials>, tool_accuracy (share of gold actions taken), turns,
    truncated, invalid (a number), tasks, reward_parts (the mean of each), and what doing nothing scores:
    do_nothing_rate, do_nothing_parts. Invalid episodes count in turns, truncated and invalid only."""
    valid = [r for r in records if r["reward"] is not None]
    rewards = [r["reward"] for r in valid]
    by_task = [[r["reward"] for r in valid if r["task_id"] == task.id] for task in tasks]
    by_task = [found for found in by_task if found]
    tools = [r["tool_accuracy"] for r in valid if r["tool_accuracy"] is not None]
    low, high = bootstrap([np.mean(found) for found in by_task])

    def mean(values):
        return float(np.mean(values)) if len(values) else 0.0

    metrics = {
        "reward_mean": mean(rewards),
        "reward_low": low,
        "reward_high": high,
        "reward_std": float(np.std(rewards)) if rewards else 0.0,
        "pass_rate": mean([r >= PASS for r in rewards]),
        "tool_accuracy": mean(tools),
        "do_nothing_rate": oracle.do_nothing_reward(domain, tasks),
        "turns": mean([r["turns"] for r in records]),
        "truncated": mean([r["truncated"] for r in records]),
        "invalid": len(records) - len(valid),
        "tasks": len(tasks),
        "reward_parts": oracle.mean_parts([r["reward_parts"] for r in valid]),
        "do_nothing_parts": oracle.do_nothing_parts(domain, tasks),
    }
    for k in range(1, num_trials + 1):
        values = [pass_hat_k(sum(r >= PASS for r in found), len(found), k) for found in by_task if len(found) >= k]
        metrics[f"pass_hat_{k}"] = mean(values)
    return metrics


def bootstrap(*strata, resamples=10_000, seed=0) -> tuple[float, float]:
    """95% interval of the mean of values (one per task) by the percentile bootstrap (Efron 1979); of several strata
    (one per domain), of the mean of their means. (0, 0) without values."""
    strata = [np.asarray(values, dtype=float) for values in strata if len(values)]
    if not strata:
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    means = [v[rng.integers(len(v), size=(resamples, len(v)))].mean(1) for v in strata]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(low), float(high)


def evaluate(model, tokenizer, domain, split="test", max_tasks=None, **kwargs) -> dict:
    """The metrics of one domain's split; see `evaluate_tasks`."""
    tasks = oracle.load_tasks(domain, split, max_tasks)
    return {"split": split, **evaluate_tasks(model, tokenizer, {domain: tasks}, **kwargs)[domain]}


# ---------------------------------------------------------------------------------- what a run looked like


def read_jsonl(path) -> list[dict]:
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def text_matrix(summary) -> str:
    """The transfer matrix as text: a row per training stage, a column per domain."""
    order = summary["task_order"]
    width = max(len(name) for name in order) + 2
    left = max(len(f"after {stage}") for stage in [*summary["stages"], "training"]) + 3
    lines = [" " * left + "".join(f"{name:>{width}s}" for name in order)]
    rows = [("before training", [summary["baseline"][d] for d in order])]
    rows += [(f"after {stage}", row) for stage, row in zip(summary["stages"], summary["R"], strict=True)]
    rows += [("doing nothing", [summary["do_nothing_rate"][d] for d in order])]
    for name, values in rows:
        lines.append(f"{name:{left}s}" + "".join(f"{value:{width}.2f}" for value in values))
    return "\n".join(lines)


def plot_transfer_matrix(summary, path):
    plt = _pyplot()
    order = summary["task_order"]
    rows = [[summary["baseline"][d] for d in order], *summary["R"], [summary["do_nothing_rate"][d] for d in order]]
    names = ["before training", *[f"after {stage}" for stage in summary["stages"]], "doing nothing"]
    figure, axes = plt.subplots(figsize=(3.6, 0.42 * len(rows) + 1.0), layout="constrained")
    axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(order)), order)
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.axhline(len(rows) - 1.5, color="black", linewidth=1)
    axes.axhline(0.5, color="black", linewidth=1)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            trained = i - 1 == j
            axes.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="white" if value > 0.55 else "black",
                fontweight="bold" if trained else "normal",
            )
    axes.set_title(f"mean reward, {summary['split']} split", fontsize=9)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def plot_learning_curves(records, summary, path):
    """Reward and pass rate of a run, see `draw_curves`; in one panel where they are the same (every reward 0 or 1)."""
    plt = _pyplot()
    pairs = [(r["reward_by_domain"], r.get("pass_rate_by_domain")) for r in records if r["kind"] == "step"]
    for r in records:
        if r["kind"] == "evaluation":
            pairs += [(found["reward_mean"], found["pass_rate"]) for found in r["details"].values()]
    labels = {"reward": "mean reward", "pass rate": "pass rate"}
    if all(reward == passed for reward, passed in pairs):
        labels = {"reward": "mean reward = pass rate"}
    size = (6.4, 3.0 if len(labels) == 1 else 4.6)
    figure, panels = plt.subplots(len(labels), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axes, (value, label) in zip(panels[:, 0], labels.items(), strict=True):
        draw_curves(axes, [(records, summary)], value)
        axes.set(ylabel=label)
    previous = 0
    for stage, r in zip(summary["stages"], _at_ends(records), strict=True):
        panels[0, 0].text((previous + r["global_step"]) / 2, 1.06, f"training {stage}", ha="center", fontsize=8)
        previous = r["global_step"]
    panels[-1, 0].set_xlabel("optimiser step")
    title = "lines: rollouts\nfilled: evaluation\nhollow: warm start"
    handles, names = panels[0, 0].get_legend_handles_labels()
    legend = {"loc": "outside right center", "frameon": False, "fontsize": 7, "title_fontsize": 7}
    figure.legend(handles, names, title=title, **legend)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def draw_curves(axes, runs, value):
    """Draws "reward" or "pass rate" of every domain over all training steps of runs (records of metrics.jsonl, summary)
    that differ in seed: of the rollouts as lines (mean of three steps; replayed ones, too), of the evaluations as
    points on top, hollow after the warm start, filled before training and at the domains' ends. Several runs: their
    mean, with the 95% interval over those that have a value there as a band, or bar. Dotted: where a domain ends."""
    for k, domain in enumerate(runs[0][1]["task_order"]):
        style = {"color": COLOURS[k % 6], "linestyle": DASHES[k % 6]}
        curves = [rollout_curve(records, domain, value) for records, _ in runs]
        counts = Counter(x for curve in curves for x in curve)
        steps = np.array(sorted(x for x, number in counts.items() if number >= min(2, len(runs))))  # else no interval
        for part in np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1):  # none where it was not played
            if len(part):
                _draw_band(axes, part, [[c[x] for c in curves if x in c] for x in part], **style, linewidth=1.2)
        for stages, face in ((("baseline", "domain"), COLOURS[k % 6]), (("warmup",), "white")):
            found = {}
            for records, _ in runs:
                of_stages = [r for r in records if r["kind"] == "evaluation" and r["stage"] in stages]
                for place, r in enumerate(r for r in of_stages if domain in r["scores"]):
                    key = "reward_mean" if value == "reward" else "pass_rate"
                    found.setdefault((place, r["global_step"]), []).append(r["details"][domain][key])
            middle = [interval(values) for values in found.values()]
            axes.errorbar(
                [step for _, step in found],
                [mean for mean, _ in middle],
                [0.0 if math.isnan(half) else half for _, half in middle] if len(runs) > 1 else None,
                fmt=MARKERS[k % 6],
                markersize=5,
                color=COLOURS[k % 6],
                markerfacecolor=face,
                markeredgecolor="black" if face != "white" else COLOURS[k % 6],
                elinewidth=0.8,
                label=domain if face != "white" else None,
            )
    for r in _at_ends(runs[0][0]):
        axes.axvline(r["global_step"], color="0.5", linewidth=0.8, linestyle=":")
    axes.set(ylim=(-0.03, 1.03))
    axes.spines[["top", "right"]].set_visible(False)


def _at_ends(records):
    return [r for r in records if r["kind"] == "evaluation" and r["stage"] == "domain"]


def rollout_curve(records, domain, value) -> dict[int, float]:
    """By optimiser step, the mean over it and the two steps before it in which the domain was played."""
    name = "reward_by_domain" if value == "reward" else "pass_rate_by_domain"
    steps = [r for r in records if r["kind"] == "step"]
    points = [(r["global_step"], r[name][domain]) for r in steps if domain in r.get(name, {})]
    y = np.array([y for _, y in points])
    return {x: float(y[max(0, i - 2) : i + 1].mean()) for i, (x, _) in enumerate(points)}


def _draw_band(axes, x, values, **style):
    """A line of means, and where there are several values their 95% intervals."""
    mean, half = np.array([interval(v) for v in values]).T
    half = np.where(np.isnan(half), 0.0, half)
    axes.plot(x, mean, **style, alpha=0.8)
    axes.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.15, lw=0)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def text_forgetting(summary) -> list[str]:
    """A line for each domain but the last: its best score before the end, what is left, and what took most of it."""
    order, stages = summary["task_order"], summary["stages"]
    lines = []
    for j, domain in enumerate(order[:-1]):
        scores = [row[j] for row in summary["R"]]
        best = max(scores[:-1])
        falls = {stages[i]: scores[i - 1] - scores[i] for i in range(1, len(scores))}
        worst = max(falls, key=falls.get)
        line = f"- {domain}: {best:.2f} after {stages[scores.index(best)]}, {scores[-1]:.2f} at the end"
        lost = f"; most was lost while training {worst} ({falls[worst]:.2f})"
        lines.append(line + (lost if falls[worst] > 0 else ""))
    return lines or ["- there was one domain only"]


def write_report(run):
    """report.md, learning_curves.png and transfer_matrix.png from summary.json and metrics.jsonl of a run."""
    run = Path(run)
    summary = json.loads((run / "summary.json").read_text())
    records = read_jsonl(run / "metrics.jsonl")
    plot_transfer_matrix(summary, run / "transfer_matrix.png")
    plot_learning_curves(records, summary, run / "learning_curves.png")
    order = summary["task_order"]
    lines = [f"# {run.name}", "", f"{summary['cl_algorithm']} on {' -> '.join(order)}: {summary['note']}", ""]
    lines += ["| mean reward | " + " | ".join(order) + " |", "|---" * (len(order) + 1) + "|"]
    rows = [("before training", [summary["baseline"][d] for d in order])]
    rows += [(f"after {stage}", row) for stage, row in zip(summary["stages"], summary["R"], strict=True)]
    rows += [("doing nothing", [summary["do_nothing_rate"][d] for d in order])]
    lines += [f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for name, values in rows]
    shown = (
        "reward_mean",
        "reward_std",
        "pass_rate",
        "tool_accuracy",
        "do_nothing_rate",
        "turns",
        "truncated",
        "invalid",
    )
    lines += ["", f"| at the end | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for domain, values in summary["evaluation"].items():
        lines.append(f"| {domain} | " + " | ".join(f"{values[name]:.3f}" for name in shown) + " |")
    lines += ["", "| metric | value |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in summary["metrics"].items() if value is not None]
    lines += ["", "| domain | after the warm start | after GRPO | lift |", "|---|---|---|---|"]
    for i, domain in enumerate(order):
        start, end = summary["warm_start"].get(domain), summary["R"][i][i]
        if start is not None:
            lines.append(f"| {domain} | {start:.3f} | {end:.3f} | {end - start:+.3f} |")
    lines += ["", "![learning curves](learning_curves.png)", "", "![transfer matrix](transfer_matrix.png)", ""]
    lines += ["What was forgotten, and when:", "", *text_forgetting(summary), ""]
    lines += ["Statistics of the algorithm, and versions:", ""]
    lines += ["```", json.dumps(summary["statistics"], indent=1), json.dumps(summary["versions"], indent=1), "```", ""]
    if "command" in summary:
        lines += ["To repeat it:", "", "```", summary["command"], "```", ""]
    temporary = run / "report.tmp"
    temporary.write_text("\n".join(lines))
    temporary.replace(run / "report.md")  # the last file of a run, so that a run with one is whole


# ------------------------------------------------------------------------------------------ conversations

ANSI = {"assistant": 36, "user": 33, "tool": 90, "system": 35, "call": 32, "good": 32, "bad": 31, "title": 1}


def read_conversations(folder) -> list[dict]:
    """The records of a training run or of an evaluation, in the order in which they were written."""
    folder = Path(folder)
    paths = [folder / "trajectories.jsonl", *sorted(folder.glob("trials*.jsonl"))]
    records = []
    for path in paths:
        records += read_whole_lines(path) if path.is_file() else []
    if not records:
        raise ValueError(f"{folder} has no conversations: neither trajectories.jsonl nor trials.jsonl")
    return records


def show_conversations(folder, worst=5, task=None, unfold=False, colour=False) -> str:
    """The `worst` conversations of a folder, those with the least reward first and of equal ones the latest; of `task`
    only, if it is given. What tools get and return is cut to a line unless `unfold`."""
    if worst < 1:
        raise ValueError(f"worst must be at least 1, got {worst}")
    records = [r for r in read_conversations(folder) if r["reward"] is not None]
    if task is not None:
        known = sorted({r["task_id"] for r in records})
        records = [r for r in records if r["task_id"] == task]
        if not records:
            raise ValueError(f"there is no conversation of task {task!r} in {folder}; there are {', '.join(known)}")
    chosen = sorted(reversed(records), key=lambda r: r["reward"])[:worst]
    return "\n\n".join(text_conversation(r, unfold, colour) for r in chosen)


def text_conversation(record, unfold=False, colour=False) -> str:
    """One conversation: a line or paragraph per message, tool calls as function(arguments), the reward at the end."""

    def paint(kind, text):
        return f"\033[{ANSI[kind]}m{text}\033[0m" if colour else text

    def clean(text):
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)  # a model's text may hold escapes

    def fold(text):
        line = " ".join(text.split())
        return line if unfold or len(line) <= 100 else f"{line[:100]} ... ({len(line)} characters)"

    position = [f"step {record['global_step']}"] if "global_step" in record else []
    position += [f"trial {record['trial']}"] if "trial" in record else []
    lines = [paint("title", f"{record['domain']} task {record['task_id']}, {', '.join(position)}")]
    for message in record["messages"] if "messages" in record else record["simulation"]["messages"]:
        role, text = message["role"], clean(message.get("content") or "")
        if text:
            lines.append(paint(role, f"[{role}] {fold(text) if role == 'tool' else text}"))
        for call in message.get("tool_calls") or []:
            lines.append(paint("call", clean(f"[{role}] {call['name']}({fold(json.dumps(call['arguments']))})")))
    parts = ", ".join(f"{name} {value:g}" for name, value in record["reward_parts"].items())
    accuracy = "" if record["tool_accuracy"] is None else f"; gold actions taken: {record['tool_accuracy']:.2f}"
    outcome = f"reward {record['reward']:g} ({parts}); ended by {record['termination']}{accuracy}"
    lines.append(paint("good" if record["reward"] >= PASS else "bad", outcome))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- comparing runs


@dataclass
class Group:
    """Finished runs that differ in seed only."""

    name: str
    summaries: dict[int, dict]  # by seed
    folders: dict[int, Path]

    @property
    def algorithm(self):
        return next(iter(self.summaries.values()))["cl_algorithm"]

    def values(self, metric, seeds=None) -> list[float]:
        """One of `cl_metrics`, minutes, or bytes_kept, of each run."""
        chosen = [self.summaries[seed] for seed in (sorted(self.summaries) if seeds is None else seeds)]
        return [s["metrics"][metric] if metric in s["metrics"] else s.get(metric, 0) for s in chosen]

    def lifts(self) -> dict[str, float]:
        """By domain, what GRPO added to the mean reward after the warm start, a mean over seeds."""
        first = next(iter(self.summaries.values()))
        return {
            domain: float(np.mean([s["R"][i][i] - s["warm_start"][domain] for s in self.summaries.values()]))
            for i, domain in enumerate(first["task_order"])
            if domain in first["warm_start"]
        }


OF_A_RUN = ("cl_algorithm", "seed", "run_name", "resume", "runs_dir")  # settings that do not name a row


def group_runs(runs) -> tuple[list[Group], str]:
    """Runs grouped by configuration, named by the settings in which a group differs from most; and a line that says
    what these are where they are not named. Raises ValueError for what is no finished run, or counts twice."""
    found = {}
    for run in runs:
        path = Path(run) / "summary.json"
        if not path.is_file():
            raise ValueError(f"{run} is not a finished run: there is no {path}")
        try:
            summary = json.loads(path.read_text())
            config = {k: v for k, v in summary["config"].items() if k == "cl_algorithm" or k not in OF_A_RUN}
            missing = {"R", "metrics", "task_order", "minutes", "warm_start", "cl_algorithm"} - set(summary)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
        if missing:
            raise ValueError(f"{path} is damaged: it has no {', '.join(sorted(missing))}")
        group = found.setdefault(json.dumps(config, sort_keys=True), Group("", {}, {}))
        seed = summary["config"]["seed"]
        if seed in group.summaries:
            raise ValueError(f"{run} has the settings and the seed {seed} of another run: each counts once")
        group.summaries[seed], group.folders[seed] = summary, Path(run)
    configs = [next(iter(group.summaries.values()))["config"] for group in found.values()]
    optional = {key for config in configs for key, value in config.items() if value is None}
    settings = {}  # the values of each, in the groups that have it: runs of an earlier version have fewer
    for config in configs:
        config.update({key: None for key in sorted(optional - set(config))})
        for key, value in config.items():
            if key not in OF_A_RUN:
                settings.setdefault(key, []).append(json.dumps(value))
    usual = {key: Counter(values).most_common(1)[0][0] for key, values in settings.items()}
    for group, config in zip(found.values(), configs, strict=True):
        other = [key for key in config if key in usual and json.dumps(config[key]) != usual[key]]
        group.name = ", ".join([group.algorithm, *[f"{key} {config[key]}" for key in other]])
    shared = set.intersection(*(set(config) for config in configs))
    counts = Counter(group.name for group in found.values())
    for group, config in zip(found.values(), configs, strict=True):
        if counts[group.name] > 1:  # they differ in what an earlier version did not have
            group.name = ", ".join([group.name, *[f"{k} {v}" for k, v in config.items() if k not in shared]])
    varied = [f"{key} {json.loads(usual[key])}" for key, values in settings.items() if len(set(values)) > 1]
    note = f"Where not named: {', '.join(varied)}." if varied else ""
    return list(found.values()), note


def compare(runs, output=None) -> str:
    """Markdown tables of runs grouped by configuration: mean and 95% interval over seeds of each metric, minutes, time
    as a ratio to sequential, and kilobytes remembered; below, what differs from sequential, run by run of the same
    seed. With `output` (a directory), also comparison.md, comparison.csv (a row per run) and the pictures."""
    groups, note = group_runs(runs)
    base = next((group for group in groups if group.algorithm == "sequential"), None)
    names = ["algorithm", "seeds", "forgetting", "average", "backward transfer", "least lift by GRPO", "minutes"]
    names += ["time / seq.", "kept, kB"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for group in groups:
        lifts = group.lifts()
        least = min(lifts, key=lifts.get) if lifts else None
        ratio = f"{np.mean(group.values('minutes')) / np.mean(base.values('minutes')):.2f}" if base else ""
        columns = [_cell(group.values(metric)) for metric in ("forgetting", "average", "backward_transfer")]
        columns += [f"{lifts[least]:+.2f} ({least})" if least else "", _cell(group.values("minutes")), ratio]
        columns.append(f"{np.mean(group.values('bytes_kept')) / 1000:.1f}")
        lines.append(f"| {group.name} | {len(group.summaries)} | " + " | ".join(columns) + " |")
    if note:
        lines += ["", note]
    paired = {
        group.name: sorted(set(group.summaries) & set(base.summaries)) for group in groups if base and group is not base
    }
    if any(paired.values()):
        lines += ["", "| less sequential's, by seed | seeds | forgetting | average |", "|---|---|---|---|"]
    for group in groups:
        seeds = paired.get(group.name)
        if seeds:
            pairs = [np.subtract(group.values(m, seeds), base.values(m, seeds)) for m in ("forgetting", "average")]
            lines.append(f"| {group.name} | {len(seeds)} | " + " | ".join(_cell(p, "+.2f") for p in pairs) + " |")
    table = "\n".join(lines)
    if output is not None:
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "comparison.md").write_text(table + "\n")
        write_comparison_csv(groups, output / "comparison.csv")
        plot_comparison(groups, base, output / "comparison.png")
        plot_curves_over_seeds(groups, output / "learning_curves.png")
    return table


def _cell(values, form=".2f"):
    mean, half = interval(values)
    return f"{mean:{form}}" if math.isnan(half) else f"{mean:{form}} ± {half:.2f}"


def write_comparison_csv(groups, path):
    """A row per run: its group, seed, metrics, minutes, bytes kept, and R row by row."""
    metrics = list(next(iter(groups[0].summaries.values()))["metrics"])
    order = next(iter(groups[0].summaries.values()))["task_order"]
    entries = [f"{domain} after {stage}" for stage in order for domain in order]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["algorithm", "seed", *metrics, "minutes", "bytes_kept", *entries])
        for group in groups:
            for seed, s in sorted(group.summaries.items()):
                cells = [s["metrics"].get(metric) for metric in metrics]
                row = [value for values in s["R"] for value in values]
                writer.writerow([group.name, seed, *cells, s["minutes"], s.get("bytes_kept", 0), *row])


def plot_comparison(groups, base, path):
    """Forgetting against time, means over seeds with their 95% intervals of forgetting; down and left is better."""
    plt = _pyplot()
    names = ["\n".join(textwrap.wrap(group.name, 40)) for group in groups]
    height = 0.13 * sum(name.count("\n") + 1.4 for name in names) + 1.0
    figure, axes = plt.subplots(figsize=(6.4, max(2.8, height)), layout="constrained")
    minutes = np.mean(base.values("minutes")) if base else 1.0
    for k, group in enumerate(groups):
        mean, half = interval(group.values("forgetting"))
        axes.errorbar(
            np.mean(group.values("minutes")) / minutes,
            mean,
            None if math.isnan(half) else half,
            fmt=MARKERS[k % 6],
            color=COLOURS[(k + k // 6) % 6],  # 36 pairs of marker and colour, filled and hollow in turn
            markerfacecolor=COLOURS[(k + k // 6) % 6] if k // 6 % 2 == 0 else "white",
            markersize=5,
            capsize=2,
            elinewidth=0.7,
            label=names[k],
        )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="time / sequential's" if base else "minutes", ylabel="forgetting")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def plot_curves_over_seeds(groups, path):
    """A panel per group: `draw_curves` of its runs where they have their metrics.jsonl; else the reward after each
    stage. Means with 95% intervals over seeds."""
    plt = _pyplot()
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    size = (2.4 * columns, 1.7 * rows + 0.5)
    figure, panels = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes in panels.flat[len(groups) :]:
        axes.axis("off")
    for place, (axes, group) in enumerate(zip(panels.flat, groups, strict=False)):
        seeds = sorted(group.summaries)
        files = [group.folders[seed] / "metrics.jsonl" for seed in seeds]
        if all(file.is_file() for file in files):
            runs = [(read_jsonl(file), group.summaries[seed]) for file, seed in zip(files, seeds, strict=True)]
            draw_curves(axes, runs, "reward")
            axes.set_xlabel("optimiser step" if place + columns >= len(groups) else "", fontsize=7)
            axes.tick_params(axis="x", labelsize=6)
        else:
            _draw_stages(axes, [group.summaries[seed] for seed in seeds])
            axes.tick_params(axis="x", labelbottom=place + columns >= len(groups))
        axes.set_title("\n".join(textwrap.wrap(group.name, 34)), fontsize=7)
        axes.tick_params(axis="y", labelsize=6)
        axes.set(ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    figure.supylabel("mean reward", fontsize=8)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=7)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _draw_stages(axes, summaries):
    order = summaries[0]["task_order"]
    scores = np.array([[[s["baseline"][d] for d in order], *s["R"]] for s in summaries])  # (seeds, stages + 1, T)
    x = np.arange(scores.shape[1])
    for k, domain in enumerate(order):
        style = {"color": COLOURS[k % 6], "linestyle": DASHES[k % 6], "marker": MARKERS[k % 6], "markersize": 4}
        _draw_band(axes, x, scores[:, :, k].T, label=domain, **style)
    axes.set_xticks(x, ["start", *[f"after {d}" for d in order]], rotation=30, ha="right", fontsize=6)


# ------------------------------------------------------------------------------------------- the script


@dataclass
class Args:
    """Evaluates a policy on tau2 domains, or compares finished runs."""

    model_name_or_path: str | None = None
    """a checkpoint directory or hub name of a causal LM with a chat template that takes tools; or a litellm name, as
    openai/NAME with --api_base, anthropic/NAME"""
    api_base: str | None = None
    """the model is served here, by an OpenAI-compatible API"""
    domains: list[str] = field(default_factory=lambda: list(oracle.DOMAINS))
    """tau2 domains to evaluate on"""
    split: str | None = None
    """tau2's split; default: what the checkpoint's run evaluated on, else test"""
    max_tasks: int | None = None
    """the first so many tasks of each split; default: the tasks the checkpoint's run evaluated on, else all"""
    num_trials: int = 1
    """episodes per task; pass^1 to pass^num_trials are reported"""
    user: str = "scripted"
    """scripted, scripted-tools (telecom with the user's own tools), solo, or for tau2's simulated user a litellm name
    (openai/NAME), or policy:PATH for a local model"""
    user_api_base: str | None = None
    """that user's model is served here"""
    user_temperature: float = 0.0
    """of that user"""
    retrieval: str | None = None
    """banking_knowledge (tau2 1.0): how the agent reads its documents; bm25, bm25_grep, grep_only, golden_retrieval,
    full_kb, no_knowledge, or another of tau2's that needs a server; default: the checkpoint's run's, else bm25"""
    judge: str | None = None
    """litellm name of the model that judges assertions in words (tau2 1.0's retail); default: they are left out"""
    judge_api_base: str | None = None
    """that model is served here"""
    temperature: float | None = None
    """sampling temperature; default: the checkpoint's run's, else 0.7"""
    max_new_tokens: int | None = None
    """tokens per agent turn; default: the checkpoint's run's, else 2048"""
    max_turns: int | None = None
    """agent turns per conversation; default: the checkpoint's run's, else 30"""
    model_dtype: str | None = None
    """what is computed in; default: the checkpoint's run's, else bfloat16"""
    seed: int = 0
    """of the sampling"""
    output: str | None = None
    """directory for conversations, metrics and tau2's results; trials found there are not repeated (default:
    runs/evaluation_MODEL_SPLIT_USER). With --compare, for table and pictures (default: runs/comparison)"""
    retries: int = 3
    """further tries of a request to an API"""
    at_once: int = 256
    """conversations at a time on each rank"""
    compare: list[str] = field(default_factory=list)
    """compare these finished runs instead: Markdown tables, CSV, pictures"""
    show: str | None = None
    """print conversations of this run or evaluation instead, those with the least reward first"""
    worst: int = 5
    """show: so many"""
    task: str | None = None
    """show: of the task of this id only"""
    unfold: bool = False
    """show: what tools get and return in full"""


def _run_config(model_name_or_path) -> dict:
    """How the run that wrote this checkpoint evaluated; {} for any other model."""
    path = Path(model_name_or_path).resolve().parent.parent / "config.json"
    return json.loads(path.read_text()) if path.is_file() and Path(model_name_or_path).is_dir() else {}


def _resolved(name, prefix="") -> str:
    """A checkpoint by the directory it is now: LAST is another one later, whose trials must not be taken for these."""
    path = Path(name.removeprefix(prefix))
    return prefix + str(path.resolve()) if name.startswith(prefix) and path.is_dir() else name


def evaluation_settings(args: Args) -> tuple[dict, dict]:
    """(what decides the outcome of a trial, as JSON; tasks by domain). ValueError for what cannot be measured."""
    if args.model_name_or_path is None:
        raise ValueError("name a model with --model_name_or_path, or runs with --compare")
    if not args.domains or len(set(args.domains)) != len(args.domains):
        raise ValueError(f"domains must name each domain once, got {args.domains}")
    for name in ("num_trials", "at_once"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    oracle.use_judge(args.judge, args.judge_api_base)
    config = _run_config(args.model_name_or_path)
    oracle.use_retrieval(args.retrieval or config.get("retrieval", oracle.OFFLINE_RETRIEVAL[0]))
    usual = {"temperature": 0.7, "max_new_tokens": 2048, "max_turns": 30, "model_dtype": "bfloat16"}
    given = {name: getattr(args, name) for name in usual if getattr(args, name) is not None}
    limits = ("max_context", "max_user_tokens", "max_tool_tokens")
    is_model_user = "/" in args.user or args.user.startswith("policy:")
    settings = {
        "model": _resolved(args.model_name_or_path),
        "split": args.split or config.get("eval_split", "test"),
        "user": _resolved(args.user, "policy:"),
        "api_base": args.api_base,
        "judge": args.judge,
        **({"user_api_base": args.user_api_base, "user_temperature": args.user_temperature} if is_model_user else {}),
        **{name: given.get(name, config.get(name, value)) for name, value in usual.items()},
        **{name: config.get(name) for name in limits},
        "seed": args.seed,
        **oracle.data_version(),
        **({"retrieval": oracle.RETRIEVAL} if "banking_knowledge" in args.domains else {}),
    }
    for name in ("max_new_tokens", "max_turns"):
        if settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")
    for name, value in (("temperature", settings["temperature"]), ("user_temperature", args.user_temperature)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    is_policy = policy_of_user(args.user) is not None
    if is_model_user and not is_policy:
        oracle.use_model_as_user(args.user, args.user_api_base, temperature=args.user_temperature, seed=args.seed)
    if not is_policy and args.user not in (*oracle.USERS, "solo"):
        known = ", ".join([*oracle.USERS, "solo"])
        raise ValueError(f"unknown user {args.user!r}; choose one of {known}, or a litellm name such as openai/NAME")
    tasks = {}
    for domain in args.domains:
        chosen = config.get("eval_tasks", {}).get(domain) if (args.split or args.max_tasks) is None else None
        everything = oracle.load_tasks(domain, settings["split"], args.max_tasks)
        tasks[domain] = [t for t in everything if t.id in chosen] if chosen else everything
    return settings, tasks


def read_trials(folder) -> list[dict]:
    """The trials in a folder, each once; a line that a kill cut short is left out."""
    found = {}
    for path in sorted(folder.glob("trials*.jsonl")):
        for record in read_whole_lines(path):
            found[record["domain"], record["task_id"], record["trial"]] = record
    return list(found.values())


def read_whole_lines(path) -> list[dict]:
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    return found


def merge_trials(folder) -> list[dict]:
    """All ranks' trials in one file, trials.jsonl; a kill at any moment loses none."""
    records = read_trials(folder)
    temporary = folder / "trials.tmp"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    temporary.replace(folder / "trials.jsonl")
    for path in folder.glob("trials_*.jsonl"):
        path.unlink()
    return records


def open_folder(folder, settings) -> list[dict]:
    """Makes the folder, or takes it up where it was left. Returns the valid trials in it. Raises ValueError where they
    were made with other settings."""
    problem = grpo.all_gather_json(_wrong_folder(folder, settings) if grpo.rank() == 0 else None)[0]
    if problem is not None:
        raise ValueError(f"{problem}; choose another --output")
    if grpo.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", settings)
        merge_trials(folder)
    grpo.barrier()
    return [record for record in read_trials(folder) if record["reward"] is not None]


def _wrong_folder(folder, settings) -> str | None:
    path = folder / "config.json"
    if not path.is_file():
        return f"{folder} is not empty and holds no evaluation" if folder.is_dir() and any(folder.iterdir()) else None
    before = json.loads(path.read_text())
    other = next((name for name in settings if before.get(name) != settings[name]), None)
    return other and f"the trials in {folder} were made with {other} {before.get(other)}, not {settings[other]}"


def write_json(path, value):
    """Written aside and renamed: a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def is_api_model(name, api_base=None) -> bool:
    """Whether that is a model behind an API, by its litellm name."""
    return api_base is not None or (not Path(name).is_dir() and name.split("/")[0] in litellm.provider_list)


def run_evaluation(args: Args):
    """Plays what is missing, then writes metrics.json and tau2's results, and prints the table."""
    settings, tasks = evaluation_settings(args)
    device = grpo.init_distributed()
    slug = re.sub(r"[^\w.-]+", "_", f"{settings['model']}_{settings['split']}_{settings['user']}")
    folder = Path(args.output or f"runs/evaluation_{slug}")
    if is_api_model(args.model_name_or_path, args.api_base):
        model, tokenizer = args.model_name_or_path, None
        sampling = {"api_base": args.api_base} if args.api_base is not None else {}
        if args.api_base is not None:
            sampling["api_key"] = os.environ.get("OPENAI_API_KEY", "none")
        sampling.update({name: settings[name] for name in ("temperature", "max_new_tokens")}, retries=args.retries)
    else:
        model, tokenizer = grpo.load_policy(args.model_name_or_path, settings["model_dtype"], device)
        names = ("temperature", "max_new_tokens", "max_context", "max_user_tokens", "max_tool_tokens")
        sampling = {name: settings[name] for name in names}
    known = open_folder(folder, settings)
    path = policy_of_user(args.user)
    if path:
        use_policy_as_user(path, settings["model_dtype"], device, temperature=args.user_temperature)

    def keep(record, episode):
        simulation = oracle.simulation(episode, episode.reward_info, record["trial"], args.seed)
        rest = {name: value for name, value in record.items() if name != "messages"}
        with open(folder / f"trials_{grpo.rank()}.jsonl", "a") as lines:
            lines.write(json.dumps({**rest, "simulation": simulation.model_dump(mode="json")}) + "\n")

    metrics = evaluate_tasks(
        model,
        tokenizer,
        tasks,
        num_trials=args.num_trials,
        at_once=args.at_once,
        known=known,
        on_record=keep,
        user=args.user,
        max_turns=settings["max_turns"],
        seed=args.seed,
        **sampling,
    )
    grpo.barrier()
    if grpo.rank() > 0:
        return
    records = merge_trials(folder)
    metrics = {**metrics, "overall": overall(metrics, records, tasks)}
    write_json(folder / "metrics.json", {**settings, "num_trials": args.num_trials, "metrics": metrics})
    for domain in tasks:
        wanted = {task.id for task in tasks[domain]}
        simulations = [
            r["simulation"]
            for r in records
            if r["domain"] == domain
            and r["task_id"] in wanted
            and r["trial"] < args.num_trials
            and r["reward"] is not None
        ]
        about = {"model": settings["model"], "user": args.user, "max_turns": settings["max_turns"], "seed": args.seed}
        results = oracle.tau2_results(domain, tasks[domain], simulations, num_trials=args.num_trials, **about)
        (folder / "tau2").mkdir(exist_ok=True)
        results.save(folder / "tau2" / f"{domain}.json")
    table = text_metrics(metrics)
    (folder / "table.md").write_text(table + "\n")
    print(
        f"{settings['model']}, {settings['split']} split, {args.user} user, {settings['tau2']}\n\n{table}\n\n{folder}"
    )


def overall(metrics, records, tasks) -> dict:
    """Means over the domains, each domain counting the same; the interval is over tasks within domains."""
    names = [name for name, value in next(iter(metrics.values())).items() if isinstance(value, float)]
    found = {name: float(np.mean([values[name] for values in metrics.values()])) for name in names}
    by_task = []
    for domain, chosen in tasks.items():
        rewards = [
            [
                r["reward"]
                for r in records
                if (r["domain"], r["task_id"]) == (domain, task.id) and r["reward"] is not None
            ]
            for task in chosen
        ]
        by_task.append([np.mean(values) for values in rewards if values])
    found["reward_low"], found["reward_high"] = bootstrap(*by_task)
    return {**found, **{name: sum(values[name] for values in metrics.values()) for name in ("invalid", "tasks")}}


def text_metrics(metrics) -> str:
    """A Markdown table: a row per metric, a column per domain. In brackets, what doing nothing scores."""
    parts = sorted({part for values in metrics.values() for part in values.get("reward_parts", {})})
    trials = sorted(int(name.removeprefix("pass_hat_")) for name in metrics["overall"] if name.startswith("pass_hat_"))

    def row(name, cell):
        cells = [cell(values) for values in metrics.values()]
        return [name, *cells]

    def part_cell(part):
        def cell(values):
            if part not in values.get("reward_parts", {}):
                return ""
            return f"{values['reward_parts'][part]:.3f} ({values['do_nothing_parts'].get(part, 0):.3f})"

        return cell

    rows = [
        row("reward (doing nothing)", lambda v: f"{v['reward_mean']:.3f} ({v['do_nothing_rate']:.3f})"),
        row("95% interval", lambda v: f"{v['reward_low']:.3f} ... {v['reward_high']:.3f}"),
        *[row(f"pass^{k}", lambda v, k=k: f"{v[f'pass_hat_{k}']:.3f}") for k in trials],
        *[row(f"part {part}", part_cell(part)) for part in parts],
        row("gold actions taken", lambda v: f"{v['tool_accuracy']:.3f}"),
        row("turns", lambda v: f"{v['turns']:.1f}"),
        row("truncated", lambda v: f"{v['truncated']:.3f}"),
        row("invalid conversations", lambda v: f"{v['invalid']}"),
        row("tasks", lambda v: f"{v['tasks']}"),
    ]
    rows = [["", *metrics], *rows]
    widths = [max(len(cells[k]) for cells in rows) for k in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def main():
    import tyro

    args = tyro.cli(Args)
    try:
        if args.show:
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            print(show_conversations(args.show, args.worst, args.task, args.unfold, colour))
        elif args.compare:
            output = args.output or "runs/comparison"
            print(f"{compare(args.compare, output)}\n\n{output}/comparison.png, learning_curves.png, comparison.csv")
        else:
            run_evaluation(args)
    except (ValueError, OSError, StopRun) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
