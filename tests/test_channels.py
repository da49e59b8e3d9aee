"""experiments/channels.py: channels, noise and NMSE against their definitions, and what each arm does with its buffer.
experiments/runner.py: results are resumed, damaged ones named, and no process is left behind."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed import checked
from experiments import channels, runner
from experiments.channels import SCENARIOS, Args, augment, generate_channels, nmse

ROOT = Path(__file__).resolve().parent.parent
S1, S2, S3 = SCENARIOS


def small(tmp_path, **changes):
    settings = {"users": 10, "past": 3, "epochs": 2, "hidden": 8, "layers": 1, "capacity": 20, "batch_size": 48}
    return Args(output=str(tmp_path), **{**settings, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with the channels of ten users a scenario, of two seeds."""
    folder = tmp_path_factory.mktemp("channels")
    for seed in (0, 1):
        channels.channel_windows(small(folder), seed)
    return folder


@pytest.fixture(scope="module")
def clean():
    return {name: generate_channels(scenario, 40, 12, 0) for name, scenario in SCENARIOS.items()}


def test_channels_have_their_shape_and_mean_power_1(clean):
    for h in clean.values():
        assert h.shape == (40, 12, channels.RESOURCE_BLOCKS, channels.RX * channels.TX)
        assert (np.abs(h) ** 2).mean((1, 2, 3)) == pytest.approx(1, rel=1e-4)


def test_antennas_see_different_fields_without_a_line_of_sight(clean):
    """A wavelength apart, too. With a line of sight all see the same field up to a phase."""

    def neighbours(h):  # |correlation| of neighbouring transmit antennas
        h = h.reshape(*h.shape[:3], channels.RX, channels.TX)
        power = np.abs(h[..., :-1] ** 2).mean((1, 2, 3, 4))
        return (np.abs((h[..., 1:] * h[..., :-1].conj()).mean((1, 2, 3, 4))) / power).mean()

    assert neighbours(clean[S1]) + 0.1 < neighbours(clean[S3])
    assert neighbours(clean[S1]) + 0.1 < neighbours(clean[S2])


def test_channels_change_with_the_distance_that_a_user_moves(clean):
    """A step is a fifteenth of the wavelength: alike after one step, unlike after seven."""
    for h in clean.values():
        error = [np.mean(np.abs(h[:, lag:] - h[:, :-lag]) ** 2) for lag in (1, 7)]
        assert error[0] < 0.15 and error[1] > 0.5


def test_channels_are_seeded():
    first, again, other = (generate_channels(SCENARIOS[S2], 6, 4, seed) for seed in ([3, 1], [3, 1], [4, 1]))
    assert (first == again).all() and not np.allclose(first, other)


def test_windows_are_split_by_user_and_made_once(tmp_path, monkeypatch):
    calls = []

    def numbered(scenario, users, steps, seed):
        calls.append(seed)
        shape = (users, steps, channels.RESOURCE_BLOCKS, channels.RX * channels.TX)
        user, step = np.arange(users)[:, None, None, None], np.arange(steps)[:, None, None]
        return np.broadcast_to(user + 1j * step, shape).astype(np.complex64)

    monkeypatch.setattr(channels, "generate_channels", numbered)
    train, test = channels.channel_windows(small(tmp_path), 5)[S1]
    assert len(train) == 8 * 18 and len(test) == 2 * 18 and train.shape[1:] == (4, 16)
    assert set(train.real.unique().tolist()).isdisjoint(test.real.unique().tolist())
    assert (train.real == train.real[:, :1, :1]).all()  # one user in a window
    assert (train.imag[:, 1:] - train.imag[:, :-1] == 1).all()  # one step after the other
    assert train.imag[:, 0].unique().tolist() == [0, 4, 8]  # and windows do not overlap
    for seed, made in ((5, [[5, 0], [5, 1], [5, 2]]), (6, [[5, 0], [5, 1], [5, 2], [6, 0], [6, 1], [6, 2]])):
        channels.channel_windows(small(tmp_path), seed)
        assert calls == made


def test_nmse_is_the_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 16)) + 1j * rng.normal(size=(2, 5, 16))
    expected = [np.linalg.norm(x - y) ** 2 / np.linalg.norm(y) ** 2 for x, y in zip(a, b, strict=True)]
    assert nmse(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(expected)


@pytest.fixture
def windows():
    """Of growing power."""
    windows = torch.randn(400, 9, 16, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    return windows * torch.linspace(1, 3, 400)[:, None, None]


def split(windows, noisy, target):
    """(phase of each window, noise) of an augmented batch."""
    phase = (target / windows[:, -1])[:, :1]
    return phase, noisy - windows[:, :-1] * phase[:, None]


def test_noise_and_phase_are_drawn_anew_and_the_windows_stay_clean(windows):
    generator, kept = torch.Generator().manual_seed(1), windows.clone()
    noisy, target = augment(windows, generator, snr=10.0)
    again, other = augment(windows, generator, snr=10.0)
    assert torch.equal(windows, kept) and not torch.allclose(target, other) and not torch.allclose(noisy, again)
    phase, _ = split(windows, noisy, target)
    torch.testing.assert_close(target, windows[:, -1] * phase, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(phase.abs(), torch.ones(400, 1))
    assert phase.mean().abs() < 0.2  # uniform over the circle


@pytest.mark.parametrize("snr", [10.0, None])
def test_noise_has_the_snr(windows, snr):
    _, noise = split(windows, *augment(windows, torch.Generator().manual_seed(1), snr))
    found = 10 * torch.log10(windows.abs().square().mean((1, 2)) / noise.abs().square().mean((1, 2)))
    assert (noise.real.std() / noise.imag.std()).item() == pytest.approx(1, abs=0.02)
    if snr is None:  # uniform over TRAINING_SNR
        assert found.min() > -2 and found.max() < 32 and abs(found.mean() - 15) < 2 and found.std() > 7
    else:
        assert found.mean().item() == pytest.approx(snr, abs=0.1) and found.std() < 0.6


def test_test_nmse_is_in_db_and_repeatable():
    class Perfect(torch.nn.Linear):
        def forward(self, noisy):
            return noisy[:, -1]

    windows = torch.randn(500, 1, 16, dtype=torch.complex64).expand(500, 4, 16)
    for snr in (0.0, 20.0):  # a channel that stands still: the last one seen is off by the noise alone
        assert channels.measure_nmse(Perfect(1, 1), windows, snr) == pytest.approx(-snr, abs=0.2)
    assert channels.measure_nmse(Perfect(1, 1), windows, 5.0) == channels.measure_nmse(Perfect(1, 1), windows, 5.0)


@pytest.fixture
def watched(monkeypatch):
    """What run_arm does with its buffer: offers, draws, refreshed losses, and the sizes of batches."""
    seen = {"offers": [], "refreshed": [], "batches": [], "scored": 0, "buffers": set()}

    def spy(name, note):
        function = getattr(channels, name)

        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            note(*args, **kwargs)
            return result

        monkeypatch.setattr(channels, name, called)

    def offered(buffer, item, **kwargs):
        seen["offers"].append((item, kwargs))
        seen["buffers"].add(len(buffer.items))
        assert item.device.type == "cpu" and item.is_complex()

    def augmented(windows, generator, snr=None):
        if snr is None:
            seen["batches"].append(len(windows))
        seen["scored"] += snr == 15.0

    spy("add", offered)
    spy("update_losses", lambda buffer, indices, losses: seen["refreshed"].append(len(losses)))
    spy("augment", augmented)
    return seen


def test_each_window_is_offered_once_with_a_loss_of_its_own(made, watched):
    channels.run_arm(small(made), "lars", 0)
    clean = {tuple(item.flatten().tolist()) for item, _ in watched["offers"]}
    windows = channels.channel_windows(small(made), 0)
    assert clean == {tuple(row.flatten().tolist()) for train, _ in windows.values() for row in train}
    assert [k["label"] for _, k in watched["offers"]] == [0] * 144 + [1] * 144 + [2] * 144
    assert {k["policy"] for _, k in watched["offers"]} == {"lars"}
    assert len({k["loss"] for _, k in watched["offers"]}) > 400  # one for each item, not one for each batch
    assert max(watched["buffers"]) == 20


def test_half_of_a_batch_is_replayed_and_its_losses_are_refreshed(made, watched):
    result = channels.run_arm(small(made), "lars", 0)
    assert watched["batches"] == [48] + [96] * 17  # nothing to replay at first: 3 scenarios x 2 epochs x 3 batches
    assert watched["refreshed"] == [48] * 17
    assert watched["scored"] == 3 * 3 + 17  # losses to be compared are of one SNR, at offers and at replays
    assert len(result["curve"]) == 1 + 6 and set(result["snr"]) == set(SCENARIOS) and result["seconds"] > 0


@pytest.mark.parametrize("arm", ["naive", "joint", f"only {S2}"])
def test_arms_without_a_buffer_replay_nothing(arm, made, watched):
    result = channels.run_arm(small(made), arm, 0)
    epochs = 2 if arm.startswith("only") else 6
    size = 96 if arm == "joint" else 48  # as many windows in a step as with a buffer
    assert watched["offers"] == [] and watched["batches"] == [size] * 3 * epochs
    assert len(result["curve"]) == 1 + epochs


def test_an_arm_is_a_function_of_its_seed(made):
    results = [channels.run_arm(small(made), "labrs", 0) for _ in range(2)]
    assert results[0]["curve"] == results[1]["curve"] and results[0]["snr"] == results[1]["snr"]


def test_the_teacher_of_old_windows_is_the_model_at_the_last_scenarios_end(made, monkeypatch):
    taught, frozen = [], channels.frozen

    def teacher(model):
        copied = frozen(model)
        copied.register_forward_hook(lambda module, given, out: taught.append((len(out), out.requires_grad, module)))
        return copied

    monkeypatch.setattr(channels, "frozen", teacher)
    channels.run_arm(small(made), "lars_distill", 0)
    teachers = list({id(module): module for _, _, module in taught}.values())
    assert len(teachers) == 2  # of S1 and of S2; the one of S3 teaches nobody
    assert not any(module.training or any(p.requires_grad for p in module.parameters()) for module in teachers)
    assert not any(requires for _, requires, _ in taught)
    sizes = [number for number, _, _ in taught]
    assert max(sizes) <= 48 and min(sizes) < 48  # windows of the current scenario are not distilled


ADDED = {"ewc": "naive", "online_ewc": "naive", "lwf": "naive", "er_plus": "reservoir", "lars_distill": "lars"}


@pytest.mark.parametrize("arm, plain", ADDED.items())
def test_penalties_and_distillation_are_added_to_the_loss(arm, plain, made):
    """With weight 0 they change nothing at all; with one the scenarios behind the first."""

    def run(arm, *weights):
        names = ("ewc_lambda", "er_plus_lambda", "lwf_coef", "distill_coef")
        return channels.run_arm(small(made, **dict(zip(names, weights, strict=True))), arm, 0)

    plain, without, held = run(plain, 0.0, 0.0, 0.0, 0.0), run(arm, 0.0, 0.0, 0.0, 0.0), run(arm, 50.0, 50.0, 5.0, 1.0)
    assert without["curve"] == pytest.approx(np.array(plain["curve"]))
    assert held["curve"][2] == pytest.approx(plain["curve"][2]) and held["curve"][3] != pytest.approx(plain["curve"][3])
    size = sum(4 * p.numel() for p in channels.ChannelPredictor(8, 1).parameters())
    copies = {"ewc": 6, "online_ewc": 2, "lwf": 1, "er_plus": 7, "lars_distill": 1}[arm]
    assert plain["bytes_kept"] == (20 * 4 * 16 * 8 if arm in ("er_plus", "lars_distill") else 0)
    assert held["bytes_kept"] == copies * size + plain["bytes_kept"]


@pytest.mark.parametrize("arm, share", [("reservoir", 1), ("joint", 2)])
def test_the_rate_falls_with_new_windows_and_gradients_are_clipped(arm, share, made, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    clipped, clip = [], torch.nn.utils.clip_grad_norm_

    def note(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", note)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: clipped.append(norm) or clip(p, norm))
    channels.run_arm(small(made), arm, 0)
    assert rates == pytest.approx(5e-3 * 0.1 ** (48 * share * np.arange(18) / (6 * 144 * share)))
    assert clipped == [1.0] * 18


def test_training_learns(made):
    result = channels.run_arm(small(made, epochs=12, hidden=32, batch_size=16), "joint", 0)
    assert result["curve"][-1][1] < result["curve"][0][1] - 2  # dB


def test_a_model_that_diverges_is_named_and_not_saved(made, tmp_path):
    args = small(made, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"naive 0: .*learning rate"):
        runner.run_job(args, channels.run_arm, ("naive", 0), tmp_path / "naive_0.json")
    assert list(tmp_path.iterdir()) == []


SMALL_FLAGS = ["--users", "10", "--past", "3", "--epochs", "1", "--hidden", "8", "--layers", "1", "--capacity", "20"]
FEW = ["naive", "reservoir", "lars", "joint", *(f"only {name}" for name in SCENARIOS)]


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """(what the command showed, its directory), after a run of seven arms with two seeds."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    shutil.copytree(made, folder)
    flags = [*SMALL_FLAGS, "--seeds", "0", "1", "--arms", *FEW, "--output", str(folder), "--workers", "2"]
    command = [sys.executable, "experiments/channels.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900), folder


def again(folder, **changes):
    """The same run."""
    changes = {"epochs": 1, "batch_size": 64, "seeds": [0, 1], "arms": FEW, "workers": 1, **changes}
    return channels.run_experiment(small(folder, **changes))


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "out")


def test_the_experiment_writes_tables_and_pictures(finished):
    shown, folder = finished
    assert shown.returncode == 0, shown.stderr
    assert "lars is better than reservoir by" in shown.stdout and "±" in shown.stdout
    assert [line for line in shown.stderr.splitlines() if "Warning" in line or "Traceback" in line] == []
    for name in ("forgetting_curve.png", "nmse_over_snr.png", "single_scenario.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    curves = [json.loads((folder / "results" / f"naive_{k}.json").read_text())["curve"] for k in (0, 1)]
    rose = [[c[-1][0] - c[1][0], c[-1][1] - c[2][1]] for c in curves]
    row = next(line for line in shown.stdout.splitlines() if line.startswith("| naive")).split("|")
    assert [float(text.split("±")[0]) for text in row[6:8]] == pytest.approx(np.mean(rose, 0), abs=0.006)


def test_what_is_finished_is_not_done_again(copied):
    results = {path: path.stat().st_mtime_ns for path in (copied / "results").iterdir()}
    path = copied / "results" / "naive_0.json"
    curve = json.loads(path.read_text())["curve"]
    path.unlink()
    again(copied)
    assert [p.name for p in (copied / "results").iterdir() if p.stat().st_mtime_ns != results[p]] == ["naive_0.json"]
    assert len(results) == 14 and json.loads(path.read_text())["curve"] == curve


@pytest.mark.parametrize("name, content", [("lars_1.json", b"{}"), ("lars_1.json", b""), ("*_seed1.npy", b"PK")])
def test_damaged_files_are_named(name, content, copied):
    (path,) = copied.rglob(name)
    if path.suffix == ".npy":
        (copied / "results" / "naive_1.json").unlink()
    path.write_bytes(content)
    table = (copied / "table.md").read_bytes()
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        again(copied)
    assert (copied / "table.md").read_bytes() == table


def test_results_of_other_settings_are_refused(copied):
    with pytest.raises(ValueError, match="other settings"):
        again(copied, capacity=30)


def kill_group(pid):
    """Otherwise a failed test would leave processes that burn a core for the rest of the tests."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_experiment_leaves_no_process_and_no_half_result(number, code, made, tmp_path, request):
    shutil.copytree(made, tmp_path / "out")
    flags = [*SMALL_FLAGS, "--epochs", "100000", "--arms", "naive", "lars", "--output", str(tmp_path / "out")]
    command = [sys.executable, "experiments/channels.py", *flags, "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    request.addfinalizer(functools.partial(kill_group, process.pid))
    children, deadline = [], time.monotonic() + 300
    while len(children) < 3 and time.monotonic() < deadline:  # two workers, and multiprocessing's resource tracker
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    assert process.wait(300) == code
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlives the main process"
        time.sleep(0.1)
    assert list((tmp_path / "out" / "results").iterdir()) == []
    shown = process.stderr.read()
    assert "Traceback" not in shown and (number == signal.SIGKILL or "the same command goes on" in shown)


def die(args, arm, seed):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["channels.py", "--output", str(tmp_path), "--workers", "1"])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        runner.run_command(Args, lambda args: runner.run_jobs(args, die, [("naive", 0)]))
    signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == 1 and capsys.readouterr().err.splitlines()[-1].startswith("a worker was killed, perhaps")


def test_a_bad_setting_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["channels.py", "--users", "4"])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as stop:
        runner.run_command(Args, None)
    line = "channels.py: users must be greater than or equal to 5, got 4\n"
    assert stop.value.code == 2 and capsys.readouterr().err == line


@pytest.mark.parametrize("name, value", [("arms", ["best"]), ("arms", []), ("seeds", [-1]), ("workers", 0)])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        checked(Args, {**vars(Args()), name: value})
