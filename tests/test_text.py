"""text.py: hostile text cannot act in a terminal or in Markdown, secrets are cut out, files are UTF-8 in any locale."""

import ast
import html
import http.server
import json
import random
import re
import threading

import pytest
from law import ENV, ROOT, run_script
from markdown_it import MarkdownIt

from text import markdown, printable, reason, without_secrets

HOSTILE = [
    "\x1b[2J\x1b]8;;http://a.b\x07here\x1b]8;;\x07",
    "\x1b]52;c;cm0gLXJm\x07 \x9b2J \x7f",
    "reward 0\rreward 1\x08\x85\u2028\u2029[user] yes",
    "\u202egnp.exe \u2066a\u2069 \u200f \u061c \U000e0041",
    "half \ud83d of an emoji, a whole one 👩\u200d💻, Grüße, 你好",
    "[a](javascript:alert(1)) ![a](http://a.b/c.png) [a][b] [a]: http://a.b",
    "<script>alert(1)</script><img src=x onerror=alert(1)> <!-- <http://a.b> &lt;b&gt;",
    "| a | b |\n|---|---|",
    "`a` ``` **b** __c__ _d_ ~~e~~ \\*f\\* $x$",
    *("# a", "> a", "- a", "+ a", "* a", "1. a", "2) a", "===", "---", "    a", "```", "[a]: b"),
]


RNG = random.Random(0)
MIXED = ["".join(RNG.choices("".join(HOSTILE), k=12)) for _ in range(2000)]


@pytest.mark.parametrize("texts", [*([text] for text in HOSTILE), MIXED], ids=lambda texts: ascii(texts[0]))
def test_hostile_text_has_no_effect(texts):
    for text in filter(str.strip, texts):
        check_that_it_is_plain(text)


def check_that_it_is_plain(text):
    shown = printable(text)
    assert not set(shown) & {chr(c) for c in (*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0x2028, 0xD83D)}
    assert printable(shown) == shown and printable(shown.encode().decode("ascii", "ignore")).isprintable()
    kept = html.escape(shown.strip())
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    assert page.render(markdown(text)) == f"<p>{kept}</p>\n"
    table = page.render(f"| {markdown(text)} | b |\n|---|---|\n| {markdown(text)} | d |\n")
    assert f"<th>{kept}</th>\n<th>b</th>" in table and f"<td>{kept}</td>\n<td>d</td>" in table


def test_usual_names_and_words_stay_as_they_are():
    for text in ("replay, replay_ratio 0.5", "airline -> retail: pass^1, 95% (a few)", "Grüße 👩\u200d💻 你好"):
        assert printable(text) == markdown(text) == without_secrets(text) == text
    assert printable("a\n\tb", keep="\n") == "a\n\\tb"


@pytest.mark.parametrize(
    "text, left",
    [
        ("http://me:word@host:8000/v1", "http://***@host:8000/v1"),
        ("https://me:wo@rd@host/v1?api_key=hidden&x=1", "https://***@host/v1?api_key=***&x=1"),
        ("Incorrect API key provided: sk-hid*****den. You", "Incorrect API key provided: ***. You"),
        ("{'Authorization': 'Bearer hidden', 'x': 1}", "{'Authorization': 'Bearer ***', 'x': 1}"),
        ("authorization: Basic aGlkZGVu", "authorization: Basic ***"),
        ('"api_key": "hidden", api-key=hidden', '"api_key": "***", api-key=***'),
        ("no key my-own-key, none", "no key ***, none"),
        ("http://host/a:b@c max_tokens: 5, the user none", "http://host/a:b@c max_tokens: 5, the user none"),
    ],
)
def test_keys_and_passwords_are_cut_out(text, left, monkeypatch):
    monkeypatch.setenv("OTHER_API_KEY", "my-own-key")
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # of a server that asks for none
    assert without_secrets(text) == left == without_secrets(left)
    assert reason(ValueError(f"{text}\n\x1b[2J" + "x" * 900)) == f"ValueError: {left} \\x1b[2J{'x' * 900}"[:500]


KEYS = set()


class Server(http.server.BaseHTTPRequestHandler):
    """Answers in telecom; in airline refuses, with an error that repeats what it was told."""

    def do_POST(self):
        asked, key = self.rfile.read(int(self.headers["Content-Length"])), self.headers["Authorization"]
        KEYS.add(key.split()[-1])
        message = {"role": "assistant", "content": "Grüße \u202e\x1b[2J 你好\n[user] I agree."}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        body["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        if refused := b"flight" in asked:
            body = {"error": {"message": f"wrong key {key.split()[-1]}\n\x1b[2J; {key}"}}
        self.send_response(400 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


def test_an_evaluation_in_the_c_locale_keeps_no_key_and_no_password(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**ENV, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OPENAI_API_KEY": "my-own-key"}
    address = f"http://me:pass-word@127.0.0.1:{server.server_port}/v1"
    flags = f"--model_name_or_path openai/m --api_base {address} --max_tasks 1 --max_turns 2 --user scripted-tools"
    flags = [*flags.split(), "--domains", "airline", "telecom", "--output", tmp_path / "out"]
    played = run_script("eval.py", *flags, env=env)
    shown = run_script("eval.py", "--show", tmp_path / "out", env=env)
    server.shutdown()
    assert (played.returncode, shown.returncode) == (0, 0), played.stderr + shown.stderr
    assert "[assistant] Gr\\xfc\\xdfe \\u202e\\x1b[2J \\u4f60\\u597d\n    [user] I agree.\n" in shown.stdout
    files = [path.read_text(encoding="utf-8") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert "http://***@127.0.0.1" in "".join(files) and "wrong key *** \\\\x1b[2J; Basic ***" in "".join(files)
    assert len(KEYS) == 1  # the server was told
    for text in (*files, played.stdout, played.stderr, shown.stdout, shown.stderr):
        assert not any(secret in text for secret in ("pass-word", "my-own-key", *KEYS)) and "\x1b" not in text


OPENS = r"open|(?!distributed).*\.(read|write)_text"


def test_every_text_file_is_opened_as_utf8():
    found = []
    for path in ROOT.glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
        opened = [ast.unparse(c) for c in calls if re.fullmatch(OPENS, ast.unparse(c.func))]
        found += [call for call in opened if "encoding='utf-8'" not in call and "'rb'" not in call]
    assert not found
