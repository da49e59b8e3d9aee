"""A server that speaks as much of vLLM's API as server.py needs, and really samples from the policy it is given."""

import http.server
import json
import threading
import time
from contextlib import contextmanager, suppress

import torch
from safetensors.torch import load_file

import policy
import server


class FakeVLLM:
    """One server. A test changes its attributes to make it slow, stale or lying, and stops and starts it."""

    def __init__(self, folder):
        self.folder, self.max_model_len = folder, 4096
        self.model = self.tokenizer = None
        self.adapters, self.asked = {}, []  # asked: (path, body) of every POST
        self.kept_names = ()  # weights that a reload leaves as they are
        self.delay = lambda body: 0.0  # seconds before an answer
        self.change = lambda choice: choice  # of an answer to /v1/completions
        self.status = lambda path: 200
        self.short = False  # whether errors break off
        self.lock, self.server, self.port = threading.Lock(), None, 0
        self.generator = torch.Generator().manual_seed(0)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def count(self, path):
        return sum(path == other for other, _ in self.asked)

    def start(self):
        self.model, self.tokenizer = policy.load_policy(str(self.folder), "float32", "cpu")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), handler_of(self))
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self):
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def answer(self, path, body):
        """(status, JSON or text) of a request."""
        if path == "/v1/models":
            about = {"id": "served", "root": str(self.folder), "max_model_len": self.max_model_len}
            return 200, {"data": [about]}
        self.asked.append((path, body))
        time.sleep(self.delay(body))
        if (status := self.status(path)) != 200:
            return status, {"error": "as the test wants"}
        if path == "/collective_rpc" and body == {"method": "reload_weights"}:
            weights = load_file(self.folder / "model.safetensors")
            self.model.load_state_dict({n: p for n, p in weights.items() if n not in self.kept_names}, strict=False)
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, None
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = policy.load_policy(body["lora_path"], "float32", "cpu")[0]
            return 200, b"Success: loaded"
        if path == "/v1/unload_lora_adapter":
            found = self.adapters.pop(body["lora_name"], None)
            return (200 if found else 404), b"Success: removed" if found else b"no such adapter"
        assert path == "/v1/completions", path
        if body["model"] not in ("served", *self.adapters):
            return 404, {"error": "no such model"}
        with self.lock:
            return 200, {"choices": [self.change(self.complete(body))]}

    @torch.no_grad()
    def complete(self, body):
        """A token at a time, the whole text read again for each."""
        assert body["top_p"] == body["repetition_penalty"] == 1.0 and body["top_k"] == 0 and body["return_token_ids"]
        model = self.model if body["model"] == "served" else self.adapters[body["model"]]
        ids, logprobs, first = list(body["prompt"]), [], len(body["prompt"])
        while len(ids) - first < body["max_tokens"]:
            logits = model(torch.tensor([ids])).logits[0, -1]
            scaled = (logits / (body["temperature"] or 1.0)).log_softmax(-1)
            greedy = body["temperature"] == 0
            token = int(scaled.argmax() if greedy else torch.multinomial(scaled.exp(), 1, generator=self.generator))
            ids.append(token)
            logprobs.append(scaled[token].item())
            if token in body["stop_token_ids"]:
                break
        choice = {"token_ids": ids[first:], "logprobs": {"token_logprobs": logprobs}, "finish_reason": "stop"}
        if "prompt_logprobs" in body:
            plain = model(torch.tensor([ids[:first]])).logits[0].log_softmax(-1)
            scores = [{str(i): {"logprob": plain[k, i].item()}} for k, i in enumerate(ids[1:first])]
            choice["prompt_logprobs"] = [None, *scores]
        return choice


def handler_of(fake):
    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, body):
            status, found = fake.answer(self.path, body)
            data = found if isinstance(found, bytes) else b"" if found is None else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data) + 10 * (fake.short and status != 200)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *args):
            pass

        def handle(self):
            with suppress(BrokenPipeError, ConnectionResetError):
                super().handle()

    return Handler


@contextmanager
def serving(model, tokenizer, folder, count=1):
    """`count` servers of a fresh hand-over directory."""
    server.make_directory(model, tokenizer, folder)
    fakes = [FakeVLLM(folder).start() for _ in range(count)]
    try:
        yield fakes
    finally:
        server.connect.cache_clear()
        for fake in fakes:
            fake.stop()
