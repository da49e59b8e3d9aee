"""metrics.py: against hand-computed cases, scipy, and tau2's own."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

import metrics
import oracle
from metrics import bootstrap, cl_metrics, pass_hat_k, transfer_so_far

# isort: split
from tau2.metrics.agent_metrics import pass_hat_k as tau2_pass_hat_k


def test_pass_hat_k_is_tau2s_and_counts_subsets():
    for trials in range(1, 6):
        for successes in range(trials + 1):
            outcomes = [1] * successes + [0] * (trials - successes)
            for k in range(1, trials + 1):
                found = pass_hat_k(successes, trials, k)
                assert found == pytest.approx(np.mean([all(s) for s in itertools.combinations(outcomes, k)]))
                assert found == pytest.approx(tau2_pass_hat_k(trials, successes, k))


def test_cl_metrics_by_hand():
    R = [[0.8, 0.2, 0.1], [0.9, 0.7, 0.1], [0.5, 0.3, 0.6]]
    found = cl_metrics(R, baseline=[0.1, 0.1, 0.2], joint=[0.9, 0.9, 0.9])
    assert found["average"] == pytest.approx((0.5 + 0.3 + 0.6) / 3)
    assert found["backward_transfer"] == pytest.approx(((0.5 - 0.8) + (0.3 - 0.7)) / 2)
    assert found["forward_transfer"] == pytest.approx(((0.2 - 0.1) + (0.1 - 0.2)) / 2)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.3)) / 2)
    assert found["intransigence"] == pytest.approx(((0.9 - 0.8) + (0.9 - 0.7) + (0.9 - 0.6)) / 3)
    assert found["old_task_mean"] == pytest.approx(0.4)


def test_forgetting_leaves_the_last_row_out_of_the_maximum():
    # With the last row in the maximum this would be 0, never negative.
    assert cl_metrics([[0.2, 0.0], [0.6, 0.5]])["forgetting"] == pytest.approx(-0.4)
    alone = cl_metrics([[0.7]], baseline=[0.1])  # one task has nothing to forget
    assert alone["average"] == pytest.approx(0.7)
    assert alone["forgetting"] == alone["backward_transfer"] == alone["forward_transfer"] == 0.0


def test_transfer_so_far_counts_the_domains_trained():
    R = [[0.8, 0.2, 0.1], [0.9, 0.7, 0.1], [0.5, 0.3, 0.6]]
    assert transfer_so_far(R[:1]) == {"average": 0.8, "current": 0.8, "backward_transfer": 0.0, "forgetting": 0.0}
    two = {"average": 0.8, "current": 0.7, "backward_transfer": 0.1, "forgetting": -0.1}
    assert transfer_so_far(R[:2]) == pytest.approx(two)
    whole = cl_metrics(R)
    assert transfer_so_far(R) == {"current": 0.6, **{name: whole[name] for name in two if name != "current"}}


@pytest.mark.parametrize("wrong", [([[0.1, 0.2]],), ([],), ([0.1],), ([[0.1]], [0.1, 0.2]), ([[0.1]], None, [])])
def test_a_matrix_that_is_not_square_and_lists_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match=r"square|entries"):
        cl_metrics(*wrong)


def test_bootstrap_is_the_percentile_interval_of_the_mean():
    values = np.random.default_rng(0).normal(0.4, 0.2, 200)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    low, high = bootstrap(values)
    assert (low, high) == pytest.approx(tuple(theirs), abs=2e-3)
    assert bootstrap([0.5]) == (0.5, 0.5) and bootstrap([]) == (0.0, 0.0)
    assert bootstrap([0.0] * 90, [1.0] * 10) == (0.5, 0.5)  # domains have the same weight
    two = bootstrap(values, values)  # the mean of two independent means
    assert two[1] - two[0] == pytest.approx((high - low) / math.sqrt(2), rel=0.05)


def record(task, reward, **other):
    usual = {"tool_accuracy": 0.5, "turns": 4, "truncated": False, "reward_parts": {"DB": reward, "COMMUNICATE": 1.0}}
    return {"domain": "airline", "task_id": task.id, "reward": reward, **usual, **other}


def test_metrics_of_records_by_hand():
    tasks = oracle.load_tasks("airline", "test")[:3]
    records = [record(tasks[0], r) for r in (1.0, 0.0, 1.0)]
    records += [record(tasks[1], 0.0, tool_accuracy=None)]
    records += [record(tasks[1], 1.0, truncated=True, reward_parts={"DB": 0.5})]
    records += [record(tasks[2], None, turns=10, tool_accuracy=0.0, reward_parts={})]  # invalid
    found = metrics.measure(records, "airline", tasks, 3)
    assert found["reward_mean"] == found["pass_rate"] == pytest.approx(3 / 5)
    assert found["pass_hat_1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["pass_hat_2"] == pytest.approx((1 / 3 + 0) / 2)
    assert found["pass_hat_3"] == 0.0
    assert found["tool_accuracy"] == 0.5
    assert found["turns"] == 5 and found["truncated"] == pytest.approx(1 / 6) and found["invalid"] == 1
    assert found["reward_parts"] == {"COMMUNICATE": 1.0, "DB": pytest.approx((2 + 0 + 0.5) / 5)}
    assert found["tasks"] == 3
    assert (found["do_nothing_rate"], found["do_nothing_parts"]) == oracle.do_nothing("airline", tasks)
    assert (found["reward_low"], found["reward_high"]) == bootstrap([2 / 3, 1 / 2])


def test_the_threshold_says_what_passes():
    tasks = oracle.load_tasks("airline", "test")[:1]
    records = [record(tasks[0], r) for r in (1.0, 0.5, 0.4, 1 - 1e-7)]
    usual = metrics.measure(records, "airline", tasks, 2)
    lower = metrics.measure(records, "airline", tasks, 2, pass_threshold=0.5)
    assert (usual["pass_rate"], usual["pass_hat_2"]) == pytest.approx((2 / 4, 1 / 6))
    assert (lower["pass_rate"], lower["pass_hat_2"]) == pytest.approx((3 / 4, 3 / 6))


@pytest.mark.parametrize("order", [("mock", "airline"), ("airline", "mock")])
def test_a_floor_that_cannot_be_computed_is_shown_as_such(order):
    tasks = {domain: oracle.load_tasks(domain, "base", 2) for domain in order}
    records = [{**record(task, 1.0), "domain": domain} for domain in order for task in tasks[domain]]
    found = {domain: metrics.measure(records, domain, tasks[domain], 1) for domain in order}
    found["mock"].update(do_nothing_rate=None, do_nothing_parts={})  # tau2 cannot grade one of its tasks
    found["overall"] = metrics.overall(found, records, tasks)
    assert found["overall"]["do_nothing_rate"] is None and found["overall"]["reward_mean"] == 1.0
    rows = {line.split("|")[1].strip(): line for line in metrics.text_metrics(found).splitlines()}
    assert rows["reward (doing nothing)"].count("1.000 (n/a)") == 2 and rows["part DB"].count("1.000 (n/a)") == 1
