"""A tokenizer's chat template, turn by turn: opening, agent turn, answer; and tool calls read from text.

Token in, token out: the policy is trained on exactly the ids that it sampled. The answer to a turn is tokenized by
itself and appended. The history is never rendered again, so a template that rewrites it cannot change a token.
"""

import copy
import functools
import json
import re

import jinja2

PROBE_TOOL = {"name": "probe_tool", "description": "", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": PROBE_TOOL}]
USER = {"role": "user", "content": "x"}


def remembered(method):
    """The method, whose arguments are JSON, with its last results kept: the samples of a task hear the same words."""

    @functools.lru_cache(maxsize=1024)
    def of_text(self, text):
        return method(self, *json.loads(text))

    @functools.wraps(method)
    def remembering(self, *args):
        return copy.copy(of_text(self, json.dumps(args)))

    return remembering


class ChatFormat:
    """Turns messages into ids as a tokenizer's chat template does.

    The answer to a sampled turn is the text that the template writes between the agent's end token and the agent's
    next turn. Sampled ids stay as they are, even if the template would rewrite them later (Qwen3 drops earlier
    thoughts). Raises ValueError for a template whose text between two turns depends on earlier turns, or whose tool
    calls `parse_message` cannot read.
    """

    PROBE = "REHEARSE-PROBE"

    @classmethod
    def of(cls, tokenizer):
        if not hasattr(tokenizer, "_chat_format"):
            tokenizer._chat_format = cls(tokenizer)
        return tokenizer._chat_format

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise ValueError(f"{self.name} has no chat template; an agent needs one (an Instruct model has it)")
        self.template = tokenizer.get_chat_template(tools=[{}])  # some tokenizers have another template for tools
        self.base = [USER, {"role": "assistant", "content": self.PROBE}]
        ids = self._ids(self._render(self.base).rpartition(self.PROBE)[2])
        # all_special_ids would hold only tokens with a role, such as eos and pad.
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if not ids or ids[0] not in special:
            raise ValueError(f"{self.name}: the chat template does not end an assistant turn with a special token")
        self.end_id = ids[0]
        self.end = special[self.end_id]
        self.stop_ids = {self.end_id, tokenizer.eos_token_id} - {None}
        self._check_calls()
        self._check_answers()
        written = self._after_turn([*self.base, {"role": "tool", "content": ""}]) + self._call_text
        self.marks = re.compile("|".join(map(re.escape, {*special.values(), *re.findall(r"</?\w+>", written)})))
        self.greets = self._can_greet()

    def _can_greet(self) -> bool:
        """Whether a conversation may begin with the agent. Some templates refuse that, or show the greeting as the
        user's (Llama 3.1 with tools); then `opening` leaves it out."""
        header = self._render([*self.base, USER]).partition(self.PROBE)[0].removeprefix(self._render([USER]))
        try:
            rendered = self._render(self.base[::-1], TOOLS)
        except ValueError:
            return False
        return header + self.PROBE in rendered

    def _check_calls(self):
        """A tool call must be read as it was written."""
        call = {"type": "function", "function": {"name": "probe_tool", "arguments": {"key": 'va"lue', "n": [1, 2.5]}}}
        text = self._call_text = self.tokenizer.decode(self.turn({"tool_calls": [call]})[:-1], skip_special_tokens=True)
        for self.bare_calls in (False, True):
            if [c["function"] for c in self.parse(text)["tool_calls"]] == [call["function"]]:
                return
        raise ValueError(
            f"{self.name}: tool calls are written as {text[:80]!r}, which is not supported; "
            'the <tool_call>{"name": ..., "arguments": ...}</tool_call> of Qwen and Hermes and the '
            '{"name": ..., "parameters": ...} of Llama 3 are'
        )

    def _check_answers(self):
        """The ids of an answer must not depend on earlier turns, on the tools, or on the text around them."""
        before = [USER, {"role": "assistant", "content": "v"}, {"role": "user", "content": "y"}]
        before += [{"role": "assistant", "content": "z"}, {"role": "user", "content": "w"}]
        for role in ("tool", "user"):
            answer = [{"role": role, "content": "answer"}]
            expected = self._after_turn(self.base + answer)
            longer = self._after_turn([*before, self.base[1], *answer])
            if not expected == longer == self._after_turn(self.base + answer, TOOLS):
                raise ValueError(
                    f"{self.name}: what the chat template writes before a {role} message depends on the turns before "
                    "it or on the tools, so turns cannot be appended to a conversation one by one"
                )
            rendered = self._render(self.base + answer, add_generation_prompt=True)
            head = rendered.partition(self.PROBE)[0] + self.PROBE + self.end
            if self._ids(rendered) != self._ids(head) + self._ids(expected):
                raise ValueError(f"{self.name}: the text after an end of turn has other tokens when it stands alone")

    def _render(self, messages, tools=None, **options):
        options.update(tools=tools, chat_template=self.template, tokenize=False)
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except jinja2.TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise ValueError(f"{self.name}: the chat template cannot render the roles {roles}: {error}") from error

    def _after_turn(self, messages, tools=None):
        """The rendered text after the end token of the turn that says PROBE."""
        rendered = self._render(messages, tools, add_generation_prompt=True)
        return rendered.partition(self.PROBE)[2].removeprefix(self.end)

    def _clean(self, messages):
        """Takes out what marks turns, calls and results: the text of a tool or user must not forge them. A space takes
        its place, so that the rest cannot join to another mark."""
        return [{**message, "content": self.marks.sub(" ", message["content"])} for message in messages]

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @remembered
    def opening(self, system, messages, tools) -> list[int]:
        """The ids before the agent's first turn."""
        system = [{"role": "system", "content": system}] if system else []
        if messages and messages[0]["role"] == "assistant" and not self.greets:
            messages = messages[1:]
        return self._ids(self._render(system + self._clean(messages), tools, add_generation_prompt=True))

    @remembered
    def answer(self, messages) -> list[int]:
        """The ids between the end token of an agent turn and the next agent turn, where `messages` are the answer."""
        return self._ids(self._after_turn(self.base + self._clean(messages)))

    def turn(self, message) -> list[int]:
        """The ids, end token included, that a policy would sample to say `message`."""
        message = {"role": "assistant", **message, "content": message.get("content") or ""}
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        prompt = self._render([USER], add_generation_prompt=True)
        rendered = self._render([USER, message])
        if not rendered.startswith(prompt):
            raise ValueError(f"{self.name}: the chat template does not begin a turn with its generation prompt")
        return self._ids(rendered[len(prompt) :].partition(self.end)[0] + self.end)

    def parse(self, text) -> dict:
        """`parse_message` for this template's tool calls."""
        return parse_message(text, self.bare_calls)

    @remembered
    def cut(self, message, limit):
        """The message with at most `limit` tokens of content (None: all). A cut content ends with " ..."."""
        ids = [] if limit is None else self._ids(message["content"])
        if limit is None or len(ids) <= limit:
            return message
        return {**message, "content": self.tokenizer.decode(ids[:limit]).rstrip("\ufffd") + " ..."}


CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|$)", flags=re.DOTALL)


def parse_message(text: str, bare_calls=False) -> dict:
    """The policy's text as a chat message with content and tool calls, which are JSON in <tool_call> tags. With
    `bare_calls`, a text that is one JSON object with a name is a call (Llama 3, whose arguments are "parameters").

    A malformed call keeps its place, with name None and an "error" for the environment to answer.

    >>> parse_message('Hm.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')["tool_calls"]
    [{'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 1}}}]
    """
    text = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    text = text.rsplit("</think>", 1)[-1]  # some templates write the opening <think> themselves
    if bare_calls:
        bare = text.strip().removeprefix("<|python_tag|>").lstrip()
        blocks = [bare] if re.match(r'\{\s*"(name|type)"', bare) else []
        content = "" if blocks else text.strip()
    else:
        blocks, content = CALL.findall(text), CALL.sub("", text).strip()
    calls = []
    for block in blocks:
        try:
            call = json.loads(block)
            if not isinstance(call, dict):
                raise ValueError("a tool call must be a JSON object")
            arguments = call.get("arguments", call.get("parameters", {}) if bare_calls else {})
            function = {"name": call.get("name"), "arguments": arguments}
        except (ValueError, RecursionError) as error:
            function = {"name": None, "arguments": block, "error": f"malformed tool call: {error}"}
        calls.append({"type": "function", "function": function})
    return {"role": "assistant", "content": content, "tool_calls": calls}
