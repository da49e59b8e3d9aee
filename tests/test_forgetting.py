"""experiments/forgetting.py: points of a run, fits against numpy, laws that are known."""

import json
import sys

import numpy as np
import pandas as pd
import pytest

from experiments import forgetting

ORDER = ["airline", "retail", "telecom"]
R = [[0.9, 0.0, 0.1], [0.5, 0.8, 0.0], [0.2, 0.6, 0.7]]


def write_summary(folder, seed, R=R, **changes):
    evaluation = {d: {"do_nothing_rate": 0.0} for d in ORDER}
    summary = {
        **{"cl_algorithm": "sequential", "task_order": ORDER, "stages": ORDER, "R": R, "seed": seed, "split": "train"},
        **{"user": "scripted", "note": "", "baseline": dict.fromkeys(ORDER, 0.0), "warm_start": {}, "metrics": {}},
        **{"evaluation": evaluation, "do_nothing_rate": dict.fromkeys(ORDER, 0.0), "statistics": {}, "bytes_kept": 0},
        **{
            "minutes": 1.0,
            "ranks": 1,
            "versions": {"tau2": ""},
            "config": {"seed": seed, "kl_coef": 0.1},
            "command": "",
        },
    }
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}))


def write_run(folder, seed, drift=lambda k, j: 0.1 * (k + j), R=R, **changes):
    folder.mkdir()
    write_summary(folder, seed, R, **changes)
    lines = []
    for k in range(3):
        names = {"initial": 9.0} | {ORDER[i]: 0.0 for i in range(k)}
        record = {
            f"drift_{kind}/{p}/{d}": 9.0 for kind in ("forward", "reverse") for p in names for d in ORDER[: k + 1]
        }
        for j in range(k + 1):
            record[f"drift_forward/{ORDER[max(k - 1, 0)]}/{ORDER[j]}"] = drift(k, j)
            record[f"drift_reverse/{ORDER[max(k - 1, 0)]}/{ORDER[j]}"] = 9.0 + k + j
        lines.append(json.dumps({"kind": "transfer", **record}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return str(folder)


def test_a_run_has_a_point_for_each_domain_after_the_first(tmp_path):
    found = pd.DataFrame(forgetting.points_of(write_run(tmp_path / "run", 7)))
    assert found[["new", "seed"]].values.tolist() == [["retail", 7], ["telecom", 7]]
    assert found.forgotten.tolist() == pytest.approx([0.4, (0.3 + 0.2) / 2])
    assert found["forward new"].tolist() == pytest.approx([0.2, 0.4])  # 0.1 (k + k)
    assert found["forward old"].tolist() == pytest.approx([0.1, (0.2 + 0.3) / 2])  # 0.1 (k + j)
    assert found["reverse old"].tolist() == pytest.approx([10.0, 11.5])


def test_what_had_nothing_to_lose_does_not_count(tmp_path):
    rows = [[0.9, 0.0, 0.0], [0.1, 0.8, 0.0], [0.0, 0.6, 0.7]]
    found = forgetting.points_of(write_run(tmp_path / "run", 0, R=rows))
    assert [point["forgotten"] for point in found] == pytest.approx([0.8, 0.2])  # airline was at 0.1
    assert [point["before"] for point in found] == pytest.approx([0.9, 0.8])
    assert found[1]["forward old"] == pytest.approx(0.3)
    rows = [[0.1, 0.0, 0.0], [0.1, 0.2, 0.0], [0.0, 0.0, 0.7]]
    assert forgetting.points_of(write_run(tmp_path / "lost", 0, R=rows)) == []


def test_a_domain_without_a_usable_conversation_has_no_drift(tmp_path):
    run = write_run(tmp_path / "run", 0)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [{n: v for n, v in json.loads(line).items() if not n.endswith("/retail")} for line in path.open()]
    path.write_text("\n".join(map(json.dumps, lines)))
    [point] = forgetting.points_of(run)  # of telecom, over airline
    assert (point["new"], point["forgotten"]) == ("telecom", pytest.approx(0.3))


@pytest.mark.parametrize("degree", [1, 2])
def test_fits_go_through_the_origin(degree):
    rng = np.random.default_rng(0)
    x, y = rng.random(20), rng.random(20)
    powers = np.vander(x, degree + 1, increasing=True)[:, 1:]
    expected = np.linalg.solve(powers.T @ powers, powers.T @ y)  # the normal equations
    assert forgetting.fitted(x, y, degree) == pytest.approx(expected)
    rest = y - powers @ expected
    assert forgetting.r_squared(x, y, degree) == pytest.approx(1 - rest @ rest / (20 * y.var()))


def test_a_law_that_is_known_is_found(tmp_path, monkeypatch, capsys):
    """Forgetting is 3 x^2 of the forward drift on the old domains, whatever the new one's."""
    rng, runs = np.random.default_rng(0), []
    for seed in range(6):
        first, second = 0.4 * rng.random(2)
        rows = np.ones((3, 3))
        rows[1, 0] = 1 - 3 * first**2
        rows[2, :2] = rows[1, :2] - 3 * second**2
        drift = {(1, 0): first, (2, 0): second, (2, 1): second}
        runs.append(
            write_run(tmp_path / f"run{seed}", seed, lambda k, j, d=drift: d.get((k, j), rng.random()), rows.tolist())
        )
    monkeypatch.setattr(forgetting, "RESAMPLES", 50)
    forgetting.run_experiment(forgetting.Args(runs=runs, output=str(tmp_path / "out")))
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "1.00 [1.00, 1.00]" in rows["forward KL, old domain"]
    assert "1.00" not in rows["forward KL, new domain"]
    assert len(pd.read_csv(tmp_path / "out" / "points.csv")) == 12
    assert (tmp_path / "out" / "forgetting.png").stat().st_size > 10_000


def test_the_interval_is_over_seeds():
    """Runs of one seed stay together: copies of them do not narrow it."""
    rng = np.random.default_rng(0)
    points = pd.DataFrame({"seed": range(8), "forgotten": rng.random(8)})
    several = pd.concat([points] * 5)
    intervals = [forgetting.over_seeds(of, lambda chosen: chosen.forgotten.mean()) for of in (points, several)]
    assert intervals[0] == pytest.approx(intervals[1])
    assert intervals[0][1] < intervals[0][0] < intervals[0][2]


def test_what_has_no_law_is_one_line(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", 0)
    three = [run, write_run(tmp_path / "run1", 1), write_run(tmp_path / "run2", 2)]
    joint = write_run(tmp_path / "joint", 0, stages=["1/3 of all", "2/3 of all", "3/3 of all"])
    (tmp_path / "silent").mkdir()
    for name in ("summary.json", "metrics.jsonl"):
        (tmp_path / "silent" / name).write_text((tmp_path / "run" / name).read_text().replace("drift_", "other_"))
    for runs, message in (
        ([tmp_path / "silent", run], "has not logged its drift"),
        ([run, joint], "a law needs runs of 3 seeds at least, of several domains in sequence; got 1"),
        ([tmp_path / "nowhere"], "is not a finished run"),
        ([*three, f"{run}/"], "run has the settings and the seed 0 of another run"),
    ):
        monkeypatch.setattr(sys, "argv", ["forgetting.py", "--runs", *map(str, runs), "--output", str(tmp_path / "o")])
        with pytest.raises(SystemExit) as stop:
            forgetting.runner.run_command(forgetting.Args, forgetting.run_experiment)
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "o").exists()
