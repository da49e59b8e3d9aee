"""variants.py: gold passes and the old gold fails by tau2's own evaluator; nothing of the original is left in it."""

import json

import pytest
from test_forgetting import write_summary

import eval as evaluation
import oracle
import policy
import train
import variants
from environment import all_tasks, gold_changes, template
from experiments import generalisation
from experiments.generalisation import with_old_gold

VARIED = ("airline~1", "retail~1", "telecom~1")


def chosen(variant):
    """(a task of the variant, the original) of every third task; of every 100th in telecom, which has thousands."""
    originals = list(all_tasks(variants.original(variant)).values())
    return [(all_tasks(variant)[task.id], task) for task in originals[:: 100 if len(originals) > 1000 else 3]]


def writes(variant, task, names) -> bool:
    """Whether one of the original's gold actions changes something that has another name in the variant."""
    env = template(variant, False)
    for action in task.evaluation_criteria.actions or []:
        tool = env.tools.get_tools().get(action.name)
        reads = tool is not None and env.tools.tool_type(action.name).value != "write"
        if not reads and action.arguments != variants.rewritten(action.arguments, names):
            return True
    return False


@pytest.mark.parametrize("variant", VARIED)
def test_gold_passes_and_the_old_gold_fails_where_it_changes_what_is_named(variant):
    names = variants.renaming(variants.original(variant), 1)
    failed = 0
    for task, original in chosen(variant):
        assert oracle.score(oracle.demonstrate(variant, task)).reward == 1.0, task.id
        passed = oracle.score(with_old_gold(variant, task)).reward == 1.0
        changes = gold_changes(variant, task) and writes(variant, original, names)  # some gold actions are refused
        assert passed != bool(changes), task.id
        failed += not passed
    assert failed > 0.5 * len(chosen(variant))


@pytest.mark.parametrize("variant", VARIED)
def test_tau2s_evaluator_agrees(variant):
    """The slow way, in environments that tau2 builds by itself."""
    task, _ = chosen(variant)[7]
    assert oracle.score(oracle.demonstrate(variant, task), verify=True).reward == 1.0
    assert oracle.score(with_old_gold(variant, task), verify=True).reward == 0.0


@pytest.mark.parametrize("variant", VARIED)
def test_nothing_of_the_original_is_left(variant):
    """The renaming can be undone, and no id of the original is in the variant, in no task."""
    domain = variants.original(variant)
    names = variants.renaming(domain, 1)
    back = {new: old for old, new in names.items()}
    assert len(back) == len(names)
    old, new = template(domain, False), template(variant, False)
    for before, after in ((old.tools, new.tools), (old.user_tools, new.user_tools)):
        if before is not None:
            before, after = before.db.model_dump(), after.db.model_dump()
            assert variants.rewritten(after, back) == before
    ids = {old for old in names if any(sign.isdigit() for sign in old)}
    rest = [task.model_dump_json(exclude={"id"}) for task in all_tasks(variant).values()]
    words = {word for text in (new.tools.db.model_dump_json(), *rest) for word in variants.TOKEN.findall(text)}
    assert len(ids) > 20 and not ids & (words | {word.removeprefix("#") for word in words})


def test_a_seed_is_a_variant():
    first, second = variants.renaming("airline", 1), variants.renaming("airline", 2)
    assert first.keys() == second.keys() and sum(first[old] == second[old] for old in first) < 0.02 * len(first)
    variants.renaming.cache_clear()
    assert variants.renaming("airline", 1) == first


def test_words_ids_and_addresses_are_found_in_texts():
    names = {"Mia": "Noah", "Li": "Kim", "mia_li_3668": "noah_kim_1234", "#W12": "#W98", "m.li@x.org": "n.kim@x.org"}
    text = "I'm Mia Li (mia_li_3668, m.li@x.org). Order #W12, or #W123? Mia's; Mia.Li; Mialy."
    expected = "I'm Noah Kim (noah_kim_1234, n.kim@x.org). Order #W98, or #W123? Noah's; Noah.Kim; Mialy."
    found = variants.rewritten({"Mia": [text, 7, None, True]}, names)
    assert found == {"Noah": [expected, 7, None, True]}


def test_a_variant_has_variants():
    assert variants.register("telecom~7~1") and variants.original("telecom~7~1") == "telecom~7"


@pytest.mark.parametrize("name", ["nowhere~1", "airline~x", "airline~", "~1"])
def test_what_is_no_variant_is_an_unknown_domain(name):
    with pytest.raises(ValueError, match=f"unknown domain '{name}'"):
        oracle.load_tasks(name)


def test_runs_and_evaluations_take_variants(tmp_path):
    """A checkpoint is evaluated on the variants of the tasks that its run was evaluated on."""
    args = train.parse_args(["--task_order", "airline~1", "retail"])
    found = oracle.evaluation_tasks(args, oracle.training_tasks(args))
    assert list(found) == ["airline~1", "retail"] and all(map(len, found.values()))
    (tmp_path / "checkpoints" / "LAST").mkdir(parents=True)
    tasks = {domain: [task.id for task in of] for domain, of in found.items()}
    (tmp_path / "config.json").write_text(json.dumps({"eval_split": "train", "eval_tasks": tasks}))
    last = str(tmp_path / "checkpoints" / "LAST")
    domains = ["retail~1", "airline", "airline~1"]
    _, _, chosen = evaluation.complete(evaluation.Args(model_name_or_path=last, domains=domains))
    assert {task.id for task in chosen["airline~1"]} == set(tasks["airline~1"])
    assert {task.id for task in chosen["retail~1"]} == set(tasks["retail"])
    assert len(chosen["airline"]) == len(oracle.load_tasks("airline", "train"))


# --------------------------------------------------------------------------------------- experiments/generalisation.py


def test_a_run_is_evaluated_on_the_variants_of_the_tasks_that_count(tmp_path, tiny, capsys):
    """An untrained policy; in telecom one task names nothing, and does not count."""
    last, ids = tmp_path / "run" / "checkpoints" / "LAST", {"airline": ["27"]}
    originals = all_tasks("telecom").values()
    counts = [
        task.id for task in originals if "user_abroad_roaming_disabled_on" in task.id and "[PERSONA:None]" in task.id
    ]
    ids["telecom"] = ["[mobile_data_issue]airplane_mode_on|data_mode_off[PERSONA:None]", counts[0]]
    policy.save_policy(*tiny, last)
    settings = {
        "model_dtype": "float32",
        "max_new_tokens": 4,
        "max_turns": 1,
        "max_context": 320,
        "max_user_tokens": 64,
    }
    config = {"eval_split": "train", "eval_tasks": ids, "max_tool_tokens": 12, **settings}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    evaluated = {domain: {"do_nothing_rate": 0.0, "by_task": dict.fromkeys(of, 0.75)} for domain, of in ids.items()}
    changes = {"task_order": ["airline", "telecom"], "stages": ["airline", "telecom"], "evaluation": evaluated}
    write_summary(tmp_path / "run", 0, R=[[0.5, 0.0], [0.5, 0.5]], **changes)
    args = generalisation.Args(runs=[str(tmp_path / "run")], variants=2, trials=1, output=str(tmp_path / "out"))
    generalisation.run_experiment(args)
    found = json.loads((tmp_path / "run" / "variants.json").read_text())
    assert {variant: list(of) for variant, of in found["by_task"].items()} == {
        **{f"airline~{seed}": ["27"] for seed in (1, 2)},
        **{f"telecom~{seed}": [counts[0]] for seed in (1, 2)},
    }
    found["by_task"]["airline~2"] |= {"27": 0.5, "28": 1.0}  # the run has no result of task 28
    (tmp_path / "run" / "variants.json").write_text(json.dumps(found))
    policy_files = [path for path in last.iterdir() if path.unlink() is None]
    assert policy_files
    generalisation.run_experiment(args)  # nothing is played again
    rows = [line.split("|")[2:6] for line in capsys.readouterr().out.splitlines() if "sequential" in line][-2:]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["airline", "1", "0.75", "0.25"],
        ["telecom", "1", "0.75", "0.00"],
    ]
