"""What tau2 1.x (sierra-research/tau2-bench, Python 3.12) needs beside tau2 0.2: its domain banking_knowledge, whose
agent reads documents, and assertions in words, which a language model judges.

environment.py imports this file only if tau2 1.x is installed, under the name V1. CI has tau2 0.2, so only the tests of
`check_pattern`, `use_judge` and `graded` run there. Calls of this file stand behind `if V1`.
"""

import functools
import re

BANKING = "banking_knowledge"
RETRIEVAL = "bm25"  # tau2's name of how the agent reads documents; see `use_retrieval`
JUDGE = None  # litellm name of the model that judges assertions in words; see `use_judge`
NOT_JUDGED = "assertions in words are not judged: DB x COMMUNICATE"


def use_retrieval(variant):
    """Sets RETRIEVAL. ValueError for an unknown variant, and for one with a shell, which all conversations would
    share."""
    global RETRIEVAL
    from tau2.domains.banking_knowledge.retrieval import RETRIEVAL_VARIANTS

    known = [name for name, v in RETRIEVAL_VARIANTS.items() if v.shell is None]
    if variant not in known:
        raise ValueError(f"unknown retrieval {variant!r}; choose one of {', '.join(known)}")
    RETRIEVAL = variant


def env_kwargs(domain, task=None) -> dict:
    """The arguments that tau2's own runner builds an environment with."""
    if domain != BANKING:
        return {}
    from tau2.runner.build import _derive_read_log_allowlist

    allowed = _derive_read_log_allowlist(task) if task is not None else None
    return {"retrieval_variant": RETRIEVAL, "task": task, "read_log_allowlist": allowed}


def build(constructor, domain, **kwargs):
    """An environment; ValueError if banking_knowledge lacks a package or a server for its retrieval."""
    if domain != BANKING:
        return constructor(**kwargs)
    try:
        return constructor(**kwargs, **env_kwargs(domain))
    except Exception as error:
        advice = ": pip install rank-bm25" if isinstance(error, ImportError) else ""
        reason = str(error).split("\n")[0]
        raise ValueError(f"{domain} with retrieval {RETRIEVAL}: {type(error).__name__}: {reason}{advice}") from error


def fit_to_task(env, domain, task):
    """Gives a copy of the pristine environment what depends on the task."""
    if domain != BANKING or task is None:
        return
    env.tools.set_read_log_allowlist(env_kwargs(domain, task)["read_log_allowlist"])
    if RETRIEVAL == "golden_retrieval":  # the policy contains the documents that the task needs
        from tau2.domains.banking_knowledge.retrieval import build_policy, resolve_variant

        env.policy = build_policy(resolve_variant(RETRIEVAL), _documents(), task)


@functools.cache
def _documents():
    from tau2.domains.banking_knowledge.environment import get_knowledge_base

    return get_knowledge_base()


def check_pattern(pattern):
    """Raises ValueError for a pattern of `grep` that is prone to catastrophic backtracking: a repeated group, more than
    one unbounded repetition, or more than four of any kind."""
    plain = re.sub(r"\\.|\[[^\]]*\]|\(\?(?:i\)|:)", "_", str(pattern))  # escapes and sets repeat nothing
    repetitions = re.findall(r"[*+?]|\{\d*,\d*\}", plain)
    unbounded = [r for r in repetitions if r in "*+" or r.endswith(",}")]
    if len(str(pattern)) > 200 or len(repetitions) > 4 or len(unbounded) > 1 or re.search(r"\)\s*[*+?{]|\(\?", plain):
        raise ValueError("the pattern is too long, or has too many repetitions; search for words")


def without_timing(text) -> str:
    """The answer of KB_search without the time that the search took, which differs from run to run."""
    return re.sub(r"\n\n\[Timing: [^\]]*\]$", "", text)


def use_judge(llm, **llm_args):
    """Lets a language model, by its litellm name, judge assertions in words, with tau2's own prompt. None: nobody."""
    global JUDGE
    from tau2.evaluator import evaluator_nl_assertions as evaluator

    JUDGE = llm
    if llm is not None:
        evaluator.DEFAULT_LLM_NL_ASSERTIONS = llm
        evaluator.DEFAULT_LLM_NL_ASSERTIONS_ARGS = {"temperature": 0.0, **llm_args}


def graded(task):
    """The task as it can be graded. Without a judge its reward has COMMUNICATE in place of assertions in words."""
    from tau2.data_model.tasks import RewardType

    criteria = task.evaluation_criteria
    if JUDGE is not None or criteria is None or RewardType.NL_ASSERTION not in criteria.reward_basis:
        return task
    basis = [part for part in criteria.reward_basis if part != RewardType.NL_ASSERTION]
    basis += [] if RewardType.COMMUNICATE in basis else [RewardType.COMMUNICATE]
    return task.model_copy(update={"evaluation_criteria": criteria.model_copy(update={"reward_basis": basis})})
