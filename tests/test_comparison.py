"""comparison.py: the statistics against scipy and by hand, arms, tables, CSV and pictures."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_report import cells, summary

import comparison
from experiments import runner
from metrics import bootstrap
from report import interval

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("differences", [[0.3, 0.1], [0.1, -0.2, 0.4], [0.0, 0.0], [0.2] * 10, RNG.normal(0.3, 1, 12)])
def test_the_sign_flip_test_is_exact(differences):
    found = comparison.sign_flip_test(differences)
    result = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found == pytest.approx(result.pvalue)


def test_the_sign_flip_test_by_hand():
    # The observed sum is 2.5. Of the 8 sums of +-2, +-1 and +-0.5, those as far from 0 are +-3.5 and +-2.5.
    assert comparison.sign_flip_test([2.0, 1.0, -0.5]) == 4 / 8
    assert comparison.sign_flip_test(np.full(10, 0.1)) == 2 / 1024 and np.isnan(comparison.sign_flip_test([]))


def test_many_differences_are_tested_with_random_signs():
    found = comparison.sign_flip_test(differences := RNG.normal(0.35, 1, 30))
    result = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=100_000, rng=1)
    assert found == pytest.approx(result.pvalue, abs=0.004)
    assert comparison.sign_flip_test(np.ones(30)) < 1e-5


def test_the_sign_flip_test_keeps_its_level():
    """Without an effect, p is below 5% in at most 5% of the experiments."""
    p = np.array([comparison.sign_flip_test(x) for x in np.random.default_rng(1).normal(size=(2000, 8))])
    assert abs((p <= 0.05).mean() - 0.047) < 0.015  # 12 of 256 patterns are the most that fit


def test_holms_correction():
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    for p in RNG.uniform(size=(20, 6)):  # a p value is rejected at its adjusted level, and not below it
        for i, adjusted in enumerate(comparison.holm(p)):
            smaller = sorted(p)
            steps = [(6 - k) * q for k, q in enumerate(smaller) if q <= p[i]]
            assert adjusted == pytest.approx(min(1.0, max(steps)))


def test_an_experiments_table_has_corrected_p_values():
    values = {"naive": [0.1, 0.2, 0.3], "a": [0.4, 0.4, 0.6], "b": [0.2, 0.1, 0.3]}
    assert runner.p_values(values, "naive") == {"a": "0.500", "b": "1.000"}  # 2 * 2 / 8
    assert runner.p_values(values, "other") == {}


@pytest.mark.parametrize("runs", [1, 3, 4, 10])
def test_the_interquartile_mean(runs):
    scores = RNG.uniform(size=(3, runs))
    assert comparison.interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores.ravel(), 0.25))


def test_the_bootstrap_of_the_interquartile_mean_resamples_within_domains():
    scores = [RNG.normal(mean, 0.1, 12) for mean in (0.0, 0.5, 1.0)]
    low, high = bootstrap(*scores, statistic=comparison.interquartile_mean)
    rng, drawn = np.random.default_rng(5), []
    for _ in range(4000):
        drawn.append(stats.trim_mean(np.concatenate([rng.choice(values, 12) for values in scores]), 0.25))
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.01)


def test_the_probability_of_improvement_is_that_of_mann_and_whitney():
    mine, others = RNG.integers(0, 5, (7, 2)), RNG.integers(0, 5, (9, 2))
    u = [stats.mannwhitneyu(mine[:, k], others[:, k]).statistic / 63 for k in range(2)]
    assert comparison.probability_of_improvement(mine, others) == pytest.approx(np.mean(u))


def test_compare_groups_runs_over_seeds(compared):
    settings = (("sequential", 0.6, 4.0), ("replay", 0.1, 5.0))
    rows = [{**summary(a, s, f), "sampled_tokens": 1000 * m} for s in (0, 1, 2) for a, f, m in settings]
    arms, domains, tests, _ = compared(rows).split("\n\n")
    header, sequential, replay = cells(arms)
    means = ["average", "forgetting", "backward transfer", "plasticity", "intransigence"]
    costs = ["conversations", "sampled tokens, k", "CPU seconds", "kept, kB"]
    assert header == ["algorithm", "seeds", "IQM", *means, *costs]
    assert sequential[:5] == ["sequential", "3", "0.40 [0.40, 0.40]", "0.40 ± 0.00", "0.60 ± 0.00"]
    assert replay[4:] == ["0.10 ± 0.00", "-0.10 ± 0.00", "0.70 ± 0.00", "", "", "5", "", "1.5"]
    assert ["replay", "airline", "0.80 ± 0.00", "0.70 ± 0.00", "0.30 ± 0.00"] in cells(domains)
    assert cells(tests)[0][:4] == ["less sequential's, by seed", "seeds", "average", "p (average)"]


def test_a_row_is_named_by_the_settings_in_which_it_differs(compared):
    settings = [("sequential", {}), ("replay", {}), ("replay", {"ratio": 0.5}), ("replay", {"penalty": None})]
    settings += [("replay", {"vllm_url": [f"http://host:800{k}"], "drift_every": k}) for k in (1, 2)]
    table = compared([summary(a, s, 0.1, **other) for s, (a, other) in enumerate(settings)])
    rows = cells(table.split("\n\n")[0])[1:]
    assert [row[0] for row in rows] == ["sequential", "replay", "replay, ratio 0.5"]
    assert table.split("\n\n")[1] == "Where not named: ratio 0.2."


def test_differences_from_sequential_are_paired_by_seed(compared):
    seeds = {"sequential": {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.1}, "replay": {2: 0.3, 0: 0.2, 1: 0.1}}
    table = compared([summary(name, s, f) for name, found in seeds.items() for s, f in found.items()])
    mean, half = interval([0.2 - 0.5, 0.1 - 0.6, 0.3 - 0.7])
    average = f"{-mean / 2:+.2f} ± {half / 2:.2f}"  # of two domains, one forgets
    forgetting = f"{mean:+.2f} ± {half:.2f}"
    improved = f"{(9.5 / 12 + 0.5) / 2:.2f}"  # of 12 pairs in airline: 9 wins and a tie; in retail: ties
    expected = ["replay", "3", average, "0.250", "0.250", forgetting, "0.250", "0.250", improved]
    assert cells(table)[-1] == expected


def test_a_comparison_is_written_as_table_csv_and_pictures(compared, tmp_path, recwarn):
    rows = [(name, seed, k / 10) for k, name in enumerate(["sequential", *"abcdefg"]) for seed in (0, 1)]
    table = compared([summary(*row) for row in rows])
    assert (tmp_path / "out" / "comparison.md").read_text() == table + "\n"
    found = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert list(zip(found.algorithm, found.seed, found.forgetting.round(6), strict=True)) == rows
    assert found["airline after retail"].tolist() == pytest.approx([0.8 - forgetting for _, _, forgetting in rows])
    for name in ("comparison.png", "learning_curves.png", "p_values.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert not [w for w in recwarn if "layout" in str(w.message)]


def test_compare_counts_no_run_twice(compared):
    with pytest.raises(ValueError, match="the seed 3 of another run"):
        compared([summary("replay", 3, 0.1)] * 2)


def test_runs_of_a_single_domain_are_what_intransigence_refers_to(compared):
    alone = [
        {**summary("sequential", s, 0.0), "task_order": [d], "stages": [d], "R": [[score]]} for s, d, score in ALONE
    ]
    arms = cells(compared([summary("replay", 0, 0.1), *alone]).split("\n\n")[0])
    assert [row[0] for row in arms[1:]] == ["replay"]  # they are no arm
    assert arms[1][7] == "0.15"  # (0.9 + 0.8) / 2 less (0.8 + 0.6) / 2


ALONE = [(0, "airline", 1.0), (1, "airline", 0.8), (0, "retail", 0.8)]


def turned(found):
    """The same run with its domains in the other order."""
    order = found["task_order"][::-1]
    return {**found, "task_order": order, "stages": order, "config": {**found["config"], "task_order": order}}


def test_an_order_of_domains_is_compared_with_the_same_order(compared):
    runs = [summary("sequential", s, 0.5) for s in (0, 1, 2)] + [summary("replay", 0, 0.2)]
    runs += [turned(summary("sequential", s, 0.8)) for s in (0, 1)] + [
        turned(summary("replay", s, 0.6)) for s in (0, 1)
    ]
    tests = {row[0]: row[1:] for row in cells(compared(runs).split("\n\n")[-2])[1:]}
    assert tests["replay"][:2] == ["1", "+0.15"]
    assert tests["replay, retail -> airline"][:2] == ["2", "+0.10 ± 0.00"]


def test_another_baseline_can_be_chosen(compared, tmp_path):
    runs = [summary(a, s, f) for s in (0, 1) for a, f in (("sequential", 0.5), ("replay", 0.2), ("ewc", 0.4))]
    tests = compared(runs, baseline="replay").split("\n\n")[-2]
    assert [row[:3] for row in cells(tests)][1:] == [["sequential", "2", "-0.15 ± 0.00"], ["ewc", "2", "-0.10 ± 0.00"]]
    with pytest.raises(ValueError, match="no arm 'er' to compare with; there are: sequential; replay; ewc"):
        comparison.compare(sorted(tmp_path.glob("run*")), tmp_path / "out", baseline="er")


@pytest.mark.parametrize("seeds, shown", [(3, "it cannot fall below"), (8, "it can fall below")])
def test_it_says_what_the_seeds_can_show(compared, seeds, shown):
    text = compared([summary(a, s, 0.1 + s / 10) for s in range(seeds) for a in ("sequential", "replay", "ewc")])
    assert shown in text and f"With {seeds} paired seeds p is at least {2 / 2**seeds:.3f}" in text


def test_runs_of_several_revisions_are_said_to_be(compared):
    text = compared([{**summary("replay", s, 0.1), "revision": f"abc{s}"} for s in (0, 1)])
    assert "The runs are of 2 revisions: abc0, abc1." in text
