"""A tokenizer's chat template: the opening, the answers to a turn, a turn itself; parsing tool calls.

Token in, token out: the policy is trained on the exact ids that it sampled. The answer to a turn is tokenized alone and
appended; the history is never rendered again, so a template that rewrites it cannot move a token.
"""

import json
import re

import jinja2

PROBE_TOOL = {"name": "probe_tool", "description": "", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": PROBE_TOOL}]


class ChatFormat:
    """How a tokenizer's chat template turns messages into ids.

    The answer to a sampled turn is the text that the template puts after an assistant turn's end token when these
    messages follow. Sampled ids stay as they are, even if the template would rewrite them later (Qwen3 drops earlier
    thoughts). Raises ValueError for a template whose text between two turns depends on what came before.
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
        self.template = tokenizer.get_chat_template(tools=[{}])  # some have one for tools beside the default
        user = {"role": "user", "content": "x"}
        self.base = [user, {"role": "assistant", "content": self.PROBE}]
        tail = self._render(self.base).rpartition(self.PROBE)[2]
        ids = self._ids(tail)
        # Not all_special_ids: they are only those with a role, such as eos and pad.
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = list(special.values())
        if not ids or ids[0] not in special:
            raise ValueError(f"{self.name}: the chat template does not end an assistant turn with a special token")
        self.end_id = ids[0]
        self.end = special[self.end_id]
        self.stop_ids = {self.end_id, tokenizer.eos_token_id} - {None}
        self._check_calls()
        self._check_answers()
        self.greets = self._can_greet()

    def _can_greet(self) -> bool:
        """Whether a conversation may begin with the agent. Where the template puts such a greeting into the user's
        mouth (Llama 3.1 with tools) or refuses it, `opening` leaves it out."""
        header = self._render([*self.base, self.base[0]]).partition(self.PROBE)[0]
        header = header.removeprefix(self._render(self.base[:1]))
        try:
            rendered = self._render(self.base[::-1], TOOLS)
        except ValueError:
            return False
        return header + self.PROBE in rendered

    def _check_calls(self):
        """What the template writes for a tool call must be read as that call."""
        call = {"type": "function", "function": {"name": "probe_tool", "arguments": {"key": 'va"lue', "n": [1, 2.5]}}}
        ids = self.turn({"role": "assistant", "content": "", "tool_calls": [call]})[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for self.bare_calls in (False, True):
            if [c["function"] for c in self.parse(text)["tool_calls"]] == [call["function"]]:
                return
        raise ValueError(
            f"{self.name}: tool calls are written as {text[:80]!r}, which is not supported; "
            'the <tool_call>{"name": ..., "arguments": ...}</tool_call> of Qwen and Hermes and the '
            '{"name": ..., "parameters": ...} of Llama 3 are'
        )

    def _check_answers(self):
        """What follows a turn must not depend on what came before it, nor on how it is cut into texts."""
        before = [*self.base, {"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]
        for role in ("tool", "user"):
            answer = [{"role": role, "content": "answer"}]
            expected = self._behind(self.base + answer)
            last = [{"role": "user", "content": "w"}, self.base[1]]
            longer = [{**m, "content": m["content"].replace(self.PROBE, "v")} for m in before] + last + answer
            if self._behind(longer) != expected or self._behind(self.base + answer, TOOLS) != expected:
                raise ValueError(
                    f"{self.name}: what the chat template puts before a {role} message depends on the turns before it "
                    "or on the tools, so that turns cannot be appended to a conversation as they come"
                )
            rendered = self._render(self.base + answer, add_generation_prompt=True)
            head = rendered.partition(self.PROBE)[0] + self.PROBE + self.end
            if self._ids(rendered) != self._ids(head) + self._ids(expected):
                raise ValueError(f"{self.name}: text behind an end of turn is tokenized differently alone")

    def _render(self, messages, tools=None, add_generation_prompt=False):
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise ValueError(f"{self.name}: the chat template cannot render the roles {roles}: {error}") from error

    def _behind(self, messages, tools=None):
        """The rendered text behind the end token of the last turn that says PROBE."""
        rendered = self._render(messages, tools, add_generation_prompt=True)
        return rendered.rpartition(self.PROBE)[2].removeprefix(self.end)

    def _clean(self, messages):
        """A tool's or user's text must not contain the template's own control tokens."""
        cleaned = []
        for message in messages:
            content, before = message["content"], None
            while content != before:  # what remains may join up to another one
                before = content
                for token in self.special:
                    content = content.replace(token, "")
            cleaned.append({**message, "content": content})
        return cleaned

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def opening(self, system, messages, tools) -> list[int]:
        system = [{"role": "system", "content": system}] if system else []
        if messages and messages[0]["role"] == "assistant" and not self.greets:
            messages = messages[1:]
        return self._ids(self._render(system + self._clean(messages), tools, add_generation_prompt=True))

    def answer(self, messages) -> list[int]:
        """What follows the end token of the agent's turn, up to where its next turn begins."""
        rendered = self._render(self.base + self._clean(messages), add_generation_prompt=True)
        return self._ids(rendered.partition(self.PROBE)[2].removeprefix(self.end))

    def turn(self, message) -> list[int]:
        """The ids a policy would sample to say `message`, its end token included."""
        user = [{"role": "user", "content": "x"}]
        message = {"role": "assistant", "content": "", **message}
        message["content"] = message["content"] or ""
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        prompt = self._render(user, add_generation_prompt=True)
        rendered = self._render([*user, message])
        if not rendered.startswith(prompt):
            raise ValueError(f"{self.name}: the chat template does not begin a turn with its generation prompt")
        return self._ids(rendered[len(prompt) :].partition(self.end)[0] + self.end)

    def parse(self, text) -> dict:
        """The policy's text as a chat message, by the tool-call format of this template."""
        return parse_message(text, self.bare_calls)

    def cut(self, message, limit):
        """The message with at most `limit` tokens of content; cut between tokens, and marked."""
        if limit is None:
            return message
        ids = self._ids(message["content"])
        if len(ids) <= limit:
            return message
        return {**message, "content": self.tokenizer.decode(ids[:limit]).rstrip("\ufffd") + " ..."}


def parse_message(text: str, bare_calls=False) -> dict:
    """The policy's text as a chat message: content, and tool calls in the <tool_call> JSON format; with `bare_calls`
    a text that is one JSON object with a name is a call (Llama 3, which says "parameters" for the arguments).

    A call that is not JSON keeps its place with name None and an "error", for the environment to answer.

    >>> parse_message('Hm.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')["tool_calls"]
    [{'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 1}}}]
    """
    text = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    text = text.rsplit("</think>", 1)[-1]  # some templates open <think> themselves
    if bare_calls:
        bare = text.strip().removeprefix("<|python_tag|>").lstrip()
        blocks = [bare] if re.match(r'\{\s*"(name|type)"', bare) else []
        content = "" if blocks else text.strip()
    else:
        blocks = re.findall(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|$)", text, flags=re.DOTALL)
        content = re.sub(r"<tool_call>.*?(</tool_call>|(?=<tool_call>)|$)", "", text, flags=re.DOTALL).strip()
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
