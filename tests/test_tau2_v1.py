"""tau2_v1.py: banking_knowledge and assertions in words. What needs tau2 1.0 is skipped with tau2 0.2."""

import json

import pytest
from fake_api import fake_api
from tau2.data_model.tasks import RewardType

import oracle
import tau2_v1
import users

needs_v1 = pytest.mark.skipif(oracle.V1 is None, reason="tau2 1.0 only")
BANKING = tau2_v1.BANKING
OFFLINE = ("bm25", "bm25_grep", "grep_only", "golden_retrieval", "full_kb", "no_knowledge")


def call(name, **arguments):
    return {"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def banking(count=None):
    return oracle.load_tasks(BANKING, "base", count)


@pytest.fixture
def retrieval():
    """use_retrieval, undone at the end."""
    yield oracle.use_retrieval
    oracle.use_retrieval("bm25")


@needs_v1
def test_every_banking_task_can_be_played_and_scores_as_in_tau2():
    """97 gold conversations; every eighth, cut short and not played at all as well, against tau2's own evaluator."""
    pristine = oracle.make_env(BANKING).get_db_hash()
    assert len(banking()) == 97
    for index, task in enumerate(banking()):
        gold = oracle.demonstrate(BANKING, task)
        assert oracle.score(gold).reward == 1.0 and not gold.solo, task.id
        if index % 8 == 0:
            oracle.score(gold, verify=True)
            calls = [turn for turn in oracle.agent_turns(gold) if turn.get("tool_calls")]
            for turns in ([], calls[:-1]):
                episode = oracle.Episode(BANKING, task)
                for turn in turns:
                    episode.act(turn)
                while not episode.done:
                    episode.act({"content": "Done."})
                oracle.score(episode, verify=True)
    assert oracle.make_env(BANKING).get_db_hash() == pristine


@needs_v1
def test_banking_is_cut_into_splits():
    train, test = ({task.id for task in oracle.load_tasks(BANKING, split)} for split in ("train", "test"))
    assert len(train) == 78 and train | test == {task.id for task in banking()} and not train & test


@needs_v1
@pytest.mark.parametrize("variant", OFFLINE)
def test_every_offline_way_to_read_documents_works(variant, retrieval):
    retrieval(variant)
    tasks = banking(2)
    episodes = [oracle.Episode(BANKING, task) for task in tasks]
    names = {tool["function"]["name"] for tool in episodes[0].tools}
    assert ("KB_search" in names) == variant.startswith("bm25")
    assert ("grep" in names) == (variant in ("bm25_grep", "grep_only"))
    found = {"KB_search": {"query": "Gold Rewards Card"}, "grep": {"pattern": "Gold Rewards Card"}}
    for name in names & set(found):
        [answer] = episodes[0].act(call(name, **found[name]))
        assert "Gold Rewards Card" in answer["content"]
    in_prompt = ["Gold Rewards Card" in episode.system for episode in episodes]
    expected = {"golden_retrieval": in_prompt[0], "full_kb": all(in_prompt)}.get(variant, not any(in_prompt))
    assert expected, in_prompt
    assert (episodes[0].system == episodes[1].system) == (variant != "golden_retrieval")
    assert oracle.score(oracle.demonstrate(BANKING, tasks[0]), verify=True).reward == 1.0


@needs_v1
def test_users_have_the_tools_that_their_task_grants():
    for task in banking(30):
        episode = oracle.Episode(BANKING, task)
        assert {tool.name for tool in users.user_tools(episode.env, task)} == set(task.user_tools)


@needs_v1
def test_an_answer_does_not_say_how_long_it_took():
    episode = oracle.Episode(BANKING, banking(1)[0])
    answers = {episode.act(call("KB_search", query="Gold Rewards Card"))[0]["content"] for _ in range(5)}
    assert len(answers) == 1 and "Timing" not in answers.pop() and "Score" in episode.messages[-1].content


@needs_v1
@pytest.mark.parametrize("variant", ["magic", "terminal_use", "alltools"])
def test_retrieval_that_is_unknown_or_has_a_shell_is_refused(variant):
    with pytest.raises(ValueError, match=rf"unknown retrieval '{variant}'; choose one of .*bm25_grep"):
        oracle.use_retrieval(variant)
    assert tau2_v1.RETRIEVAL == "bm25"


@needs_v1
def test_retrieval_that_lacks_something_is_one_line(monkeypatch, retrieval):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    retrieval("openai_embeddings")
    with pytest.raises(ValueError, match="banking_knowledge with retrieval openai_embeddings: OpenAIError"):
        oracle.make_env(BANKING)


@pytest.mark.skipif(oracle.V1 is not None, reason="tau2 0.2 only")
def test_without_tau2_1_what_needs_it_is_named():
    with pytest.raises(ValueError, match="'full_kb' is for banking_knowledge"):
        oracle.use_retrieval("full_kb")
    with pytest.raises(ValueError, match=r"only tasks of tau2 1\.0 have assertions in words"):
        oracle.use_judge("openai/m")


SAFE = ["credit card", "credit.*card", r"\$\d{1,3} fee|annual fee", "colou?rs?", "[unclosed", "[*+?]+", "(?i)fee", None]
SLOW = [r"(\w+\s?)+#$", "(a|a)*b", "(a?){30}a{30}", "a?a?a?a?a?aaaaa", ".*.*=.*", "(?:(?=x+)y)*", "x" * 201, "(?:a|a)*"]
SLOW += [r"(?x)(a|a)  *b", "(?ix)(a|a)#\n*b", r"(a\))*b", "a{2,}b{2,}", "[]](a|a)*"]


@pytest.mark.parametrize("pattern, refused", [*((p, False) for p in SAFE), *((p, True) for p in SLOW)])
def test_patterns_prone_to_backtracking_are_refused(pattern, refused):
    if refused:
        with pytest.raises(ValueError, match="search for words"):
            tau2_v1.check_pattern(pattern)
    else:
        tau2_v1.check_pattern(pattern)


@needs_v1
def test_a_refused_pattern_is_answered(retrieval):
    retrieval("grep_only")
    [answer] = oracle.Episode(BANKING, banking(1)[0]).act(call("grep", pattern="(a|a)*b"))
    assert answer["content"].startswith("Error: the pattern")


@pytest.fixture
def told():
    with fake_api() as server:
        yield server


@pytest.fixture
def judged(monkeypatch):
    """A gold conversation of a task that is also graded by an assertion in words, as in tau2 1.0."""
    monkeypatch.setattr(oracle, "V1", tau2_v1)
    monkeypatch.setattr(tau2_v1, "JUDGE", None)
    task = oracle.load_tasks("retail", "base")[3]
    criteria = task.evaluation_criteria.model_copy(
        update={"reward_basis": [RewardType.DB, RewardType.NL_ASSERTION], "nl_assertions": ["The agent is polite."]}
    )
    episode = oracle.demonstrate("retail", task)
    episode.task = task.model_copy(update={"evaluation_criteria": criteria})
    return episode


def test_without_a_judge_assertions_in_words_are_left_out_by_name(judged):
    info = oracle.score(judged)
    assert info.reward == 1.0 and info.reward_basis == [RewardType.DB, RewardType.COMMUNICATE]
    assert set(oracle.reward_parts(judged.task, info)) == {"DB", "COMMUNICATE"}
    assert judged.task.evaluation_criteria.reward_basis == [RewardType.DB, RewardType.NL_ASSERTION]


@pytest.mark.parametrize("met", [True, False])
def test_a_judge_judges_assertions_in_words(judged, told, met):
    address, answers, asked = told
    verdict = {"expectedOutcome": "The agent is polite.", "reasoning": "I saw it.", "metExpectation": met}
    answers += [{"content": json.dumps({"results": [verdict]})}]
    oracle.use_judge("openai/m", address)
    info = oracle.score(judged, "all_with_nl_assertions")
    assert info.reward == float(met) and info.reward_basis == [RewardType.DB, RewardType.NL_ASSERTION]
    assert info.nl_assertions[0].met is met
    assert "The agent is polite." in asked[0]["messages"][-1]["content"]


def test_a_judge_that_fails_is_no_zero(judged, told):
    address, answers, _ = told
    answers += [{"content": "no JSON"}]
    oracle.use_judge("openai/m", address)
    with pytest.raises(json.JSONDecodeError):
        oracle.score(judged, "all_with_nl_assertions")
