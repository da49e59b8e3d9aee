"""The examples: the tour is executed, the scripts are run, and the documents' own snippets do what they say."""

import importlib
import inspect
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from law import ROOT, SMALL, small_args, steps_of
from nbclient import NotebookClient

import oracle
import report
from replay import CLAlgorithm, ReplayCL
from train import Args as GRPOConfig
from train import train

# ------------------------------------------------------------------------------------------------------------ the tour

TOUR = ROOT / "examples" / "tour.ipynb"


def outputs(cell) -> list[tuple]:
    """(kind, text) of each output; pictures without their pixels, and without text if the cell varies by machine."""
    found = [(o.output_type, o.get("text", o.get("data", {}).get("text/plain"))) for o in cell.get("outputs", [])]
    return [(kind, None) for kind, _ in found] if "varies" in cell.metadata.get("tags", []) else found


def test_the_tour_runs_and_its_outputs_are_those_committed(tmp_path):
    committed, fresh = nbformat.read(TOUR, 4), nbformat.read(TOUR, 4)
    place = {"resources": {"metadata": {"path": str(TOUR.parent)}}}
    NotebookClient(fresh, timeout=600, record_timing=False, coalesce_streams=True, **place).execute()
    fresh.metadata.language_info = {"name": "python"}  # without its version
    nbformat.write(fresh, tmp_path / TOUR.name)
    for new, old in zip(fresh.cells, committed.cells, strict=True):
        assert outputs(new) == outputs(old), f"cell {old.id}; to renew: cp {tmp_path / TOUR.name} {TOUR}"


@pytest.mark.parametrize("folder", [ROOT, TOUR.parent])
def test_the_tour_finds_the_repository(monkeypatch, folder):
    [setup] = [cell.source for cell in nbformat.read(TOUR, 4).cells if cell.id == "setup"]
    found = {}
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", list(sys.path))
    exec(setup.replace("%matplotlib inline\n", ""), found)
    assert found["ROOT"] == ROOT


def test_the_committed_tour_is_small_and_tells_nothing_of_a_machine():
    notebook = nbformat.read(TOUR, 4)
    assert TOUR.stat().st_size < 600_000
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    pictures = 0
    for cell in code:
        assert set(cell.metadata) <= {"tags"}
        for output in cell.outputs:
            assert output.output_type in ("execute_result", "display_data") or output.name == "stdout"
            data = output.get("data", {"text/plain": output.get("text")})
            assert not re.search(r"/(tmp|home|root|work|usr|var|Users)\b|\d\d:\d\d:\d\d", data["text/plain"])
            pictures += "image/png" in data
            assert len(data.get("image/png", "")) < 100_000 * 4 / 3  # base64
    assert pictures == 3


# --------------------------------------------------------------------------------------------------------- the scripts

REPLAY = ROOT / "examples" / "replay_example.py"
STEPS = ["--num_steps_per_task", "3"]  # 12 conversations of each domain: enough for min_buffer_size


def run_example(monkeypatch, tmp_path, *flags) -> list[Path]:
    """Runs the script as a user would. Returns its runs in the order of their making."""
    monkeypatch.setattr("sys.argv", [str(REPLAY), *flags, *SMALL, *STEPS, "--runs_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPLAY), run_name="__main__")
    if stop.value.code:
        raise stop.value
    return sorted(tmp_path.iterdir(), key=lambda run: (run / "config.json").stat().st_mtime)


def replayed(run) -> set[str]:
    """The domains that were replayed in a run's GRPO."""
    return {r["domain"] for r in report.read_jsonl(run / "trajectories.jsonl") if r.get("replayed")}


def statistics(run) -> dict:
    return report.read_summary(run)["statistics"]


def test_the_script_has_80_lines_at_most():
    assert len(REPLAY.read_text().splitlines()) <= 80


def test_basic_replays_at_its_ratio(monkeypatch, tmp_path):
    [run] = run_example(monkeypatch, tmp_path, "basic")
    assert statistics(run)["replay_ratio"] == 0.2
    assert replayed(run) == {"airline"}


def test_adaptive_begins_at_its_ratio(monkeypatch, tmp_path):
    [run] = run_example(monkeypatch, tmp_path, "adaptive")
    assert [step["replay_ratio"] for step in steps_of(run)] == [0.2] * 6
    assert replayed(run) == {"airline"}


def test_custom_uses_its_three_hooks(monkeypatch, tmp_path, capsys):
    [run] = run_example(monkeypatch, tmp_path, "custom")
    assert [step["old_tasks"] for step in steps_of(run)] == [0, 0, 0, 1, 1, 1]
    assert replayed(run) == {"airline"}
    shown = capsys.readouterr().out
    assert "the buffer after airline: {'buffer_sizes': {'airline': 12}" in shown
    assert (
        "the buffer after telecom: {'buffer_sizes': {'airline': 18, 'telecom': 12}" in shown
    )  # replayed ones are offered, too


def test_compare_prints_a_row_for_each_algorithm(monkeypatch, tmp_path, capsys):
    runs = run_example(monkeypatch, tmp_path, "compare")
    table = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert table[0][2:-1] == ["average", "backward_transfer", "forgetting", "minutes", "bytes_kept"]
    assert [row[1] for row in table[2:]] == ["sequential", "replay 0.2", "replay 0.5", "adaptive"]
    kept = [report.read_summary(run)["bytes_kept"] for run in runs]
    assert [float(row[-2]) for row in table[2:]] == kept and kept[0] == 0 < min(kept[1:])
    assert [bool(replayed(run)) for run in runs] == [False, True, True, True]


@pytest.mark.parametrize("flags, message", [(["--replay_ratio", "3"], "must be less than 1, got 3.0"), ([], "exists")])
def test_bad_settings_are_one_line(monkeypatch, tmp_path, capsys, flags, message):
    (tmp_path / "taken").mkdir()
    with pytest.raises(SystemExit) as stop:
        run_example(monkeypatch, tmp_path, "basic", "--run_name", "taken", *flags)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("replay_example.py: ") and message in line


# --------------------------------------------------------------------------------------------- the documents' snippets


class SelectiveReplayCL(ReplayCL):
    def _sample_replay_tasks(self, previous_domains, num_samples):
        tasks = []
        for domain in previous_domains:
            trajectories = self._trainer.trajectory_buffer.sample(domain, num_samples, strategy="high_reward")
            tasks.extend(t.task for t in trajectories if t.reward > 0.7)
        return tasks[:num_samples]


class CustomReplayCL(ReplayCL):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.step_count = 0
        self.finished = []

    def augment_batch(self, new_tasks, current_domain):
        task_order = self.trainer.config.task_order
        previous_domains = task_order[: task_order.index(current_domain)]
        if not previous_domains:
            return new_tasks
        trajectories = self.trainer.trajectory_buffer.sample_multi_domain(
            domains=previous_domains, num_samples_per_domain=2
        )
        return new_tasks + [t.task for t in trajectories]

    def post_step_hook(self, trainer, domain):
        self.step_count += 1

    def post_task_hook(self, trainer, domain):
        self.finished.append(domain)


class CustomCL(CLAlgorithm):
    """The same hooks on the base class: it has a buffer without asking for one."""

    def __init__(self):
        super().__init__()
        self.step_count = 0
        self.finished = []

    augment_batch = CustomReplayCL.augment_batch
    post_step_hook = CustomReplayCL.post_step_hook
    post_task_hook = CustomReplayCL.post_task_hook


def trained(tmp_path, algorithm, **settings) -> tuple[dict, list[dict]]:
    """(summary, replayed rollouts) of a small run, made as the documents make it."""
    config = GRPOConfig(**{**vars(small_args(tmp_path, "--run_name", "r")), **settings})
    summary = train(config, algorithm=algorithm)
    records = report.read_jsonl(tmp_path / "r" / "trajectories.jsonl")
    return summary, [r for r in records if r.get("replayed")]


def test_selective_replay_replays_solved_tasks_only(tmp_path, monkeypatch):
    """Rewards are made up, because a policy of two steps earns none: one task of airline is solved, the other half."""
    solved, half = (task.id for task in oracle.short_tasks("airline", "train", 2))
    score = oracle.score

    def scored(episode, *args, **kwargs):
        found = score(episode, *args, **kwargs)
        played = episode.max_turns == 2  # the choice of tasks scores other episodes
        reward = {solved: 1.0, half: 0.5}.get(episode.task.id, 0.0)
        return found.model_copy(update={"reward": reward}) if played else found

    monkeypatch.setattr(oracle, "score", scored)
    _, again = trained(tmp_path, SelectiveReplayCL(replay_ratio=0.8, min_buffer_size=1))
    assert {r["task_id"] for r in again} == {solved}


@pytest.mark.parametrize("kind", [CustomReplayCL, CustomCL])
def test_the_custom_algorithms_hooks_are_called(tmp_path, kind):
    algorithm = kind()
    summary, again = trained(tmp_path, algorithm)
    assert algorithm.step_count == 4 and algorithm.finished == ["airline", "telecom"]
    assert [(r["global_step"], r["domain"]) for r in again] == [(2, "airline")] * 4 + [(3, "airline")] * 4
    found = summary["statistics"]
    assert found["total_replay_samples"] == 8 and found["replay_samples_per_domain"] == {"airline": 8}
    assert found["total_replay_demonstrations"] == 4  # two in each of the two steps of the warm start


# -------------------------------------------------------------------------------------------------- the page of names


def rows() -> list[list[str]]:
    """The rows of the tables of docs/from_the_documents.md, without their heads."""
    lines = (ROOT / "docs" / "from_the_documents.md").read_text().splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in found if row[1] != "here"]


def flag_exists(script, flag, value=None) -> bool:
    """A number beside a flag is its default for a real model; a word is one of its values."""
    kind = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Args
    if value is not None:
        given = getattr(kind(**{flag: value}), flag)
        assert isinstance(given, str) or given == getattr(kind(model_name_or_path="real"), flag)
    return flag in kind.__dataclass_fields__


def attribute_exists(name, parameter=None) -> bool:
    parent, _, last = name.rpartition(".")
    if last in getattr(
        pkgutil.resolve_name(parent), "__dataclass_fields__", {}
    ):  # one without a default is no attribute
        return True
    found = pkgutil.resolve_name(name)
    return parameter is None or parameter in inspect.signature(found).parameters


def test_the_page_of_the_documents_names_has_no_empty_cell_and_no_wrong_name(tmp_path):
    summary, _ = trained(tmp_path, ReplayCL(min_buffer_size=1))
    records = report.read_jsonl(tmp_path / "r" / "metrics.jsonl")
    keys = {record["kind"]: set(record) for record in records} | {"summary": set(summary)}
    keys |= {"statistics": set(summary["statistics"]), "evaluation": set(summary["evaluation"]["airline"])}

    def exists(name) -> bool:
        if flag := re.fullmatch(r"(?:([\w/]+\.py) )?--(\w+)(?: (\S+))?", name):
            return flag_exists(flag[1] or "train.py", *flag.groups()[1:])
        if "/" in name or name.endswith(".py"):
            return (tmp_path / "r" / name.removeprefix("runs/NAME/") if "NAME" in name else ROOT / name).exists()
        kind, _, key = name.partition(".")
        if kind in keys:
            return key in keys[kind]
        return attribute_exists(*re.fullmatch(r"([\w.]+)(?:\((\w+)\))?", name).groups())

    assert len(rows()) > 100
    for row in rows():
        assert len(row) == 3 and all(row), row
        names = re.findall(r"`([^`]+)`", row[1])
        assert names and all(exists(name) for name in names), row
