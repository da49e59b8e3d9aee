"""eval.py: metrics against hand-computed cases and tau2's own, and the comparison of runs."""

import itertools
import json
import math

import numpy as np
import pytest
from tau2.metrics.agent_metrics import pass_hat_k as tau2_pass_hat_k

import eval as evaluation
from eval import cl_metrics, interval, pass_hat_k


def test_pass_hat_k_is_tau2s_and_counts_subsets():
    for trials in range(1, 6):
        for successes in range(trials + 1):
            outcomes = [1] * successes + [0] * (trials - successes)
            for k in range(1, trials + 1):
                subsets = list(itertools.combinations(outcomes, k))
                assert pass_hat_k(successes, trials, k) == pytest.approx(np.mean([all(s) for s in subsets]))
                assert pass_hat_k(successes, trials, k) == pytest.approx(tau2_pass_hat_k(trials, successes, k))


def test_cl_metrics_by_hand():
    R = [[0.8, 0.2, 0.1], [0.9, 0.7, 0.1], [0.5, 0.3, 0.6]]
    metrics = cl_metrics(R, baseline=[0.1, 0.1, 0.2], joint=[0.9, 0.9, 0.9])
    assert metrics["average"] == pytest.approx((0.5 + 0.3 + 0.6) / 3)
    assert metrics["backward_transfer"] == pytest.approx(((0.5 - 0.8) + (0.3 - 0.7)) / 2)
    assert metrics["forward_transfer"] == pytest.approx(((0.2 - 0.1) + (0.1 - 0.2)) / 2)
    assert metrics["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.3)) / 2)
    assert metrics["intransigence"] == pytest.approx(((0.9 - 0.8) + (0.9 - 0.7) + (0.9 - 0.6)) / 3)
    assert metrics["old_task_mean"] == pytest.approx(0.4)
    assert R[2] == [0.5, 0.3, 0.6]  # arguments are left alone


def test_forgetting_leaves_the_last_row_out_of_the_maximum():
    # With the last row in the maximum this would be 0, never negative.
    assert cl_metrics([[0.2, 0.0], [0.6, 0.5]])["forgetting"] == pytest.approx(-0.4)


def test_one_task_has_nothing_to_forget():
    assert cl_metrics([[0.7]])["forgetting"] == 0.0
    assert cl_metrics([[0.7]])["average"] == pytest.approx(0.7)


@pytest.mark.parametrize("R", [[[0.1, 0.2]], [], [0.1]])
def test_a_matrix_that_is_not_square_is_refused(R):
    with pytest.raises(ValueError, match="square"):
        cl_metrics(R)


def test_interval_is_students():
    mean, half = interval([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(4.303 * np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3))
    assert math.isnan(interval([0.5])[1])


def summary(algorithm, seed, forgetting, minutes):
    return {
        "cl_algorithm": algorithm,
        "bytes_kept": 1500,
        "task_order": ["airline", "retail"],
        "R": [[0.8, 0.0], [0.8 - forgetting, 0.6]],
        "warm_start": {"airline": 0.5, "retail": 0.4},
        "metrics": cl_metrics([[0.8, 0.0], [0.8 - forgetting, 0.6]]),
        "minutes": minutes,
        "config": {"cl_algorithm": algorithm, "seed": seed, "run_name": f"{algorithm}{seed}", "replay_ratio": 0.2},
    }


def test_compare_groups_runs_over_seeds(tmp_path):
    runs = []
    for algorithm, forgetting, minutes in (("sequential", 0.6, 4.0), ("replay", 0.1, 5.0)):
        for seed in (0, 1, 2):
            run = tmp_path / f"{algorithm}{seed}"
            run.mkdir()
            (run / "summary.json").write_text(json.dumps(summary(algorithm, seed, forgetting, minutes)))
            runs.append(run)
    table = evaluation.compare(runs).splitlines()
    assert len(table) == 4
    assert table[2].startswith("| sequential | 3 | 0.60 ± 0.00 |")
    assert table[3].startswith("| replay | 3 | 0.10 ± 0.00 |")
    assert table[3].endswith("| +0.20 (retail) | 5.00 ± 0.00 | 1.25 | 1.5 |")


def test_compare_names_what_a_row_differs_in(tmp_path):
    runs = []
    for ratio in (0.2, 0.2, 0.5, 0.2):
        run = tmp_path / str(len(runs))
        run.mkdir()
        values = summary("replay" if len(runs) else "sequential", len(runs), 0.1, 1.0)
        values["config"] = {**values["config"], "replay_ratio": ratio}
        (run / "summary.json").write_text(json.dumps(values))
        runs.append(run)
    table = evaluation.compare(runs).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["sequential", "replay", "replay, replay_ratio 0.5"]
    assert table[-1] == "Where not named: replay_ratio 0.2."


def test_compare_counts_no_run_twice_and_names_damaged_ones(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary("replay", 3, 0.1, 1.0)))
    with pytest.raises(ValueError, match="the seed 3 of another run"):
        evaluation.compare([tmp_path, str(tmp_path)])
    for spoilt in ("", "[]", "{}", json.dumps({**summary("replay", 3, 0.1, 1.0), "R": None}).replace('"R"', '"S"')):
        path.write_text(spoilt)
        with pytest.raises(ValueError, match="damaged"):
            evaluation.compare([tmp_path])


def test_compare_names_what_is_not_a_run(tmp_path):
    with pytest.raises(ValueError, match="not a finished run"):
        evaluation.compare([tmp_path])
