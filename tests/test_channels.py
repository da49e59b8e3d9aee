"""python replay.py: channels, noise and NMSE against their definitions, and what each arm does with its buffer."""

import contextlib
import copy
import csv
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

import regularize  # noqa: F401 (imported before a test changes copy.deepcopy)
import replay
from replay import SCENARIOS, Args, augment, generate_channels, nmse

ROOT = Path(__file__).resolve().parent.parent
S1, S2, S3 = SCENARIOS


def small(tmp_path, **changes):
    settings = {"users": 10, "past": 3, "epochs": 2, "hidden": 8, "layers": 1, "capacity": 20, "batch_size": 48}
    return Args(output=str(tmp_path), **{**settings, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with the channels of ten users a scenario."""
    folder = tmp_path_factory.mktemp("channels")
    replay.channel_windows(small(folder), 0)
    return folder


# ------------------------------------------------------------------------------------------------ the data


def neighbours(h):
    """|correlation| of neighbouring transmit antennas."""
    h = h.reshape(*h.shape[:3], replay.RX, replay.TX)
    return np.abs((h[..., 1:] * h[..., :-1].conj()).mean((1, 2, 3, 4))) / np.abs(h[..., :-1] ** 2).mean((1, 2, 3, 4))


def test_channels_are_those_of_their_scenario():
    h = {name: generate_channels(scenario, 40, 12, 0) for name, scenario in SCENARIOS.items()}
    for values in h.values():
        assert values.shape == (40, 12, replay.RESOURCE_BLOCKS, replay.RX * replay.TX)
        assert (np.abs(values) ** 2).mean((1, 2, 3)) == pytest.approx(1, rel=1e-4)
    # Without a line of sight, antennas a wavelength apart see different fields; with one, all the same up to a phase.
    assert neighbours(h[S1]).mean() + 0.1 < neighbours(h[S3]).mean()
    assert neighbours(h[S1]).mean() + 0.1 < neighbours(h[S2]).mean()
    # A user moves by a fifteenth of the wavelength: close to the channel before, unlike the one half a wavelength away.
    for values in h.values():
        error = [np.mean(np.abs(values[:, lag:] - values[:, :-lag]) ** 2) for lag in (1, 7)]
        assert error[0] < 0.15 and error[1] > 0.5


def test_channels_are_seeded():
    first, again = (generate_channels(SCENARIOS[S2], 6, 4, [3, 1]) for _ in range(2))
    assert (first == again).all()
    assert not np.allclose(first, generate_channels(SCENARIOS[S2], 6, 4, [4, 1]))


def test_windows_are_split_by_user_and_made_once(tmp_path, monkeypatch):
    calls = []

    def numbered(scenario, users, steps, seed):
        calls.append(seed)
        shape = (users, steps, replay.RESOURCE_BLOCKS, replay.RX * replay.TX)
        user, step = np.arange(users)[:, None, None, None], np.arange(steps)[:, None, None]
        return np.broadcast_to(user + 1j * step, shape).astype(np.complex64)

    monkeypatch.setattr(replay, "generate_channels", numbered)
    windows = replay.channel_windows(small(tmp_path), 5)
    train, test = windows[S1]
    assert len(train) == 8 * 18 and len(test) == 2 * 18 and train.shape[1:] == (4, 16)
    assert set(train.real.unique().tolist()).isdisjoint(test.real.unique().tolist())
    assert (train.real == train.real[:, :1, :1]).all()  # one user in a window
    assert (train.imag[:, 1:] - train.imag[:, :-1] == 1).all()  # one step after the other
    assert train.imag[:, 0].unique().tolist() == [0, 4, 8]  # and windows do not overlap
    assert calls == [[5, 0], [5, 1], [5, 2]]
    replay.channel_windows(small(tmp_path), 5)
    assert len(calls) == 3
    replay.channel_windows(small(tmp_path), 6)
    assert len(calls) == 6


def test_nmse_is_the_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 16)) + 1j * rng.normal(size=(2, 5, 16))
    expected = [np.linalg.norm(x - y) ** 2 / np.linalg.norm(y) ** 2 for x, y in zip(a, b, strict=True)]
    assert nmse(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(expected)


def test_noise_and_phase_are_drawn_anew_and_the_target_stays_clean():
    generator = torch.Generator().manual_seed(0)
    clean = (
        torch.randn(400, 9, 16, dtype=torch.complex64, generator=generator) * torch.linspace(1, 3, 400)[:, None, None]
    )
    kept = clean.clone()
    noisy, target = augment(clean, generator, snr=10.0)
    again, other = augment(clean, generator, snr=10.0)
    assert torch.equal(clean, kept) and not torch.allclose(target, other) and not torch.allclose(noisy, again)
    phase = (target / clean[:, -1])[:, :1]
    torch.testing.assert_close(target, clean[:, -1] * phase, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(phase.abs(), torch.ones(400, 1))
    assert phase.mean().abs() < 0.2  # uniform over the circle
    noise = noisy - clean[:, :-1] * phase[:, None]
    snr = 10 * torch.log10(clean.abs().square().mean((1, 2)) / noise.abs().square().mean((1, 2)))
    assert snr.mean().item() == pytest.approx(10, abs=0.1) and snr.std() < 0.6
    assert (noise.real.std() / noise.imag.std()).item() == pytest.approx(1, abs=0.02)
    noisy, target = augment(clean, generator)
    phase = (target / clean[:, -1])[:, :1, None]
    power = (noisy - clean[:, :-1] * phase).abs().square().mean((1, 2))
    snr = 10 * torch.log10(clean.abs().square().mean((1, 2)) / power)
    assert snr.min() > -2 and snr.max() < 32 and abs(snr.mean() - 15) < 2  # uniform over TRAINING_SNR


def test_test_nmse_is_in_db_and_repeatable():
    class Perfect(torch.nn.Linear):
        def forward(self, noisy):
            return noisy[:, -1]

    windows = torch.randn(500, 1, 16, dtype=torch.complex64).expand(500, 4, 16)
    for snr in (0.0, 20.0):  # a channel that stands still: the last one seen is off by the noise alone
        assert replay.measure_nmse(Perfect(1, 1), windows, snr) == pytest.approx(-snr, abs=0.2)
    assert replay.measure_nmse(Perfect(1, 1), windows, 5.0) == replay.measure_nmse(Perfect(1, 1), windows, 5.0)


# ----------------------------------------------------------------------------------------------- the arms


@pytest.fixture
def watched(monkeypatch):
    """What run_arm does to its buffer: offers, draws, refreshed losses, and the sizes of batches."""
    seen = {"offers": [], "drawn": [], "refreshed": [], "batches": [], "scored": [], "buffers": set()}

    def spy(name, function, note):
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            note(result, *args, **kwargs)
            return result

        monkeypatch.setattr(replay, name, called)

    def offered(result, buffer, item, **kwargs):
        seen["offers"].append((item, kwargs))
        seen["buffers"].add(len(buffer.items))
        assert item.device.type == "cpu" and item.is_complex()

    spy("add", replay.add, offered)
    spy("sample", replay.sample, lambda result, buffer, n, **kwargs: seen["drawn"].append((n, len(result))))
    spy("update_losses", replay.update_losses, lambda result, b, i, losses: seen["refreshed"].append(len(losses)))

    def augmented(result, windows, generator, snr=None):
        if snr is None:
            seen["batches"].append(len(windows))
        elif snr == 15.0:
            seen["scored"].append(snr)

    spy("augment", replay.augment, augmented)
    return seen


def test_each_window_is_offered_once_and_half_of_a_batch_is_replayed(made, watched):
    args = small(made)
    result = replay.run_arm(args, "lars", 0)
    windows = replay.channel_windows(args, 0)
    assert len(watched["offers"]) == 3 * 144
    clean = {tuple(item.flatten().tolist()) for item, _ in watched["offers"]}
    assert clean == {tuple(row.flatten().tolist()) for train, _ in windows.values() for row in train}
    assert [k["label"] for _, k in watched["offers"]] == [0] * 144 + [1] * 144 + [2] * 144
    assert {k["policy"] for _, k in watched["offers"]} == {"lars"}
    assert len({k["loss"] for _, k in watched["offers"]}) > 400  # one for each item, not one for each batch
    assert len(watched["scored"]) == 3 * 3 + 17  # losses to be compared are of one SNR, at offers and at replays
    assert max(watched["buffers"]) == 20
    assert watched["batches"] == [48] + [96] * 17  # nothing to replay at first: 3 scenarios x 2 epochs x 3 batches
    assert watched["refreshed"] == [48] * 17
    assert len(result["curve"]) == 1 + 6 and set(result["snr"]) == set(SCENARIOS) and result["seconds"] > 0


@pytest.mark.parametrize("arm", ["naive", "joint", f"only {S2}"])
def test_arms_without_a_buffer_replay_nothing(arm, made, watched):
    result = replay.run_arm(small(made), arm, 0)
    epochs = 2 if arm.startswith("only") else 6
    size = 96 if arm == "joint" else 48  # as many windows in a step as with a buffer
    assert watched["offers"] == [] and watched["batches"] == [size] * 3 * epochs
    assert len(result["curve"]) == 1 + epochs


def test_an_arm_is_a_function_of_its_seed(made):
    results = [replay.run_arm(small(made), "labrs", 0) for _ in range(2)]
    assert results[0]["curve"] == results[1]["curve"] and results[0]["snr"] == results[1]["snr"]


def test_the_teacher_is_a_frozen_copy_of_the_scenarios_end(made, monkeypatch):
    taught, kept = [], copy.deepcopy

    def teacher(model):
        copied = kept(model)
        assert not hasattr(model, "is_teacher")
        copied.is_teacher = True
        copied.register_forward_hook(lambda module, given, out: taught.append((len(out), out.requires_grad, module)))
        return copied

    monkeypatch.setattr(replay.copy, "deepcopy", teacher)
    distilled = replay.run_arm(small(made), "lars_distill", 0)
    assert taught and not any(requires for _, requires, _ in taught)
    teachers = list({id(module): module for _, _, module in taught}.values())
    assert len(teachers) == 2  # of S1 and of S2; the one of S3 teaches nobody
    assert not any(module.training or any(p.requires_grad for p in module.parameters()) for module in teachers)
    assert all(1 <= number <= 48 for number, _, _ in taught)
    assert min(number for number, _, _ in taught) < 48  # not what is of the current scenario
    monkeypatch.undo()
    plain = replay.run_arm(small(made), "lars", 0)
    assert distilled["curve"][2] == plain["curve"][2] and distilled["curve"][3] != plain["curve"][3]
    without = replay.run_arm(small(made, distill_coef=0.0), "lars_distill", 0)
    assert without["curve"] == pytest.approx(np.array(plain["curve"]))


@pytest.mark.parametrize(
    "arm, plain", [("ewc", "naive"), ("online_ewc", "naive"), ("lwf", "naive"), ("er_plus", "reservoir")]
)
def test_penalties_are_added_to_the_loss(arm, plain, made):
    """With weight 0 they change nothing at all; with one the scenarios behind the first."""
    plain = replay.run_arm(small(made), plain, 0)
    without = replay.run_arm(small(made, ewc_lambda=0.0, er_plus_lambda=0.0, lwf_coef=0.0), arm, 0)
    held = replay.run_arm(small(made, ewc_lambda=50.0, er_plus_lambda=50.0, lwf_coef=5.0), arm, 0)
    assert without["curve"] == pytest.approx(np.array(plain["curve"]))
    assert held["curve"][2] == pytest.approx(plain["curve"][2]) and held["curve"][3] != pytest.approx(plain["curve"][3])
    size = sum(4 * p.numel() for p in replay.ChannelPredictor("lstm", 8, 1, 3).parameters())
    policies = {"ewc": 6 * size, "online_ewc": 2 * size, "lwf": size, "er_plus": 7 * size + plain["bytes_kept"]}
    assert held["bytes_kept"] == policies[arm]
    assert plain["bytes_kept"] == (20 * 4 * 16 * 8 if arm == "er_plus" else 0)


def test_training_learns_and_the_rate_falls(made, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def note(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    clipped, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.optim.Adam, "step", note)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: clipped.append(norm) or clip(p, norm))
    replay.run_arm(small(made), "reservoir", 0)
    assert rates == pytest.approx(5e-3 * 0.1 ** (48 * np.arange(18) / (6 * 144)))  # of new windows, not replayed ones
    assert clipped == [1.0] * 18
    rates.clear()
    result = replay.run_arm(small(made, epochs=12, hidden=32, batch_size=16), "joint", 0)
    assert result["curve"][-1][1] < result["curve"][0][1] - 2  # dB
    seen = 32 * np.arange(len(rates))
    assert rates == pytest.approx(5e-3 * 0.1 ** (seen / (36 * 288)))


def test_a_model_that_diverges_is_named_and_not_saved(made, tmp_path):
    args = small(made, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"naive 0: .*learning rate"):
        replay.run_job(args, replay.run_arm, ("naive", 0), tmp_path / "naive_0.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"model": "gru"}, {"model": "transformer"}, {"autocast": True}])
def test_other_models_and_bfloat16_run(changes, made):
    result = replay.run_arm(small(made, epochs=1, **changes), "reservoir", 0)
    assert np.isfinite(result["curve"]).all()


# ------------------------------------------------------------------------------------------- the command


def run_replay(*flags):
    return subprocess.run([sys.executable, "replay.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=200)


SMALL_FLAGS = ["--users", "10", "--past", "3", "--epochs", "1", "--hidden", "8", "--layers", "1", "--capacity", "20"]


def test_the_experiment_writes_tables_and_pictures_and_does_nothing_twice(tmp_path):
    flags = [*SMALL_FLAGS, "--seeds", "0", "1", "--arms", "naive", "reservoir", "lars", "joint"]
    flags += [*(f"only {name}" for name in SCENARIOS), "--output", str(tmp_path), "--workers", "2"]
    shown = run_replay(*flags)
    assert shown.returncode == 0, shown.stderr
    assert "lars is better than reservoir by" in shown.stdout and "±" in shown.stdout
    assert [line for line in shown.stderr.splitlines() if "Warning" in line or "Traceback" in line] == []
    for name in ("forgetting_curve.png", "nmse_over_snr.png", "single_scenario.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "nmse_over_snr.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["arm", "seed", "SNR in dB", *SCENARIOS] and len(rows) == 1 + 7 * 2 * len(replay.SNRS)
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert len(results) == 14
    first = json.loads((tmp_path / "results" / "naive_0.json").read_text())
    with open(tmp_path / "table.csv") as file:
        table = list(csv.DictReader(file))
    row = next(r for r in table if r["arm"] == "naive" and r["seed"] == "0")
    assert float(row[f"forgetting {S1}"]) == pytest.approx(first["curve"][-1][0] - first["curve"][1][0])
    assert float(row[f"forgetting {S2}"]) == pytest.approx(first["curve"][-1][1] - first["curve"][2][1])
    (tmp_path / "results" / "naive_0.json").unlink()
    again = run_replay(*flags)
    assert again.returncode == 0 and set(results) == set((tmp_path / "results").iterdir())
    changed = [path.name for path, when in results.items() if path.stat().st_mtime_ns != when]
    assert changed == ["naive_0.json"]
    redone = json.loads((tmp_path / "results" / "naive_0.json").read_text())
    assert redone["curve"] == first["curve"]
    table_before = (tmp_path / "table.csv").read_bytes()
    for path, spoilt in (
        (tmp_path / "results" / "lars_1.json", b"{}"),
        (tmp_path / "results" / "lars_1.json", b""),
        (next(tmp_path.glob("channels_*seed1.npz")), b"PK"),
    ):
        whole = path.read_bytes()
        path.write_bytes(spoilt)
        first_result = (tmp_path / "results" / "naive_1.json").read_bytes()
        if path.suffix == ".npz":
            (tmp_path / "results" / "naive_1.json").unlink()
        damaged = run_replay(*flags)
        assert damaged.returncode == 2 and f"{path} is damaged" in damaged.stderr and "Traceback" not in damaged.stderr
        path.write_bytes(whole)
        (tmp_path / "results" / "naive_1.json").write_bytes(first_result)
    assert (tmp_path / "table.csv").read_bytes() == table_before
    other = run_replay(*flags, "--capacity", "30")
    assert other.returncode == 2 and "other settings" in other.stderr and other.stderr.count("\n") == 1


def kill_group(pid):
    """What a failed test would leave to burn a core for the rest of them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_experiment_leaves_no_process_and_no_half_result(number, code, made, tmp_path, request):
    shutil.copytree(made, tmp_path / "out")
    flags = [*SMALL_FLAGS, "--epochs", "100000", "--arms", "naive", "lars", "--output", str(tmp_path / "out")]
    command = [sys.executable, "replay.py", *flags, "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    request.addfinalizer(functools.partial(kill_group, process.pid))
    children, deadline = [], time.monotonic() + 60
    while len(children) < 3 and time.monotonic() < deadline:  # two workers, and multiprocessing's resource tracker
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    assert process.wait(30) == code
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlives the main process"
        time.sleep(0.1)
    assert list((tmp_path / "out" / "results").iterdir()) == []
    shown = process.stderr.read()
    assert "Traceback" not in shown and (number == signal.SIGKILL or "the same command goes on" in shown)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"model": "rnn"}, "lstm, gru, transformer"),
        ({"arms": ["best"]}, "unknown arm 'best'"),
        ({"arms": []}, "arms"),
        ({"seeds": [1, 1]}, "once"),
        ({"seeds": [-1]}, "seeds"),
        ({"users": 4}, "users must be 5 or more"),
        ({"capacity": 0}, "capacity must be greater than 0"),
        ({"final_rate": 2.0}, "final_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"workers": 0}, "workers"),
        ({"distill_coef": -1.0}, "distill_coef"),
        ({"model": "transformer", "hidden": 10}, "4 heads"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        replay.check_args(Args(**wrong))
