"""Who the agent talks to: a scripted user, tau2's user simulated by a model behind an API, or by a local policy.

USERS holds every user by name. To add one, write a class (a subclass of ScriptedUser is the shortest) and put it there.
`--user NAME` then works in train.py and eval.py.
"""

import concurrent.futures
import functools
import json
import os
import queue
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

from environment import (  # sets what tau2 reads when it is imported
    MAX_CALLS,
    MAX_TEXT,
    checked_call,
    clean,
    language_models,
)
from text import reason

# isort: split
from tau2.data_model.message import MultiToolMessage, ToolCall, UserMessage
from tau2.data_model.tasks import Task
from tau2.environment.environment import Environment
from tau2.user.user_simulator import OUT_OF_SCOPE, STOP, TRANSFER, UserSimulator, is_valid_user_history_message

SCRIPTED_CALLS = 10  # tool calls of a scripted user in one turn
_FIRST_PERSON = [
    (r"\byou are\b", "I am"),
    (r"\byou're\b", "I'm"),
    (r"\bare you\b", "am I"),
    (r"\byou were\b", "I was"),
    (r"\byourself\b", "myself"),
    (r"\byours\b", "mine"),
    (r"\byour\b", "my"),
    (r"\b(to|for|with|from|of|about|help|helps|tell|tells|give|gives|let|offer|offers|ask|asks|told) you\b", r"\1 me"),
    (r"\byou(?=[.,;!?]|$)", "me"),
    (r"\byou\b", "I"),
]


def first_person(text: str) -> str:
    """Instructions to "you" as the user's own words: "You want to return your lamp." -> "I want to return my lamp." """

    def like(told, said):
        return said[0].upper() + said[1:] if told[0].isupper() else said

    for pattern, words in _FIRST_PERSON:
        text = re.sub(pattern, lambda m, words=words: like(m[0], m.expand(words)), text, flags=re.IGNORECASE)
    return " ".join(text.split())


class UserFailed(RuntimeError):
    """The simulated user gave no usable answer. The conversation becomes invalid; the agent is not to blame."""


def user_tools(env, task) -> list:
    """The tools of the user: those that the task grants (tau2 1.x), or all that the domain has."""
    if env.user_tools is None:
        return []
    granted = getattr(task, "user_tools", None)
    return env.get_user_tools() if granted is None else env.get_user_tools(include=granted)


class ScriptedUser:
    """A deterministic user: states the whole scenario, agrees to what is asked, then stops.

    It agrees while the agent asks a question (four times at most), or has not acted yet (once). If the domain gives
    users tools, it calls each one that the agent names, with the JSON object that may follow the name, and reports the
    results. It is easier than tau2's simulated user, so every score names the user.
    """

    solo = True  # leaves domains whose tasks all have a ticket (telecom) to tau2's solo mode

    def __init__(self, task: Task, env: Environment):
        told = task.user_scenario.instructions
        parts = [told] if isinstance(told, str) else [told.reason_for_call, told.known_info, told.task_instructions]
        statement = " ".join(first_person(part) for part in parts if part and part.strip(" ."))
        self.statement = re.sub("|".join((STOP, TRANSFER, OUT_OF_SCOPE)), "", statement)  # these would end it
        self.agreed = 0
        names = sorted((tool.name for tool in user_tools(env, task)), key=len, reverse=True)
        self.pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b\s*\(?" if names else r"(?!)")

    def opening(self) -> str:
        return self.statement

    def reply(self, text: str, acted: bool) -> str:
        """The answer to the agent's `text`. `acted`: the agent has called a tool before."""
        if self.agreed < 4 and ("?" in text or (not acted and self.agreed == 0)):
            self.agreed += 1
            return "Yes, please go ahead."
        return STOP

    def requested(self, text) -> list[ToolCall]:
        """The user's tool calls that the agent's text asks for."""
        calls = []
        for match in self.pattern.finditer(text):
            rest = text[match.end() :].lstrip()
            with suppress(ValueError, RecursionError):
                arguments = json.JSONDecoder().raw_decode(rest)[0] if rest.startswith("{") else {}
                calls.append(checked_call({"function": {"name": match[1], "arguments": arguments}}, "", "user"))
        return calls[:SCRIPTED_CALLS]

    def speak(self, incoming, episode) -> UserMessage:
        """The answer to `incoming`: the agent's message, or the results of the user's tool calls. May call tools."""
        results = incoming.tool_messages if isinstance(incoming, MultiToolMessage) else [incoming]
        if getattr(results[0], "requestor", None) == "user":
            return UserMessage(role="user", content="\n".join(result.content or "" for result in results))
        heard = incoming.content or ""
        if calls := self.requested(heard):
            return UserMessage(role="user", tool_calls=calls)
        first = not any(isinstance(message, UserMessage) for message in episode.messages)
        return UserMessage(role="user", content=self.opening() if first else self.reply(heard, episode.calls > 0))


class ScriptedToolUser(ScriptedUser):
    """The same, but telecom keeps its dual control: the user has tools, and the agent has to ask for them."""

    solo = False


class SimulatedUser:
    """tau2's own UserSimulator: a language model behind any API that litellm speaks, with tau2's guidelines, the task's
    scenario and the user's tools. After a failure (time-out, refusal, malformed answer) it is asked again, 1, 2 and 4
    seconds later; then UserFailed."""

    slow = True  # conversations with it do not hold up the others
    TRIES, BACKOFF = 4, 1.0  # seconds before the second try, twice as many before each further one

    def __init__(self, task, env, llm, **llm_args):
        tools = user_tools(env, task) or None
        scenario = str(task.user_scenario)
        self.simulator = UserSimulator(tools=tools, instructions=scenario, llm=llm, llm_args=llm_args)
        self.state = None

    def generate(self, incoming, state):
        """(the user's message, the simulator's next state)"""
        return self.simulator.generate_next_message(incoming, state)

    def speak(self, incoming, episode):
        if self.state is None:
            heard = [message for message in episode.messages[:-1] if is_valid_user_history_message(message)]
            self.state = self.simulator.get_init_state(heard)
        for attempt in range(self.TRIES):
            if attempt:
                time.sleep(self.BACKOFF * 2 ** (attempt - 1))
            state = self.state.model_copy(update={"messages": list(self.state.messages)})
            try:
                message, state = self.generate(incoming, state)
                said, calls = clean(message.content or ""), message.tool_calls or []
                if not calls and not said.strip():
                    raise ValueError("the answer is empty")
                if len(said) > MAX_TEXT or len(calls) > MAX_CALLS:
                    raise ValueError(f"the answer has more than {MAX_TEXT} characters or {MAX_CALLS} tool calls")
                message.tool_calls = [checked_call(call, call.id, "user") for call in calls] or None
            except Exception as error:  # of the network, of the server, of the model's text
                failure = error
                continue
            message.raw_data, self.state = None, state
            return message
        raise UserFailed(f"the user {self.simulator.llm} failed {self.TRIES} times: {reason(failure)}") from failure


class LocalUser(SimulatedUser):
    """The same, spoken by a local policy."""

    def __init__(self, task, env, server):
        super().__init__(task, env, f"policy:{server.path}")
        self.server = server

    def generate(self, incoming, state):
        state.messages += incoming.tool_messages if isinstance(incoming, MultiToolMessage) else [incoming]
        history = [_chat_message(message) for message in state.flip_roles()]
        tools = self.simulator.tools
        request = Request(state.system_messages[0].content, history, tools and [tool.openai_schema for tool in tools])
        self.server.waiting.put(request)
        said, tokens = request.answer.result()
        message = UserMessage(role="user", content=said["content"] or None)
        message.tool_calls = [checked_call(call, f"call_{k}") for k, call in enumerate(said["tool_calls"])] or None
        message.usage = {"completion_tokens": tokens, "prompt_tokens": 0}
        state.messages.append(message)
        return message, state


def _chat_message(message) -> dict:
    plain = {"role": message.role, "content": message.content or ""}
    calls = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in getattr(message, "tool_calls", None) or []
    ]
    return {**plain, "tool_calls": calls} if calls else plain


class Request:
    """One answer of a local policy, as an episode of a single turn for rollout.rollout."""

    domain, id, termination = "request", "0", "user_stop"

    def __init__(self, system, messages, tools):
        self.system, self.messages, self.tools = system, messages, tools
        self.task, self.done = self, False
        self.answer = concurrent.futures.Future()

    def opening(self):
        return self.messages

    def act(self, message):
        self.said, self.done = message, True
        return []


class PolicyServer:
    """A local policy in a thread of its own. Requests that wait at the same time are answered in one batch."""

    MAX_NEW_TOKENS, MAX_BATCH = 512, 64

    def __init__(self, path, dtype, device, temperature):
        import policy  # users.py alone needs no torch

        self.path, self.temperature = path, temperature
        self.model, self.tokenizer = policy.load_policy(path, dtype, device)
        self.waiting = queue.SimpleQueue()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            batch = [self.waiting.get()]
            time.sleep(0.01)  # others come at about the same time
            while not self.waiting.empty() and len(batch) < self.MAX_BATCH:
                batch.append(self.waiting.get())
            self.answer(batch)

    def answer(self, requests):
        import rollout

        played = []
        for request in requests:
            try:
                rollout.check_opening(self.model, self.tokenizer, request)
                played.append(request)
            except Exception as error:  # this request alone is too long, or not for this template
                request.answer.set_exception(error)
        settings = {"temperature": self.temperature, "max_new_tokens": self.MAX_NEW_TOKENS}
        try:
            trajectories = rollout.rollout(self.model, self.tokenizer, played, **settings)
            for request, trajectory in zip(played, trajectories, strict=True):
                request.answer.set_result((request.said, sum(trajectory.action_mask)))
        except Exception as error:
            for request in played:
                request.answer.set_exception(error)


class NoUser:
    """tau2's solo mode: the agent has a ticket in place of a user, and the tools of both sides."""

    solo = "always"


# name -> class(task, env), or a functools.partial of one, with speak(incoming, episode), `slow` if it waits for a
# server, and `solo` (see ScriptedUser). Add yours here. `prepare` adds simulated users.
USERS = {"scripted": ScriptedUser, "scripted-tools": ScriptedToolUser, "solo": NoUser}


def kind(user):
    """The class of a user. Raises ValueError for a name that is not in USERS."""
    if user not in USERS:
        simulated = "a litellm name such as openai/NAME, or policy:PATH"
        raise ValueError(f"unknown user {user!r}; choose one of {', '.join(USERS)}, {simulated}")
    return getattr(USERS[user], "func", USERS[user])


def is_simulated(user) -> bool:
    """Whether the name stands for a model: a litellm name such as openai/NAME, or policy:PATH."""
    return user.startswith("policy:") or "/" in user


def scripted_like(user) -> str:
    """The scripted user of demonstrations for a policy that will talk to `user`."""
    found = None if is_simulated(user) else kind(user)
    if isinstance(found, type) and issubclass(found, ScriptedUser | NoUser):
        return user
    return "scripted" if getattr(found, "solo", False) else "scripted-tools"


def check(user):
    """Raises ValueError for a user that `prepare` cannot make ready. Loads nothing."""
    path = user.removeprefix("policy:")
    if path != user and not Path(path).is_dir():
        raise ValueError(f"user {user}: there is no directory {path}")
    if not is_simulated(user):
        kind(user)


def prepare(user, api_base=None, temperature=0.0, model_dtype="bfloat16", device="cpu", **llm_args):
    """Makes the user that `user` names ready for episodes: registers the model of a litellm name, loads the policy of
    policy:PATH. `api_base` (of an OpenAI-compatible server) and `llm_args` (litellm's: seed, timeout, api_key, ...) are
    for the former. Raises ValueError, see `check`."""
    check(user)
    if user.startswith("policy:"):
        server = PolicyServer(user.removeprefix("policy:"), model_dtype, device, temperature)
        USERS[user] = functools.partial(LocalUser, server=server)
    elif is_simulated(user):
        language_models()  # before conversations in several threads ask it
        llm_args = {"timeout": 120, "num_retries": 0, "temperature": temperature, **served_at(api_base), **llm_args}
        USERS[user] = functools.partial(SimulatedUser, llm=user, **llm_args)


def served_at(api_base) -> dict:
    """litellm's arguments for a server of one's own, which may not ask for a key."""
    return {} if api_base is None else {"api_base": api_base, "api_key": os.environ.get("OPENAI_API_KEY", "none")}
