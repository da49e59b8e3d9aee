"""Buffers and penalties compared on a supervised problem: predicting the next MIMO channel.

    python experiments/channels.py --seeds 0 1 2 3 4     table and pictures in runs/channel_prediction

A network (an LSTM, unless --network names another) learns three scenarios of 3GPP TR 38.901, one after the other.
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
from pydantic import Field
from torch import nn

from comparison import sign_flip_test
from experiments import runner
from experiments.runner import Several, cell, of_arm
from flags import Count, Few, LearningRate, Units, Weight
from replay import POLICIES, Buffer, add, sample, update_losses
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

# The buffer policy of each arm: all policies are arms but "recent", which keeps nothing of the past.
BUFFERS = {"naive": None} | {policy: policy for policy in POLICIES if policy != "recent"}
BUFFERS |= {"lars_distill": "lars", "er_plus": "reservoir", "ewc": None, "online_ewc": None, "lwf": None, "joint": None}
ARMS = (*BUFFERS, *(f"only {name}" for name in SCENARIOS))
# Compared seed by seed.
PAIRS = (("lars", "reservoir"), ("lars_inverse", "lars"), ("lars_rank", "lars"), ("labrs", "reservoir"))
PAIRS += (("labrs_released", "labrs"), ("labrs_product", "labrs"), ("brs", "reservoir"), ("er_plus", "reservoir"))
PAIRS += (("lars_distill", "lars"), ("online_ewc", "ewc"), ("random", "naive"))
# Units per layer, relative to --hidden: all networks have about as many parameters.
WIDTHS = {"lstm": 1.0, "gru": 1.16, "transformer": 0.75}
HEADS = 4  # of the transformer


@dataclass(kw_only=True)
class Args(runner.Flags):
    """Compares replay buffers and penalties: a network learns to predict the next MIMO channel in one scenario after
    another."""

    output: str = "runs/channel_prediction"
    """directory for results, table and pictures. Finished jobs there are not run again"""
    arms: Several[Literal[ARMS]] = field(default_factory=lambda: list(ARMS))
    """what to compare; "only ..." trains on that scenario alone"""
    network: Literal[tuple(WIDTHS)] = "lstm"
    """the network that predicts"""
    hidden: Units = 64
    """units per layer of the LSTM. The others get a width that makes about as many parameters"""
    layers: Few = 3
    """layers of the network"""
    users: Annotated[int, Field(ge=5, le=10**6)] = 256
    """users per scenario; a fifth of them is for testing"""
    past: Few = 8
    """channels that the next one is predicted from"""
    epochs: Count = 12
    """epochs per scenario"""
    batch_size: Count = 64
    """new windows per step. With a buffer as many replayed ones are added; joint takes twice as many new ones"""
    capacity: Count = 500
    """windows that a buffer holds"""
    learning_rate: LearningRate = 5e-3
    """learning rate of Adam at the start"""
    distill_coef: Weight = 1.0
    """lars_distill: weight of the NMSE to the predictions of the previous scenario's model on old windows"""
    ewc_lambda: Weight = 100.0
    """weight of the penalty of ewc and online_ewc"""
    er_plus_lambda: Weight = 1.0
    """er_plus: weight of EWC's penalty beside replay"""
    lwf_coef: Weight = 0.1
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
    """The next channel from `past` noisy ones: complex (B, past, antennas) -> (B, antennas)."""

    def __init__(self, network="lstm", hidden=64, layers=3, past=8, antennas=RX * TX):
        super().__init__()
        width = round(WIDTHS[network] * hidden)
        self.enter = None
        if network == "transformer":  # no norm at the end: it would hide the amplitude, which is predicted
            width = HEADS * max(1, round(width / HEADS))
            self.enter = nn.Linear(2 * antennas, width)
            self.position = nn.Parameter(0.02 * torch.randn(past, width))
            kind = {"dropout": 0.0, "batch_first": True, "norm_first": True}
            blocks = [nn.TransformerEncoderLayer(width, HEADS, 4 * width, **kind) for _ in range(layers)]
            self.body = nn.Sequential(*blocks)
        else:
            recurrent = {"lstm": nn.LSTM, "gru": nn.GRU}[network]
            self.body = recurrent(2 * antennas, width, layers, batch_first=True)
        self.head = nn.Linear(width, 2 * antennas)

    def forward(self, noisy):
        x = torch.view_as_real(noisy).flatten(-2)
        states = self.body(x)[0] if self.enter is None else self.body(self.enter(x) + self.position)
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


def make_network(args: Args):
    return ChannelPredictor(args.network, args.hidden, args.layers, args.past)


def run_arm(args: Args, arm, seed) -> dict:
    """Trains one model over its scenarios. Returns the NMSE in dB on each scenario's test users: "curve" at TABLE_SNR,
    before training and after each epoch, and "snr" at the end over SNRS; also the seconds, the bytes kept, and, of
    policies that go by losses, "easy_evicted": the share of evicted items with a loss below the buffer's median."""
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    windows = channel_windows(args, seed)
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    model = make_network(args).to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate)
    stages = [arm.removeprefix("only ")] if arm.startswith("only ") else list(SCENARIOS)
    policy, penalty, teacher, seen = BUFFERS.get(arm), of_arm(arm, args), None, 0
    buffer, easy_evicted = Buffer(args.capacity), []
    share = 2 if arm == "joint" else 1  # so that all arms have as many windows in a step
    size = share * len(windows[stages[0]][0])  # of an epoch
    decay = FINAL_RATE ** (1 / (len(stages) * args.epochs * size))  # per new window
    by_loss = policy is not None and policy.startswith(("lars", "labrs"))

    def measure(snr):
        return [measure_nmse(model, test, snr) for _, test in windows.values()]

    def offer(items, stage):
        losses = difficulty(items) if by_loss else [0.0] * len(items)
        for item, loss in zip(items, losses, strict=True):
            before = np.array(buffer.losses)
            slot = add(buffer, item.clone(), label=stage, loss=loss, policy=policy, rng=rng)
            if by_loss and slot is not None and len(before) == args.capacity:
                easy_evicted.append(before[slot] < np.median(before))

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
                    offer(train[index], stage)
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
    result = {"arm": arm, "seed": seed, "seconds": time.perf_counter() - start, "curve": curve, "snr": snr}
    return result | {"bytes_kept": bytes_kept, "easy_evicted": float(np.mean(easy_evicted)) if easy_evicted else None}


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


def forgetting_curves(args: Args, results) -> list[np.ndarray]:
    """For each scenario but the last, (seeds, epochs after its own training): the rise of the NMSE, in dB, since its
    own last epoch."""
    curves = np.array([r["curve"] for r in results])
    own = [(k + 1) * args.epochs for k in range(len(SCENARIOS) - 1)]
    return [curves[:, end + 1 :, k] - curves[:, end : end + 1, k] for k, end in enumerate(own)]


def area_below_naive(naive, arm) -> np.ndarray:
    """(seeds,): the area between naive's forgetting curves and the arm's, in dB x epochs: the sum over the epochs after
    a scenario's own training, and over scenarios. Positive: the arm forgot less.

    Example, one scenario and one seed: naive rises by [6, 4, -1] and the arm by [1, 0, -2]; the area is 5 + 4 + 1 = 10.
    """
    return sum((n - a).sum(1) for n, a in zip(naive, arm, strict=True))


def write_table(args: Args, by_arm):
    """Prints the table, means over seeds, and writes it as table.md. `joint` and arms of one scenario have no
    forgetting."""
    final = {arm: np.array([r["curve"][-1] for r in results]) for arm, results in by_arm.items()}
    rose = {arm: forgetting_curves(args, r) for arm, r in by_arm.items() if arm in BUFFERS and arm != "joint"}
    p, rows = runner.p_values({arm: values.mean(1) for arm, values in final.items()}, "naive"), []
    for arm, results in by_arm.items():
        row = {f"NMSE, dB at {TABLE_SNR:g} dB SNR": arm}
        row |= {name: cell(values) for name, values in zip(SCENARIOS, final[arm].T, strict=True)}
        row |= {"mean": cell(final[arm].mean(1)), "p against naive, Holm": p.get(arm, "")}
        for k, name in enumerate(list(SCENARIOS)[:-1]):
            row[f"forgetting {name.split()[0]}"] = cell(rose[arm][k][:, -1]) if arm in rose else ""
        compared = arm in rose and "naive" in rose and arm != "naive"
        row["area below naive, dB x epochs"] = cell(area_below_naive(rose["naive"], rose[arm]), 1) if compared else ""
        easy = [r["easy_evicted"] for r in results if r["easy_evicted"] is not None]
        row["evicted from the easier half"] = f"{np.mean(easy):.0%}" if easy else ""
        row["seconds"] = f"{np.mean([r['seconds'] for r in results]):.0f}"
        row["kept, kB"] = f"{np.mean([r['bytes_kept'] for r in results]) / 1000:.0f}"
        rows.append(row)
    runner.show_table(rows, Path(args.output))
    print(f"\n{args.network}: {sum(p.numel() for p in make_network(args).parameters())} parameters")
    for arm, other in PAIRS:
        if arm in final and other in final:
            gaps = final[arm].mean(1) - final[other].mean(1)
            p = sign_flip_test(gaps)
            print(f"{arm} less {other}: {cell(gaps)} dB, p = {p:.3f} (mean over scenarios, paired by seed)")


def plot_results(args: Args, by_arm):
    """forgetting_curve.png, nmse_over_snr.png and single_scenario.png: means over seeds, 95% intervals as bands."""
    names = list(SCENARIOS)

    def figure(file, xlabel, panels, epochs=0):
        """panels: {title: [(x, values (seeds, len(x)), label, colour)]}. epochs: of a scenario; each is shaded in its
        colour, except for joint, which trains on all."""
        columns = min(len(panels), 4)
        rows = math.ceil(len(panels) / columns)
        path, size = Path(args.output) / file, (7.2, 1.2 + 1.4 * rows)
        with runner.picture(path, rows, columns, size, sharex=True, sharey=True) as drawn:
            for axes, (title, lines) in zip(drawn, panels.items(), strict=False):
                for x, values, label, colour in lines:
                    mean, half = np.array([interval(column) for column in np.array(values).T]).T
                    dashes = {"C1": "--", "C2": "-.", "C3": ":"}.get(colour, "-")
                    axes.plot(x, mean, color=colour, linestyle=dashes, label=label, linewidth=1.2)
                    axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, lw=0)
                for k in range(len(names) if epochs and title != "joint" else 0):
                    axes.axvspan(k * epochs, (k + 1) * epochs, color=f"C{k}", alpha=0.1, linewidth=0)
                axes.set_title(title)
                axes.grid(alpha=0.3)
            drawn[0].figure.supxlabel(xlabel, fontsize=8)
            drawn[0].figure.supylabel("NMSE, dB", fontsize=8)

    def curve(arm, k):
        values = [[row[k] for row in r["curve"][1:]] for r in by_arm[arm]]
        return range(1, len(values[0]) + 1), values

    def snr(arm, name):
        return SNRS, [r["snr"][name] for r in by_arm[arm]]

    arms = [arm for arm in by_arm if arm in BUFFERS]
    if arms:
        grey = [(*curve("naive", k), "_" if k else "naive", "0.6") for k in range(len(names)) if "naive" in arms]
        panels = {arm: grey + [(*curve(arm, k), name, f"C{k}") for k, name in enumerate(names)] for arm in arms}
        figure("forgetting_curve.png", "epoch (shaded: the scenario in training)", panels, args.epochs)
    shown = [(f"C{k}", arm) for k, arm in enumerate(("naive", "reservoir", "lars", "joint")) if arm in arms]
    if shown:
        panels = {f"test users of {name}": [(*snr(arm, name), arm, c) for c, arm in shown] for name in names}
        figure("nmse_over_snr.png", "SNR, dB", panels)
    if all(f"only {name}" in by_arm for name in names):
        panels = {
            f"trained on {only.split()[0]} only": [
                (*snr(f"only {only}", name), f"tested on {name}", f"C{k}") for k, name in enumerate(names)
            ]
            for only in names
        }
        figure("single_scenario.png", "SNR, dB", panels)


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
