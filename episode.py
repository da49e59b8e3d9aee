"""One conversation between an agent, a tau2 environment and a user.

Data flow: Task -> Episode(environment + user) -> opening(), act(turn), act(turn), ... -> messages, which tau2 grades.

Whatever the agent writes is answered. A tool call that is not safe (malformed JSON, NaN, `**` in calculate, long
arguments) is answered with an error, which is recorded as a system message that tau2's evaluator ignores.
"""

import copy
import datetime
import functools
import re

import environment
import users
from environment import MAX_CALLS, MAX_TEXT, V1, checked_call, clean, make_env
from users import OUT_OF_SCOPE, STOP, TRANSFER, UserFailed

# isort: split
from tau2.agent.llm_agent import LLMAgent, LLMSoloAgent
from tau2.data_model.message import AssistantMessage, MultiToolMessage, SystemMessage, ToolCall, UserMessage
from tau2.data_model.simulation import TerminationReason
from tau2.environment.tool import as_tool

GREETING = "Hi! How can I help you today?"  # tau2.orchestrator's first agent message
MAX_ERRORS = 10  # tau2.config.DEFAULT_MAX_ERRORS
MAX_USER_STEPS = 20  # rounds of tool calls of a user between two turns of the agent


def strip_thinking(text: str | None) -> str:
    """The text without <think>...</think>, which neither the user nor the evaluator may read."""
    text = re.sub(r"<think>.*?(</think>|$)", "", text or "", flags=re.DOTALL)
    return clean(text.rsplit("</think>", 1)[-1].strip())


def is_solo(domain, user) -> bool:
    """Whether the agent has a ticket and both tool sets instead of a user: a property of the user's class."""
    solo = getattr(users.kind(user), "solo", False)
    return solo == "always" or (solo and _has_tickets(domain))


@functools.cache
def _has_tickets(domain) -> bool:
    """Whether every task can be played in solo mode."""
    has_user_tools = environment.template(domain, False).user_tools is not None
    return has_user_tools and all(task.ticket for task in environment.all_tasks(domain).values())


def done() -> str:
    """Call this function when you are done with the task."""
    return STOP


@functools.cache
def _tool_schemas(template) -> list[dict]:
    tools = template.get_tools()
    if template.solo_mode:
        tools += [*(template.get_user_tools() if template.user_tools else []), as_tool(done)]
    return [tool.openai_schema for tool in tools]


class Episode:
    """One conversation in progress between an agent, an environment and a user.

    Attributes: system (tau2's system prompt with the domain's policy), tools (OpenAI function schemas), messages (tau2
    messages so far: what the evaluator reads), done, termination (a TerminationReason value, "" while running), turns
    (of the agent), calls, failed_calls, errors. slow: opening() and act() may wait for a server.

    `user`: a name in users.USERS. In tau2's solo mode (see `is_solo`) the agent has a ticket instead of a user, both
    tool sets, and the tool `done` to end. Raises ValueError for an unknown user, and for solo mode without a ticket.
    """

    def __init__(self, domain, task, user="scripted", max_turns=30):
        self.domain, self.task, self.max_turns = domain, task, max_turns
        self.solo = is_solo(domain, user)
        if self.solo and not task.ticket:
            raise ValueError(f"task {task.id} of {domain} has no ticket, which solo mode needs")
        self.env = make_env(domain, task, self.solo)
        self.user = None if self.solo else users.USERS[user](task, self.env)
        self.slow = getattr(self.user, "slow", False)
        agent = object.__new__(LLMSoloAgent if self.solo else LLMAgent)  # only to read its prompt
        agent.domain_policy, agent.task = self.env.policy, task
        self.system, self.tools = agent.system_prompt, _tool_schemas(environment.template(domain, self.solo))
        history = task.initial_state.message_history if task.initial_state is not None else None
        self.messages = copy.deepcopy(history or [])
        self.done, self.termination = False, ""
        self.turns = self.calls = self.user_calls = self.failed_calls = self.errors = 0
        self.started = self.ended = datetime.datetime.now()
        self._opening = None

    def opening(self) -> list[dict]:
        """The chat messages {"role", "content"} that open the conversation, without the system message."""
        if self._opening is None and self.solo:
            self._opening = [{"role": "user", "content": self.task.ticket}]
        elif self._opening is None:
            self.messages = self.messages or [AssistantMessage(role="assistant", content=GREETING)]
            self._opening = [{"role": m.role, "content": m.content} for m in self.messages if m.content]
            if not isinstance(self.messages[-1], UserMessage):
                self._opening += self._hear_user()
        return copy.deepcopy(self._opening)

    def act(self, message) -> list[dict]:
        """Applies the agent's turn. Returns the chat messages that answer it: one {"role": "tool"} for each call, or
        the user's turn; [] when the conversation is over.

        `message` is tau2's AssistantMessage or a chat message {"role": "assistant", "content", "tool_calls":
        [{"function": {"name", "arguments"}}]} with the arguments as JSON text or dict. Whatever the agent wrote, the
        answer is a message. Raises only for a fault of the environment, UserFailed, or ValueError after the end.
        """
        if self.done:
            raise ValueError(f"the episode of task {self.task.id} is over ({self.termination})")
        self.opening()
        if not isinstance(message, dict):
            message = {"content": message.content, "tool_calls": message.tool_calls}
        content = strip_thinking(message.get("content"))
        calls = message.get("tool_calls") or []
        self.turns += 1
        if len(content) > MAX_TEXT:
            answers = self._refuse(f"the message is longer than {MAX_TEXT} characters", calls)
        elif self.solo and (STOP in content or any(_name(call) == "done" for call in calls)):
            self.messages.append(AssistantMessage(role="assistant", content=STOP))
            answers = self.stop("agent_stop")
        elif calls:
            answers = self._call_tools(content, calls)
        elif not content:
            answers = self._refuse("the message is empty; write to the user or call a tool")
        elif self.solo:
            answers = self._refuse("there is no user to write to; call a tool, or call done to finish")
        else:
            self.messages.append(AssistantMessage(role="assistant", content=content))
            answers = self._hear_user()
        if not self.done and self.errors >= MAX_ERRORS:
            return self.stop("too_many_errors")
        if not self.done and self.turns >= self.max_turns:
            return self.stop("max_steps")
        return answers

    def stop(self, reason="max_steps") -> list:
        """Ends the conversation; `reason` is a tau2 TerminationReason. No message answers."""
        self.done, self.termination = True, TerminationReason(reason).value
        self.ended = datetime.datetime.now()
        return []

    def _refuse(self, text, calls=()):
        self.errors += 1
        self.messages.append(SystemMessage(role="system", content=f"Error: {text}"))
        roles = ["tool"] * len(calls) or ["user"]
        return [{"role": role, "content": f"Error: {text}"} for role in roles]

    def _call_tools(self, content, calls):
        checked = []  # a ToolCall, or the text of an error
        for k, call in enumerate(calls):
            self.calls += 1
            try:
                if k >= MAX_CALLS:
                    raise ValueError(f"a message may have at most {MAX_CALLS} tool calls")
                checked.append(checked_call(call, f"call_{self.calls}"))
            except ValueError as error:
                checked.append(f"Error: {error}")
        valid = [call for call in checked if isinstance(call, ToolCall)]
        self.messages.append(
            AssistantMessage(role="assistant", content=content or None, tool_calls=valid or None)
            if valid or content
            else SystemMessage(role="system", content="(a message with no valid tool call)")
        )
        results = {call.id: self._carry_out(call) for call in valid}
        # After the results: tau2 wants each call followed at once by its result.
        errors = [SystemMessage(role="system", content=text) for text in checked if isinstance(text, str)]
        self.messages += errors
        failed = len(errors) + sum(result.error for result in results.values())
        self.errors += failed
        self.failed_calls += failed
        answers = [results[c.id].content or "" if isinstance(c, ToolCall) else c for c in checked]
        return [{"role": "tool", "content": answer} for answer in answers]

    def _carry_out(self, call):
        result = self.env.get_response(call)
        if V1 and call.name == "KB_search":
            result.content = V1.without_timing(result.content or "")
        self.messages.append(result)
        return result

    def _hear_user(self):
        """The user's answer to the last message. The user's tool calls are carried out; the agent does not see them."""
        incoming = self.messages[-1]
        for _ in range(MAX_USER_STEPS):
            reply = self.user.speak(incoming, self)
            reply.content = clean(reply.content)
            for call in reply.tool_calls or []:
                self.user_calls += 1
                call.id = f"user_call_{self.user_calls}"  # tau2 wants ids that occur once
            self.messages.append(reply)
            if not reply.tool_calls:
                break
            results = [self._carry_out(call) for call in reply.tool_calls]
            self.errors += sum(result.error for result in results)
            incoming = MultiToolMessage(role="tool", tool_messages=results) if len(results) > 1 else results[0]
        else:
            raise UserFailed(f"the user called tools {MAX_USER_STEPS} times without a word to the agent")
        if any(word in reply.content for word in (STOP, TRANSFER, OUT_OF_SCOPE)):
            return self.stop("user_stop")
        return [{"role": "user", "content": reply.content}]


def _name(call):
    return call.name if isinstance(call, ToolCall) else call["function"].get("name")
