"""Text that others wrote (a model, a user, a server), made safe to show and to keep; and UTF-8 whatever the locale."""

import base64
import contextlib
import locale
import os
import re
import sys
import urllib.parse

from tqdm import tqdm

if locale.getpreferredencoding(False).upper() not in ("UTF-8", "UTF8"):  # tau2 opens its files in the locale's encoding
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(AttributeError):  # a notebook's have no errors: they encode everything
        stream.reconfigure(errors="backslashreplace")

# Control characters, line separators, marks that change the direction of text, invisible tags, halves of pairs.
HIDDEN = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
# What acts in Markdown and HTML anywhere in a line. An underscore inside a word and a [ without a link do not.
ACTIVE = r"[\\`*<|~$]|\](?=[(\[:])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\."
NAMED = r"api[-_ ]?key|access[-_]?token|authorization|password|[?&]key|[?&]token"
LOGIN = r"(?<=://)[^\s/?#\"'<>]+(?=@)"  # http://user:password@host
SECRETS = {
    LOGIN: "***",
    r"(\bbearer\s+|\bbasic\s+(?-i:(?=\w*[A-Z0-9])))[\w.~+/=*-]+": r"\1***",
    rf"((?:{NAMED})[\"']?\s*[=:]\s*[\"']?)(?!bearer\b|basic\b)[^\s\"',;&}}]+": r"\1***",
    r"\bsk-[\w*-]{4,}": "***",
}


def printable(text, keep="") -> str:
    """The text for a terminal: what would steer it, begin a line or turn the direction of text is a visible escape.
    `keep`: characters that stay, such as "\\n".

    >>> print(printable("a\\x1b[2J\\nb"))
    a\\x1b[2J\\nb
    """
    hidden = f"[{HIDDEN}]"
    return re.sub(hidden, lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), str(text))


def markdown(text) -> str:
    """The text for a line, or a table's cell, of Markdown: the same, and Markdown and HTML have no effect.

    >>> print(markdown("<b> | replay_ratio *0.5*"))
    \\<b> \\| replay_ratio \\*0.5\\*
    """
    text = re.sub(ACTIVE, r"\\\g<0>", printable(text).strip(), flags=re.IGNORECASE)
    return re.sub(r"^(\d*)([#>+=.)-])", r"\1\\\2", text)  # it would begin a title, a quotation or a list


def without_secrets(text) -> str:
    """The text without API keys and passwords: the values of environment variables *_API_KEY and *_TOKEN, what looks
    like a key, and logins in addresses, wherever those of the command line and the environment are repeated.

    >>> without_secrets("401 from http://me:word@host/v1: wrong api_key=abc")
    '401 from http://***@host/v1: wrong api_key=***'
    """
    text = str(text)
    secrets = [value for name, value in os.environ.items() if name.upper().endswith(("_API_KEY", "_TOKEN"))]
    for login in map(urllib.parse.unquote, re.findall(LOGIN, " ".join([*sys.argv, *os.environ.values()]))):
        secrets += [login.partition(":")[2], base64.b64encode(login.encode()).decode()]  # as a server is told it
    for value in secrets:
        text = text.replace(value, "***") if len(value) >= 6 else text  # "none" and "EMPTY" are words
    for pattern, rest in SECRETS.items():
        text = re.sub(pattern, rest, text, flags=re.IGNORECASE)
    return text


def reason(error: Exception) -> str:
    """An error as one line to keep, of 500 characters at most: its type and its message without secrets."""
    return printable(without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}"))[:500]


def print_safely(lines, file=None):
    """Prints lines above progress bars, see `printable` and `without_secrets`."""
    tqdm.write(printable(without_secrets(lines), keep="\n"), file=file)
