"""experiments/channels.py: channels, noise and NMSE against their definitions, and what each arm does with its buffer.
experiments/runner.py: results are resumed, damaged ones named, and no process is left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch.optim.optimizer import register_optimizer_step_pre_hook

import replay
from experiments import channels, runner
from experiments.channels import BUFFERS, SCENARIOS, ChannelPredictor, augment, generate_channels, nmse
from flags import checked

ROOT = Path(__file__).resolve().parent.parent
S1, S2, S3 = SCENARIOS
SMALL = {"users": 10, "past": 3, "epochs": 2, "hidden": 8, "layers": 1, "capacity": 20, "batch_size": 48}
FEW = ["naive", "reservoir", "lars", "joint", *(f"only {name}" for name in SCENARIOS)]


def small(tmp_path, **changes):
    return channels.Args(output=str(tmp_path), **{**SMALL, **changes})


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


def test_channels_have_mean_power_1_and_change_with_the_distance_that_a_user_moves(clean):
    """A step is a fifteenth of the wavelength: alike after one step, unlike after seven."""
    for h in clean.values():
        assert h.shape == (40, 12, channels.RESOURCE_BLOCKS, channels.RX * channels.TX)
        assert (np.abs(h) ** 2).mean((1, 2, 3)) == pytest.approx(1, rel=1e-4)
        error = [np.mean(np.abs(h[:, lag:] - h[:, :-lag]) ** 2) for lag in (1, 7)]
        assert error[0] < 0.15 and error[1] > 0.5


def test_antennas_see_different_fields_without_a_line_of_sight(clean):
    """A wavelength apart, too. With a line of sight all see the same field up to a phase."""

    def neighbours(h):  # |correlation| of neighbouring transmit antennas
        h = h.reshape(*h.shape[:3], channels.RX, channels.TX)
        power = np.abs(h[..., :-1] ** 2).mean((1, 2, 3, 4))
        return (np.abs((h[..., 1:] * h[..., :-1].conj()).mean((1, 2, 3, 4))) / power).mean()

    assert neighbours(clean[S1]) + 0.1 < min(neighbours(clean[S2]), neighbours(clean[S3]))


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


@pytest.mark.parametrize("snr", [10.0, None])
def test_noise_and_phase_are_drawn_anew_at_the_snr_and_the_windows_stay_clean(snr):
    generator = torch.Generator().manual_seed(1)
    windows = torch.randn(400, 9, 16, dtype=torch.complex64, generator=generator)
    windows *= torch.linspace(1, 3, 400)[:, None, None]  # the noise is relative to a window's own power
    kept = windows.clone()
    (noisy, target), (again, other) = augment(windows, generator, snr), augment(windows, generator, snr)
    assert torch.equal(windows, kept) and not torch.allclose(target, other) and not torch.allclose(noisy, again)
    phase = (target / windows[:, -1])[:, :1]
    torch.testing.assert_close(target, windows[:, -1] * phase, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(phase.abs(), torch.ones(400, 1))
    assert phase.mean().abs() < 0.2  # uniform over the circle
    noise = noisy - windows[:, :-1] * phase[:, None]
    found = 10 * torch.log10(windows.abs().square().mean((1, 2)) / noise.abs().square().mean((1, 2)))
    assert (noise.real.std() / noise.imag.std()).item() == pytest.approx(1, abs=0.02)
    if snr is None:  # uniform over TRAINING_SNR
        assert found.min() > -2 and found.max() < 32 and abs(found.mean() - 15) < 2 and found.std() > 7
    else:
        assert found.mean().item() == pytest.approx(snr, abs=0.1) and found.std() < 0.6


def test_test_nmse_is_in_db_and_repeatable():
    perfect = torch.nn.Linear(1, 1)
    perfect.forward = lambda noisy: noisy[:, -1]
    windows = torch.randn(500, 1, 16, dtype=torch.complex64).expand(500, 4, 16)
    for snr in (0.0, 20.0):  # a channel that stands still: the last one seen is off by the noise alone
        assert channels.measure_nmse(perfect, windows, snr) == pytest.approx(-snr, abs=0.2)
    assert channels.measure_nmse(perfect, windows, 5.0) == channels.measure_nmse(perfect, windows, 5.0)


def test_networks_have_about_as_many_parameters_and_read_the_past_in_its_order():
    noisy = torch.randn(4, 8, 16, dtype=torch.complex64)
    sizes = []
    for name in channels.WIDTHS:
        network = ChannelPredictor(name)
        sizes.append(sum(p.numel() for p in network.parameters()))
        assert network(noisy).shape == (4, 16)
        assert not torch.allclose(network(noisy), network(noisy[:, [1, 0, *range(2, 8)]]), atol=1e-6)
    assert max(sizes) < 1.07 * min(sizes)


@pytest.fixture
def watched(monkeypatch):
    """Records the calls of functions, and passes them on."""
    for name in ("add", "update_losses", "augment"):
        monkeypatch.setattr(channels, name, Mock(wraps=getattr(channels, name)))


def batches():
    """The sizes of those that were trained on: only their noise is of a random SNR."""
    return [len(call.args[0]) for call in channels.augment.call_args_list if len(call.args) == 2]


@pytest.mark.parametrize("arm", [arm for arm in BUFFERS if arm.startswith(("lars", "labrs"))])
def test_each_window_is_offered_once_and_half_of_a_batch_is_replayed(arm, made, watched):
    """With a loss of its own, that is refreshed when it is replayed."""
    result = channels.run_arm(small(made), arm, 0)
    offers = [call.args[1] for call in channels.add.call_args_list]
    settings = [call.kwargs for call in channels.add.call_args_list]
    windows = [train for train, _ in channels.channel_windows(small(made), 0).values()]
    assert {tuple(w.flatten().tolist()) for w in offers} == {tuple(w.flatten().tolist()) for w in torch.cat(windows)}
    assert [k["label"] for k in settings] == [0] * 144 + [1] * 144 + [2] * 144
    assert {k["policy"] for k in settings} == {arm.removesuffix("_distill")}
    assert len({k["loss"] for k in settings}) > 400  # one for each item, not one for each batch
    assert len(channels.add.call_args.args[0].items) == 20 and offers[0].is_complex() and offers[0].device.type == "cpu"
    assert batches() == [48] + [96] * 17  # nothing to replay at first: 3 scenarios x 2 epochs x 3 batches
    assert [len(call.args[2]) for call in channels.update_losses.call_args_list] == [48] * 17
    scored = [call.args for call in channels.augment.call_args_list if call.args[2:] == (15.0,)]
    assert len(scored) == 3 * 3 + 17  # losses to be compared are of one SNR, at offers and at replays
    assert len(result["curve"]) == 1 + 6 and set(result["snr"]) == set(SCENARIOS) and result["seconds"] > 0


@pytest.mark.parametrize("worst, share", [(np.argmin, 1.0), (np.argmax, 0.0)])
def test_evictions_from_the_easier_half_are_counted(worst, share, made, monkeypatch):
    monkeypatch.setitem(replay.MAKE_ROOM, "lars", lambda buffer, rng: int(worst(buffer.losses)))
    assert channels.run_arm(small(made), "lars", 0)["easy_evicted"] == share


@pytest.mark.parametrize("scaling, share", [("minmax", 0.5), ("inverse", 0.87), ("rank", 0.74)])
def test_one_outlier_hides_from_minmax_which_items_are_easy(scaling, share):
    """The share of evictions that the easier 50 of 100 losses take, beside one of 100."""
    losses, rng = [*np.linspace(0.01, 1, 100), 100.0], np.random.default_rng(0)
    slots = np.array([replay.lars_slot(losses, rng, scaling) for _ in range(10_000)])
    assert (slots < 50).mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("arm", ["naive", "joint", f"only {S2}"])
def test_arms_without_a_buffer_replay_nothing(arm, made, watched):
    result = channels.run_arm(small(made), arm, 0)
    epochs = 2 if arm.startswith("only") else 6
    size = 96 if arm == "joint" else 48  # as many windows in a step as with a buffer
    assert not channels.add.called and batches() == [size] * 3 * epochs
    assert len(result["curve"]) == 1 + epochs


def test_an_arm_is_a_function_of_its_seed_and_its_network(made):
    results = [channels.run_arm(small(made, network=name), "labrs", 0) for name in (*channels.WIDTHS, *channels.WIDTHS)]
    lstm, gru, transformer = found = [(r["curve"], r["snr"]) for r in results[:3]]
    assert found == [(r["curve"], r["snr"]) for r in results[3:]] and lstm != gru != transformer != lstm


def test_the_teacher_of_old_windows_is_the_model_at_the_last_scenarios_end(made, monkeypatch):
    taught, frozen = [], channels.frozen

    def teacher(model):
        copied = frozen(model)
        copied.register_forward_hook(lambda *called: taught.append(called[::2]))
        return copied

    monkeypatch.setattr(channels, "frozen", teacher)
    channels.run_arm(small(made), "lars_distill", 0)
    teachers = {module for module, _ in taught}
    assert len(teachers) == 2  # of S1 and of S2; the one of S3 teaches nobody
    assert not any(module.training or any(p.requires_grad for p in module.parameters()) for module in teachers)
    assert not any(out.requires_grad for _, out in taught)
    sizes = [len(out) for _, out in taught]
    assert max(sizes) <= 48 > min(sizes)  # windows of the current scenario are not distilled


ADDED = {"ewc": "naive", "online_ewc": "naive", "lwf": "naive", "er_plus": "reservoir", "lars_distill": "lars"}


@pytest.mark.parametrize("arm, plain", ADDED.items())
def test_penalties_and_distillation_are_added_to_the_loss(arm, plain, made):
    """With weight 0 they change nothing at all; with one the scenarios behind the first."""

    none = {"ewc_lambda": 0.0, "er_plus_lambda": 0.0, "lwf_coef": 0.0, "distill_coef": 0.0}
    some = {"ewc_lambda": 50.0, "er_plus_lambda": 50.0, "lwf_coef": 5.0, "distill_coef": 1.0}
    runs = ((plain, none), (arm, none), (arm, some))
    plain, without, held = (channels.run_arm(small(made, **weights), name, 0) for name, weights in runs)
    assert without["curve"] == pytest.approx(np.array(plain["curve"]))
    assert held["curve"][2] == pytest.approx(plain["curve"][2]) and held["curve"][3] != pytest.approx(plain["curve"][3])
    size = sum(4 * p.numel() for p in ChannelPredictor("lstm", 8, 1).parameters())
    copies = {"ewc": 6, "online_ewc": 2, "lwf": 1, "er_plus": 7, "lars_distill": 1}[arm]
    assert plain["bytes_kept"] == (20 * 4 * 16 * 8 if arm in ("er_plus", "lars_distill") else 0)
    assert held["bytes_kept"] == copies * size + plain["bytes_kept"]


@pytest.mark.parametrize("arm, share", [("reservoir", 1), ("joint", 2)])
def test_the_rate_falls_with_new_windows_and_gradients_are_clipped(arm, share, made, monkeypatch):
    rates = []
    clip = Mock(wraps=torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    hook = register_optimizer_step_pre_hook(lambda optimizer, *rest: rates.append(optimizer.param_groups[0]["lr"]))
    channels.run_arm(small(made), arm, 0)
    hook.remove()
    assert rates == pytest.approx(5e-3 * 0.1 ** (48 * share * np.arange(18) / (6 * 144 * share)))
    assert [call.args[1] for call in clip.call_args_list] == [1.0] * 18


def test_training_learns(made):
    result = channels.run_arm(small(made, epochs=12, hidden=32, batch_size=16), "joint", 0)
    assert result["curve"][-1][1] < result["curve"][0][1] - 2  # dB


def test_a_model_that_diverges_is_named_and_not_saved(made, tmp_path):
    args = small(made, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"naive 0: .*learning rate"):
        runner.run_job(args, channels.run_arm, ("naive", 0), tmp_path / "naive_0.json")
    assert list(tmp_path.iterdir()) == []


def test_the_area_below_naive_is_that_of_curves_worked_by_hand():
    """Naive ends lower than it was, on S1 and in the mean: by its end values it has forgotten nothing."""
    naive = [[0, -9, -12, -6, -8, -13, -13.5], [0, -1, -2, -9, -15, -13, -14], [0] * 7]  # a row per scenario
    arm = [[0, -9, -11, -11, -12, -12, -11.5], [0, -1, -2, -9, -14, -14.5, -15], [0] * 7]
    args, results = channels.Args(epochs=2), [[{"curve": np.transpose(curve)}] for curve in (naive, arm)]
    rose, kept = (channels.forgetting_curves(args, r) for r in results)
    assert [r.tolist() for r in rose] == [[[6, 4, -1, -1.5]], [[2, 1]]]  # S1 has four epochs after its own, S2 two
    assert [r.tolist() for r in kept] == [[[0, -1, -1, -0.5]], [[-0.5, -1]]]
    # S1: 6 + 5 + 0 - 1 = 10; S2: 2.5 + 2 = 4.5
    assert channels.area_below_naive(rose, kept).tolist() == [14.5]
    assert channels.area_below_naive(kept, rose).tolist() == [-14.5]


def test_the_picture_of_forgetting_has_every_arm_of_the_table(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    snr = dict.fromkeys(SCENARIOS, [0.0] * len(channels.SNRS))
    results = [{"curve": np.random.default_rng(k).normal(size=(7, 3)).tolist(), "snr": snr} for k in (0, 1)]
    channels.plot_results(channels.Args(output=str(tmp_path), epochs=2), dict.fromkeys(channels.ARMS, results))
    panels = [axes for axes in figures[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == list(BUFFERS)
    for axes in panels:  # naive for comparison, and each scenario
        assert [line.get_label() for line in axes.lines if line.get_label()[0] != "_"] == ["naive", *SCENARIOS]
    assert [len(figure.axes) for figure in figures] == [16, 3, 3]


def command(folder, flags, *arms):
    flags = [*flags.split(), *(f"--{name}={value}" for name, value in SMALL.items() if name != "epochs")]
    return [sys.executable, "experiments/channels.py", "--output", folder, "--workers=2", *flags, "--arms", *arms]


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """(what the command showed, its directory), after a run of seven arms with two seeds."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("finished") / "out")
    flags = "--epochs 1 --seeds 0 1"
    return subprocess.run(command(folder, flags, *FEW), cwd=ROOT, capture_output=True, text=True, timeout=900), folder


def again(folder, **changes):
    channels.run_experiment(small(folder, epochs=1, seeds=[0, 1], arms=FEW, workers=1, **changes))


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "out")


def test_the_experiment_writes_tables_and_pictures(finished):
    shown, folder = finished
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^lars less reservoir: \S+ ± \S+ dB, p = (0\.500|1\.000) ", shown.stdout, re.MULTILINE)
    assert "parameters" in shown.stdout
    assert [line for line in shown.stderr.splitlines() if "Warning" in line or "Traceback" in line] == []
    for name in ("forgetting_curve.png", "nmse_over_snr.png", "single_scenario.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    rows = {row[1].strip(): row for row in (line.split("|") for line in shown.stdout.splitlines()) if len(row) > 5}
    paths = [folder / "results" / f"{arm}_{k}.json" for arm in FEW[:2] for k in (0, 1)]
    curves = np.array([json.loads(path.read_text())["curve"] for path in paths])
    rose = np.stack([curves[:, -1, 0] - curves[:, 1, 0], curves[:, -1, 1] - curves[:, 2, 1]], 1)
    assert rows["naive"][6].strip() == "" and float(rows["reservoir"][6]) >= 0.5  # two seeds
    assert [float(text.split("±")[0]) for text in rows["naive"][7:9]] == pytest.approx(rose[:2].mean(0), abs=0.006)
    area = rose.sum(1) + curves[:, 2, 0] - curves[:, 1, 0]  # S1 has two epochs after its own
    assert float(rows["reservoir"][9].split("±")[0]) == pytest.approx((area[:2] - area[2:]).mean(), abs=0.06)
    assert [rows[arm][10].strip() != "" for arm in FEW[:4]] == [False, False, True, False]


def test_what_is_finished_is_not_done_again(copied):
    results = {path: path.stat().st_mtime_ns for path in (copied / "results").iterdir()}
    path = copied / "results" / "naive_0.json"
    curve = json.loads(path.read_text())["curve"]
    path.unlink()
    again(copied)
    assert [p.name for p in (copied / "results").iterdir() if p.stat().st_mtime_ns != results[p]] == ["naive_0.json"]
    assert len(results) == 14 and json.loads(path.read_text())["curve"] == curve


@pytest.mark.parametrize("name, content", [("lars_1.json", b"{}"), ("lars_1.json", b""), ("*_seed1.npy", b"PK")])
def test_damaged_files_are_named_and_results_of_other_settings_refused(name, content, copied):
    (path,) = copied.rglob(name)
    if path.suffix == ".npy":
        (copied / "results" / "naive_1.json").unlink()
    path.write_bytes(content)
    table = (copied / "table.md").read_bytes()
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        again(copied)
    with pytest.raises(ValueError, match="other settings"):
        again(copied, capacity=30)
    assert (copied / "table.md").read_bytes() == table


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_experiment_leaves_no_process_and_no_half_result(number, code, made, tmp_path, request):
    stopped = command(shutil.copytree(made, tmp_path / "out"), "--epochs 100000", "naive", "lars")
    process = subprocess.Popen(stopped, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    # otherwise a failed test would leave processes that burn a core for the rest of the tests
    request.addfinalizer(lambda: subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], capture_output=True))
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


class Unsent(Exception):
    """Cannot be unpickled."""

    def __init__(self, two, arguments):
        super().__init__("its own words")


def fail(args, how, seed):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "ends":
        os._exit(3)
    raise Unsent(1, 2) if how == "unsent" else ValueError("no good")


BAD = [
    ("users", 2, "channels.py: users must be greater than or equal to 5, got 4"),
    ("killed", 1, "a worker was killed, perhaps"),
    ("ends", 1, "a worker failed, see above; finished jobs"),
    ("raises", 2, "channels.py: raises 0: no good"),
]


@pytest.mark.parametrize("how, code, line", BAD)
def test_an_error_of_the_command_is_one_line(how, code, line, tmp_path, monkeypatch, capsys):
    flags = ["--output", str(tmp_path), "--workers", "1", "--users", "4" if how == "users" else "5"]
    monkeypatch.setattr(sys, "argv", ["channels.py", *flags])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        runner.run_command(channels.Args, lambda args: runner.run_jobs(args, fail, [(how, 0)]))
    signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == code and capsys.readouterr().err.splitlines()[-1].startswith(line)


def test_an_error_that_cannot_be_sent_says_its_words(tmp_path):
    """Not that the worker was killed."""
    with pytest.raises(RuntimeError, match="unsent 0: Unsent: its own words"):
        runner.run_jobs(channels.Args(output=str(tmp_path), workers=1), fail, [("unsent", 0)])


@pytest.mark.parametrize("name, value", [("arms", ["best"]), ("arms", []), ("seeds", [-1]), ("network", "rnn")])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        checked(channels.Args, {**vars(channels.Args()), name: value})
