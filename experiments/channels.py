"""Buffers and penalties compared on a supervised problem: predicting the next MIMO channel.

    python experiments/channels.py --seeds 0 1 2 3 4     table and pictures in runs/channel_prediction

An LSTM learns three scenarios of 3GPP TR 38.901, one after the other.
Data flow: generate_channels -> channel_windows -> run_arm for each arm and seed, in processes -> table, pictures.
"""

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from experiments import runner
from experiments.runner import Several, cell, of_arm
from replay import Buffer, add, sample, update_losses
from report import interval
from vae import frozen


@dataclass(frozen=True)
class Scenario:
    """Where users are, in terms of 3GPP TR 38.901."""

    distance: tuple[float, float]  # metres from the base station
    line_of_sight: bool
    spacing: float  # of neighbouring antennas, in wavelengths


SCENARIOS = {
    "S1 compact": Scenario((120.0, 200.0), False, 1.0),
    "S2 dense": Scenario((20.0, 60.0), True, 0.25),
    "S3 standard": Scenario((50.0, 100.0), True, 0.5),
}
CARRIER, BANDWIDTH = 5e9, 100e6  # Hz
STEP = 0.004  # metres that a user moves between two channels
SPEED = 1.0  # m/s
SEGMENTS, RESOURCE_BLOCKS = 3, 6  # windows per user: successive in time, times places in the band
RX, TX = 2, 8  # antennas
TEST_SHARE = 0.2  # of the users
SNRS = (0, 5, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)  # dB
TABLE_SNR = 20.0  # dB, of the table and of the forgetting curves
FINAL_RATE = 0.1  # the learning rate falls exponentially, window by window, to this share of its start
MAX_GRAD_NORM = 1.0
FISHER_SAMPLES = 256  # windows per scenario that the Fisher information is estimated from
TRAINING_SNR = (0.0, 30.0)  # dB, uniform

# The buffer policy of each arm.
BUFFERS = {"naive": None, "random": "random", "reservoir": "reservoir", "brs": "brs", "lars": "lars", "labrs": "labrs"}
BUFFERS |= {"lars_distill": "lars", "joint": None, "ewc": None, "online_ewc": None, "lwf": None, "er_plus": "reservoir"}
ARMS = (*BUFFERS, *(f"only {name}" for name in SCENARIOS))


@dataclass(kw_only=True)
class Args(runner.Flags):
    """Compares replay buffers and penalties: an LSTM learns to predict the next MIMO channel in one scenario after
    another."""

    output: str = "runs/channel_prediction"
    """directory for results, table and pictures. Finished jobs there are not run again"""
    arms: Several[Literal[ARMS]] = field(default_factory=lambda: list(ARMS))
    """what to compare; "only ..." trains on that scenario alone"""
    hidden: PositiveInt = 64
    """units per layer"""
    layers: PositiveInt = 3
    """layers of the LSTM"""
    users: Annotated[int, Field(ge=5)] = 256
    """users per scenario; a fifth of them is for testing"""
    past: PositiveInt = 8
    """channels that the next one is predicted from"""
    epochs: PositiveInt = 12
    """epochs per scenario"""
    batch_size: PositiveInt = 64
    """new windows per step. With a buffer as many replayed ones are added; joint takes twice as many new ones"""
    capacity: PositiveInt = 500
    """windows that a buffer holds"""
    learning_rate: PositiveFloat = 5e-3
    """learning rate of Adam at the start"""
    distill_coef: NonNegativeFloat = 1.0
    """lars_distill: weight of the NMSE to the predictions of the previous scenario's model on old windows"""
    ewc_lambda: NonNegativeFloat = 100.0
    """weight of the penalty of ewc and online_ewc"""
    er_plus_lambda: NonNegativeFloat = 1.0
    """er_plus: weight of EWC's penalty beside replay"""
    lwf_coef: NonNegativeFloat = 0.1
    """lwf, er_plus: weight of the NMSE to the predictions of the previous scenario's model on new windows"""


def generate_channels(scenario: Scenario, users, steps, seed) -> np.ndarray:
    """Noise-free downlink channels of users moving straight on, complex (users, steps, RESOURCE_BLOCKS, RX * TX), each
    of mean power 1. The model is UMi of 3GPP TR 38.901, by sionna; both ends have uniform linear arrays."""
    import sionna.phy
    from sionna.phy.channel import cir_to_ofdm_channel
    from sionna.phy.channel.tr38901 import PanelArray, UMi

    rng = np.random.default_rng(seed)
    sionna.phy.config.device = "cpu"  # so that random numbers are the same with and without a GPU
    sionna.phy.config.seed = int(rng.integers(2**31))
    kind = {"num_rows_per_panel": 1, "polarization": "single", "polarization_type": "V", "antenna_pattern": "omni"}
    kind |= {"carrier_frequency": CARRIER, "element_horizontal_spacing": scenario.spacing}
    model = UMi(
        carrier_frequency=CARRIER,
        o2i_model="low",
        ut_array=PanelArray(num_cols_per_panel=RX, **kind),
        bs_array=PanelArray(num_cols_per_panel=TX, **kind),
        direction="downlink",
        enable_pathloss=False,
        enable_shadow_fading=False,
    )

    def vectors(x, y, z):
        columns = [np.broadcast_to(value, users) for value in (x, y, z)]
        return torch.tensor(np.stack(columns, 1), dtype=torch.float32)[:, None]

    distance, azimuth = rng.uniform(*scenario.distance, users), rng.uniform(-np.pi / 3, np.pi / 3, users)
    heading, turned = rng.uniform(0, 2 * np.pi, users), rng.uniform(0, 2 * np.pi, users)
    model.set_topology(
        ut_loc=vectors(distance * np.cos(azimuth), distance * np.sin(azimuth), 1.5),
        bs_loc=vectors(0.0, 0.0, 10.0),
        ut_orientations=vectors(turned, 0.0, 0.0),
        bs_orientations=vectors(0.0, 0.0, 0.0),
        ut_velocities=vectors(SPEED * np.cos(heading), SPEED * np.sin(heading), 0.0),
        in_state=torch.zeros(users, 1, dtype=torch.bool),
        los=scenario.line_of_sight,
    )
    gains, delays = model(num_time_samples=steps, sampling_frequency=SPEED / STEP)
    frequencies = (torch.arange(RESOURCE_BLOCKS) - (RESOURCE_BLOCKS - 1) / 2) * BANDWIDTH / RESOURCE_BLOCKS
    h = cir_to_ofdm_channel(frequencies, gains, delays)  # user, 1, rx, 1, tx, step, frequency
    h = h[:, 0, :, 0].permute(0, 3, 4, 1, 2).flatten(3)
    return (h / h.abs().square().mean((1, 2, 3), keepdim=True).sqrt()).numpy()


def channel_windows(args: Args, seed) -> dict[str, tuple]:
    """(training, test) windows of each scenario, complex (windows, past + 1, RX * TX), of different users. They are
    generated once and kept in args.output. Raises ValueError if that file is damaged."""
    path = Path(args.output) / f"channels_{args.users}users_{args.past}past_seed{seed}.npy"
    steps = SEGMENTS * (args.past + 1)
    if not path.exists():
        made = [generate_channels(s, args.users, steps, [seed, k]) for k, s in enumerate(SCENARIOS.values())]
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, np.stack(made))
        temporary.replace(path)
    try:
        channels = torch.from_numpy(np.load(path, allow_pickle=False))
        channels = channels.view(len(SCENARIOS), args.users, steps, RESOURCE_BLOCKS, RX * TX)
    except (ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and it will be made again") from error
    windows = {}
    for name, h in zip(SCENARIOS, channels, strict=True):
        h = h.unflatten(1, (SEGMENTS, args.past + 1)).transpose(2, 3)  # user, segment, block, step, antennas
        test = round(len(h) * TEST_SHARE)
        windows[name] = (h[test:].flatten(0, 2), h[:test].flatten(0, 2))
    return windows


def augment(windows, generator, snr=None):
    """(noisy past channels, clean next one) of clean windows. Each window gets a random phase and white noise at `snr`
    dB (default: uniform over TRAINING_SNR). Both are drawn anew at each use: independent buffer augmentation."""
    n = len(windows)
    low, high = TRAINING_SNR if snr is None else (snr, snr)
    snrs = low + (high - low) * torch.rand(n, 1, 1, generator=generator)
    windows = windows * torch.exp(2j * torch.pi * torch.rand(n, 1, 1, generator=generator))
    power = windows.abs().square().mean((1, 2), keepdim=True)
    noise = torch.randn(windows[:, :-1].shape, dtype=windows.dtype, generator=generator)
    return windows[:, :-1] + noise * (power * 10 ** (-snrs / 10)).sqrt(), windows[:, -1]


class ChannelPredictor(nn.Module):
    """The next channel from noisy past ones: complex (B, past, antennas) -> (B, antennas)."""

    def __init__(self, hidden=64, layers=3, antennas=RX * TX):
        super().__init__()
        self.body = nn.LSTM(2 * antennas, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, 2 * antennas)

    def forward(self, noisy):
        states = self.body(torch.view_as_real(noisy).flatten(-2))[0]
        return torch.view_as_complex(self.head(states[:, -1]).unflatten(-1, (-1, 2)).contiguous())


def nmse(predicted, target):
    """||predicted - target||^2 / ||target||^2 of each item, complex (B, antennas) -> (B,)."""
    return (predicted - target).abs().square().sum(-1) / target.abs().square().sum(-1)


@torch.no_grad()
def measure_nmse(model, windows, snr) -> float:
    """E||error||^2 / E||channel||^2 in dB over test windows, with the same noise at every call."""
    noisy, target = augment(windows, torch.Generator().manual_seed(0), snr)
    device = next(model.parameters()).device
    error = model(noisy.to(device)).cpu() - target
    return 10 * math.log10(error.abs().square().sum() / target.abs().square().sum())


def run_arm(args: Args, arm, seed) -> dict:
    """Trains one model over its scenarios. Returns the NMSE in dB on each scenario's test users: "curve" at TABLE_SNR,
    before training and after each epoch, and "snr" at the end over SNRS; also the seconds and the bytes kept."""
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    windows = channel_windows(args, seed)
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    model = ChannelPredictor(args.hidden, args.layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate)
    stages = [arm.removeprefix("only ")] if arm.startswith("only ") else list(SCENARIOS)
    policy, penalty, teacher, seen = BUFFERS.get(arm), of_arm(arm, args), None, 0
    buffer = Buffer(args.capacity)
    share = 2 if arm == "joint" else 1  # so that all arms have as many windows in a step
    size = share * len(windows[stages[0]][0])  # of an epoch
    decay = FINAL_RATE ** (1 / (len(stages) * args.epochs * size))  # per new window
    by_loss = policy in ("lars", "labrs")

    def measure(snr):
        return [measure_nmse(model, test, snr) for _, test in windows.values()]

    def difficulty(items):
        """Losses for the buffer, all at one SNR: otherwise the draw of the noise would decide."""
        noisy, target = augment(items, generator, sum(TRAINING_SNR) / 2)
        with torch.no_grad():
            return nmse(model(noisy.to(device)), target.to(device)).tolist()

    def learn(new, stage):
        nonlocal seen
        drawn = sample(buffer, len(new), rng=rng)
        old = [buffer.items[i] for i in drawn]
        noisy, target = augment(torch.cat([new, *(item[None] for item in old)]), generator)
        noisy, target = noisy.to(device), target.to(device)
        predicted = model(noisy)
        loss = nmse(predicted, target).mean()
        if penalty and stage > 0:
            loss = loss + sum(penalty.penalty(dict(model.named_parameters())))
        if teacher is not None:  # on windows of earlier scenarios (lars_distill), or on the new ones
            earlier = [len(new) + k for k, i in enumerate(drawn) if buffer.labels[i] < stage]
            rows = earlier if arm == "lars_distill" else list(range(len(new)))
            weight = args.distill_coef / len(noisy) if arm == "lars_distill" else args.lwf_coef / len(new)
            loss = loss + weight * nmse(predicted[rows], teacher(noisy[rows])).sum()
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * decay**seen
        seen += len(new)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        if by_loss and drawn:
            update_losses(buffer, drawn, difficulty(torch.stack(old)))

    curve = [measure(TABLE_SNR)]
    for stage, name in enumerate(stages):
        train = torch.cat([windows[s][0] for s in stages]) if arm == "joint" else windows[name][0]
        for epoch in range(args.epochs):
            order = torch.randperm(len(train), generator=generator)[:size]
            for index in order.split(share * args.batch_size):
                learn(train[index], stage)
                if policy and epoch == 0:  # each window is offered once
                    losses = difficulty(train[index]) if by_loss else [0.0] * len(index)
                    for i, loss in zip(index.tolist(), losses, strict=True):
                        add(buffer, train[i].clone(), label=stage, loss=loss, policy=policy, rng=rng)
            curve.append(measure(TABLE_SNR))
        if penalty:
            apart = torch.Generator().manual_seed(seed)  # so that all arms draw the same batches and noise
            some = train[torch.randperm(len(train), generator=apart)[:FISHER_SAMPLES]]
            noisy, target = (part.to(device) for part in augment(some, apart))
            batches = zip(noisy.split(1), target.split(1), strict=True)
            penalty.consolidate(model, batches, lambda model, batch: nmse(model(batch[0]), batch[1]))
        if arm in ("lars_distill", "lwf", "er_plus"):
            teacher = frozen(model)
    snr = dict(zip(SCENARIOS, zip(*[measure(value) for value in SNRS], strict=True), strict=True))
    kept = [windows[s][0] for s in stages] if arm == "joint" else buffer.items
    bytes_kept = sum(window.nbytes for window in kept) + runner.size(teacher) + (penalty.bytes_kept() if penalty else 0)
    seconds = time.perf_counter() - start
    return {"arm": arm, "seed": seed, "seconds": seconds, "curve": curve, "snr": snr, "bytes_kept": bytes_kept}


def run_experiment(args: Args):
    """Runs all arms and seeds, then writes the table and the pictures."""

    def make_channels(todo):
        for seed in {seed for _, seed in todo}:
            channel_windows(args, seed)

    jobs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    found = runner.run_jobs(args, run_arm, jobs, make_channels)
    by_arm = {arm: [r for r in found if r["arm"] == arm] for arm in args.arms}
    write_table(args, by_arm)
    plot_results(args, by_arm)


def forgetting(args: Args, results) -> np.ndarray:
    """(seeds, scenarios but the last): the rise of the NMSE, in dB, since the scenario's own last epoch."""
    curves = np.array([r["curve"] for r in results])
    old = range(len(SCENARIOS) - 1)
    return np.stack([curves[:, -1, k] - curves[:, (k + 1) * args.epochs, k] for k in old], 1)


def write_table(args: Args, by_arm):
    """Prints the table, means over seeds, and writes it as table.md. `joint` and arms of one scenario have no
    forgetting."""
    final = {arm: np.array([r["curve"][-1] for r in results]) for arm, results in by_arm.items()}
    rose = {arm: forgetting(args, r) for arm, r in by_arm.items() if arm in BUFFERS and arm != "joint"}
    rows = []
    for arm, results in by_arm.items():
        row = {f"NMSE, dB at {TABLE_SNR:g} dB SNR": arm}
        row |= {name: cell(values) for name, values in zip(SCENARIOS, final[arm].T, strict=True)}
        row["mean"] = cell(final[arm].mean(1))
        for k, name in enumerate(list(SCENARIOS)[:-1]):
            row[f"forgetting {name.split()[0]}"] = cell(rose[arm][:, k]) if arm in rose else ""
        compared = arm in rose and "naive" in rose and arm != "naive"
        row["less than naive"] = f"{1 - rose[arm].mean() / rose['naive'].mean():.0%}" if compared else ""
        row["seconds"] = f"{np.mean([r['seconds'] for r in results]):.0f}"
        row["kept, kB"] = f"{np.mean([r['bytes_kept'] for r in results]) / 1000:.0f}"
        rows.append(row)
    runner.show_table(rows, Path(args.output))
    if "lars" in final and "reservoir" in final:
        gain = final["reservoir"].mean(1) - final["lars"].mean(1)
        print(f"\nlars is better than reservoir by {cell(gain)} dB (mean over scenarios, paired by seed)")


def plot_results(args: Args, by_arm):
    """forgetting_curve.png, nmse_over_snr.png and single_scenario.png: means over seeds, 95% intervals as bands."""
    names = list(SCENARIOS)

    def figure(file, xlabel, titles, lines, shaded=0):
        """lines(k) yields (x, values (seeds, len(x)), label, colour) for panel k. shaded: epochs per scenario; each
        panel shades its own."""
        with runner.picture(Path(args.output) / file, 1, len(titles), (7.2, 2.6), sharey=True) as panels:
            for k, axes in enumerate(panels):
                for x, values, label, colour in lines(k):
                    mean, half = np.array([interval(column) for column in np.array(values).T]).T
                    style = {"color": f"C{colour}", "linestyle": ("-", "--", "-.", ":")[colour % 4]}
                    axes.plot(x, mean, **style, label=label, linewidth=1.2)
                    axes.fill_between(x, mean - half, mean + half, color=f"C{colour}", alpha=0.2, lw=0)
                if shaded:
                    axes.axvspan(k * shaded, (k + 1) * shaded, color="0.5", alpha=0.12, linewidth=0)
                axes.set(title=titles[k], xlabel=xlabel)
                axes.grid(alpha=0.3)
            panels[0].set_ylabel("NMSE, dB")

    def curves(k):
        for arm in (arm for arm in by_arm if arm in BUFFERS):
            values = [[row[k] for row in r["curve"][1:]] for r in by_arm[arm]]
            yield range(1, len(values[0]) + 1), values, arm, list(BUFFERS).index(arm)

    def snrs(k):
        for arm in (arm for arm in ("naive", "reservoir", "lars", "joint") if arm in by_arm):
            yield SNRS, [r["snr"][names[k]] for r in by_arm[arm]], arm, list(BUFFERS).index(arm)

    def singles(k):
        for colour, name in enumerate(names):
            yield SNRS, [r["snr"][name] for r in by_arm[f"only {names[k]}"]], f"tested on {name}", colour

    tested = [f"test users of {name}" for name in names]
    if any(arm in BUFFERS for arm in by_arm):
        figure("forgetting_curve.png", "epoch (shaded: this scenario)", tested, curves, args.epochs)
        figure("nmse_over_snr.png", "SNR, dB", tested, snrs)
    if all(f"only {name}" in by_arm for name in names):
        figure("single_scenario.png", "SNR, dB", [f"trained on {name.split()[0]} only" for name in names], singles)


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
