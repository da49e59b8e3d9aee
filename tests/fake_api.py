"""An OpenAI-compatible server on loopback that answers what it is told to."""

import http.server
import json
import threading
from contextlib import contextmanager


def call(name, arguments, call_id="c"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def body(message, **changed) -> bytes:
    """A completion with this message, with the fields of `changed` in place of the usual ones."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    usual = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps({**usual, **changed}).encode()


@contextmanager
def fake_api():
    """(address, list of its answers in turn, list of the requests). An answer is a message of the chat completions API,
    or bytes: the whole body, or a number: an HTTP error, or None: no answer until the end. The last one stays."""
    answers, asked, ended = [], [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer is None:
                ended.wait()
            elif isinstance(answer, int):
                self.send_error(answer)
            else:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()  # HTTP/1.0: the body ends with the connection
                self.wfile.write(answer if isinstance(answer, bytes) else body(answer))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", answers, asked
    finally:
        ended.set()
        server.shutdown()
