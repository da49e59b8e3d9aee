"""Rollouts by vLLM: weights are handed over as files; token ids go in, token ids and their log-probabilities come out.

    python server.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --directory /dev/shm/policy

makes a hand-over directory and says how to serve it. A server reads its weights from there. Before a rollout with other
weights than the last, rank 0 writes them into the directory, lets the server read them again, and compares how both
score a few tokens: a server that plays an old policy stops the run.

Data flow: weights -> hand_over -> directory -> server; conversation -> play -> server -> conversation.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import http.client
import json
import math
import os
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path

import distributed  # sets what transformers reads when it is imported

# isort: split
import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import policy
from chat import ChatFormat
from distributed import StopRun, all_gather_json, rank
from flags import Positive, errors_in_one_line, one_line
from text import printable, reason, without_secrets

MARK = "HANDOVER.txt"
NOTICE = "Training overwrites the weights in this directory. Never serve a model that you want to keep from here.\n"
BUSY = (429, 500, 502, 503, 504)  # HTTP errors of a server that may come back
PAUSE = 1.0  # seconds between two attempts to reach a server
PROBE = (
    'I would like to change my flight. <tool_call>\n{"name": "get_reservation_details", "arguments": '
    '{"reservation_id": "4WQ150"}}\n</tool_call> Your order #W2378156 was delivered on 2024-05-15. Anything else?'
)
PROBE_TOKENS = 16  # sampled after PROBE
APART = (
    0.1  # nats that the two scores of a token may be apart at first, on average over the probe; bfloat16 stays below
)
LATER = 100  # times what they were apart at first: how far they may be later, when the policy is less even


@dataclasses.dataclass(kw_only=True)
class Flags:
    """vLLM servers."""

    vllm_url: list[str] = dataclasses.field(default_factory=list)
    """addresses of servers that read the policy from a hand-over directory (python server.py), http://HOST:PORT"""
    vllm_timeout: Positive = 600
    """seconds that a server may take for an answer, or to come back"""


class ServerFailed(StopRun):
    """A server gives no answer, or not the answer of this policy."""


# ----------------------------------------------------------------------------------------------------- the directory


@torch.no_grad()
def served_weights(model) -> dict[str, torch.Tensor]:
    """All weights by their names in a checkpoint, in the type that the policy computes in, whole on rank 0 (elsewhere
    None). Every rank must call. A head that shares the embedding's weights is written by itself, because vLLM does not
    load a shared one again."""
    policy.trained_parameters(model)  # reshards
    embedding, dtype = model.get_input_embeddings().weight, model.compute_dtype
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is embedding]
    found = {name: policy.gathered(p.to(dtype)) for name, p in model.named_parameters()}
    return {**found, **{name: copy.deepcopy(found[tied[0]]) for name in tied[1:]}}


def write_weights(weights, folder: Path):
    """Writes aside and renames: a server that starts at any moment finds whole weights. Raises OSError."""
    temporary = folder / "model.tmp"
    try:
        save_file(weights, temporary, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {folder}, which needs room for the weights twice: {one_line(error)}") from None
    temporary.chmod(0o644)  # the server may be another user's
    os.replace(temporary, folder / "model.safetensors")


def make_directory(model, tokenizer, folder: Path):
    """Writes a directory that a server can start from. Raises ValueError if it exists and is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new directory")
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings, config.dtype = False, model.compute_dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_weights(served_weights(model), folder)
    (folder / MARK).write_text(NOTICE, encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- the servers


@dataclasses.dataclass(frozen=True)
class Server:
    """What one server says of itself."""

    url: str
    model: str  # its name in requests
    folder: Path  # that it reads weights from
    max_context: int


class Servers:
    """The servers at some addresses, which all play the same policy."""

    def __init__(self, urls, timeout):
        self.timeout, self.vocabulary = timeout, 0
        self.handed = self.adapter = None  # what they play: sums of the weights, and with LoRA the adapter's name
        self.allowed, self.before = None, []  # see verify
        self.begin()
        for url in urls:
            check_address(url)
        self.servers = [self.describe(url.rstrip("/").removesuffix("/v1")) for url in urls]

    def begin(self):
        """Before requests that end together: one that fails ends the others, and the first to wait says so."""
        self.failed, self.waiting = threading.Event(), False

    def ask(self, url, path, body=None):
        """The JSON answer to a GET, or to a POST of `body`; {} if it is none. Where there is no answer, or an error of
        the server's, it asks again for `timeout` seconds. Raises ServerFailed."""
        where, began, failed = without_secrets(url + path), time.monotonic(), self.failed
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '')}"}
        data = None if body is None else json.dumps(body).encode()
        while True:
            left = self.timeout - (time.monotonic() - began)
            try:
                request = urllib.request.Request(url + path, data, headers)
                with urllib.request.urlopen(request, timeout=max(left, 0.01)) as answer:
                    text = answer.read()
                with suppress(ValueError):
                    return json.loads(text)
                return {}  # such as "Success: ..."
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                with suppress(OSError, http.client.HTTPException):
                    why += f": {printable(error.read(300).decode(errors='replace'))}"
                if error.code not in BUSY:
                    raise ServerFailed(f"{where} refuses: {why}") from None
            except (OSError, http.client.HTTPException) as error:
                why = reason(error)
            if not self.waiting and not failed.is_set():
                self.waiting = True
                distributed.say(f"waiting for {where} for {self.timeout:g} s at most ({why})")
            if left < PAUSE or failed.wait(PAUSE):
                failed.set()
                raise ServerFailed(f"{where} has given no answer for {self.timeout:g} s ({why}); see --vllm_timeout")

    def describe(self, url) -> Server:
        """Raises ServerFailed if it is no vLLM server, or serves no hand-over directory."""
        answer = self.ask(url, "/v1/models")
        try:
            about = answer["data"][0]
            found = Server(url, about["id"], Path(about["root"]), int(about["max_model_len"]))
        except (KeyError, IndexError, TypeError, ValueError):
            raise ServerFailed(f"{without_secrets(url)} is no vLLM server: its /v1/models has no root") from None
        if not (found.folder / MARK).is_file():
            made = f"{found.folder}, which on this machine is no hand-over directory"
            raise ServerFailed(f"{without_secrets(url)} serves {made}; make one with python server.py, and serve that")
        return found

    @property
    def folders(self) -> list[Path]:
        return list(dict.fromkeys(server.folder for server in self.servers))

    def check(self, model, max_context):
        """Raises ServerFailed for a server that cannot play this policy."""
        for server in self.servers:
            if server.max_context < max_context:
                limit = f"has room for {server.max_context} tokens (--max-model-len), max_context is {max_context}"
                raise ServerFailed(f"{without_secrets(server.url)} {limit}")
        if not has_adapter(model):
            mine = {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
            for folder in self.folders:
                try:
                    tensors = safe_open(folder / "model.safetensors", "pt")
                except (SafetensorError, OSError) as error:
                    raise ServerFailed(f"cannot read {folder / 'model.safetensors'}: {one_line(error)}") from None
                with tensors:
                    theirs = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
                other = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
                if other:
                    shapes = f"{other[0]} has the shape {theirs.get(other[0])}, here {mine.get(other[0])}"
                    raise ServerFailed(f"{folder} has another model: {shapes}")

    def hand_over(self, model, tokenizer, temperature):
        """Lets the servers play this policy, if they do not already. Every rank must call. Raises ServerFailed on every
        rank."""
        parameters = policy.trained_parameters(model)  # reshards
        sums = [policy.whole(p.detach().sum(dtype=torch.float64)).item() for p in model.parameters()]
        if all(all_gather_json(sums == self.handed)):
            return
        self.handed, self.vocabulary = None, model.config.vocab_size
        if has_adapter(model):
            weights = {name: policy.gathered(p) for name, p in parameters.items()} if policy.is_sharded(model) else None
            load = functools.partial(self.load_adapter, model, tokenizer, weights)
        else:
            load = functools.partial(self.load, served_weights(model))
        failure, answers = None, []
        if rank() == 0:
            self.begin()
            try:
                load()
                answers = [self.score_probe(server, tokenizer, temperature) for server in self.servers]
            except (ServerFailed, OSError, SafetensorError) as error:
                failure = one_line(error)
        del load
        failure, answers, self.adapter = all_gather_json([failure, answers, self.adapter])[0]
        self.verify(model, answers, temperature)
        raise_everywhere(failure)
        self.handed = sums

    def verify(self, model, answers, temperature):
        """Raises ServerFailed on every rank if a server's scores of the probe are too far from the model's, or are
        still those of the policy before. How far they may be follows from how far they are at first, which is what
        rounding does. Every rank must call."""
        found, failure = [], None  # found: of each server its scores and ours
        for server, (ids, scores) in zip(self.servers, answers, strict=False):
            mine = score(model, ids, temperature)
            found.append((scores[:-PROBE_TOKENS], mine[:-PROBE_TOKENS]))
            apart = sum(abs(a - b) for a, b in zip(scores, mine, strict=True)) / len(mine)
            theirs, ours = self.before[len(found) - 1] if self.before else (None, None)
            stale = theirs == found[-1][0] and ours != found[-1][1]
            if stale or not apart < (self.allowed or APART):
                failure = (
                    f"{without_secrets(server.url)} plays another policy, perhaps an old one: its log-probabilities "
                )
                failure += f"are {apart:.4f} away from those here, on average over {len(mine)} tokens"
                failure += ", and have not changed" if stale else ""
            elif self.allowed is None and len(found) == len(self.servers):
                self.allowed = min(APART, LATER * apart + 1e-3)
        self.before = found or self.before
        raise_everywhere(failure)

    def load(self, weights):
        """Lets every server read new weights."""
        for folder in self.folders:
            write_weights(weights, folder)
        for server in self.servers:
            self.ask(server.url, "/collective_rpc", {"method": "reload_weights"})
            self.ask(server.url, "/reset_prefix_cache", {})

    def load_adapter(self, model, tokenizer, weights):
        """The same with LoRA: the adapter alone, under a new name each time, which is what prefixes are cached by."""
        name = f"adapter-{uuid.uuid4().hex}"
        for folder in self.folders:
            policy.save_policy(model, tokenizer, folder / name, weights)
        for server in self.servers:
            about = {"lora_name": name, "lora_path": str(server.folder / name)}
            self.ask(server.url, "/v1/load_lora_adapter", about)
            if self.adapter:
                with suppress(ServerFailed):  # it has been started again
                    self.ask(server.url, "/v1/unload_lora_adapter", {"lora_name": self.adapter})
        self.adapter = name
        for old in [path for folder in self.folders for path in folder.glob("adapter-*")]:
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)

    def complete(self, server, ids, max_tokens, temperature, stop_ids=(), **more) -> dict:
        """A choice of vLLM's completions API. What its directory may set by default is set here. No seed: with one,
        0.32 fails on a CPU, and it is slower on a GPU, where results depend on the other requests anyway."""
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
        wanted = {"logprobs": 0, "return_token_ids": True, "stop_token_ids": sorted(stop_ids)}
        asked = {"model": self.adapter or server.model, "prompt": list(ids), "max_tokens": max_tokens}
        body = {**neutral, **wanted, **asked, "temperature": temperature, **more}
        answer = self.ask(server.url, "/v1/completions", body)
        try:
            [choice] = answer["choices"]
            return choice
        except (KeyError, ValueError, TypeError):
            raise ServerFailed(f"{without_secrets(server.url)} answers without a choice") from None

    def sample(self, server, ids, max_tokens, temperature, stop_ids) -> tuple[list[int], list[float]]:
        """(ids, log-probabilities at `temperature`) of a turn, which ends with a stop id or has `max_tokens`. Raises
        ServerFailed for an answer that is none."""
        choice = self.complete(server, ids, max_tokens, temperature, stop_ids)
        found, logprobs = self.read_sampled(choice, server.url)
        ended = found[-1] in stop_ids or len(found) == max_tokens
        if not ended or len(found) > max_tokens or any(i in stop_ids for i in found[:-1]):
            what = f"{len(found)} tokens that end with id {found[-1]}"
            raise ServerFailed(f"{without_secrets(server.url)} answers with {what}, not with a turn of this policy")
        return found, logprobs

    def read_sampled(self, choice, url) -> tuple[list[int], list[float]]:
        """The sampled ids of a choice and their log-probabilities. Raises ServerFailed if one is missing or none."""
        try:
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            good = len(ids) == len(logprobs) > 0 and all(type(i) is int and 0 <= i < self.vocabulary for i in ids)
            good = good and all(math.isfinite(p) and p < 0.01 for p in logprobs)
        except (KeyError, TypeError):
            good = False
        if not good:
            what = "answers without the ids and log-probabilities of what it sampled"
            raise ServerFailed(f"{without_secrets(url)} {what}")
        return ids, [min(p, 0.0) for p in logprobs]

    def score_probe(self, server, tokenizer, temperature) -> tuple[list[int], list[float]]:
        """(ids, log-probabilities of all but the first): PROBE, at temperature 1, and PROBE_TOKENS sampled after it."""
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
        more = {"prompt_logprobs": 0, "ignore_eos": True}
        choice = self.complete(server, ids, PROBE_TOKENS, temperature, **more)
        found, logprobs = self.read_sampled(choice, server.url)
        try:
            first = [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)]
            good = len(found) == PROBE_TOKENS and all(map(math.isfinite, first))
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise ServerFailed(f"{without_secrets(server.url)} answers without the scores of a prompt's tokens")
        return [*ids, *found], [*first, *logprobs]


@functools.cache
def connect(urls: tuple[str, ...], timeout: float) -> Servers:
    """The servers at these addresses; the same object for the same ones, because it knows what they play."""
    return Servers(urls, timeout)


def check_address(url):
    """Raises ValueError for an address that is none of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.username is None
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"vllm_url must be like http://127.0.0.1:8000, got {url!r} (a key goes into VLLM_API_KEY)")


def has_adapter(model) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)


def raise_everywhere(failure: str | None):
    """Raises ServerFailed on every rank if one of them has a failure. Every rank must call."""
    failure = next((text for text in all_gather_json(failure) if text), None)
    if failure:
        raise ServerFailed(failure)


def score(model, ids, temperature) -> list[float]:
    """The model's own log-probabilities of what `score_probe` returns. Every rank must call."""
    ids_B_T = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        plain = policy.token_logprobs(model, ids_B_T, torch.ones_like(ids_B_T))[0]
        scaled = policy.token_logprobs(model, ids_B_T, torch.ones_like(ids_B_T), temperature or 1.0)[0]
    return [*plain[1:-PROBE_TOKENS].tolist(), *scaled[-PROBE_TOKENS:].tolist()]


# ------------------------------------------------------------------------------------------------------- conversations


def play(servers, active, temperature):
    """Plays the conversations (rollout._Conversation) to their ends. Each goes on as soon as it is answered, with the
    server that it began with, which remembers its beginning. Every rank must call; raises ServerFailed on all."""
    asked, failure = {}, None
    servers.begin()
    try:
        while not all(c.finished for c in active):
            busy = set(asked.values())
            for i, c in enumerate(active):
                if c.answer is not None and c.answer.done():
                    c.hear()
                if c.answer is None and not c.finished and i not in busy:
                    server = servers.servers[(i + rank()) % len(servers.servers)]
                    turn = (c.trajectory.token_ids, c.room, temperature, c.chat.stop_ids)
                    asked[in_thread(servers.sample, server, *turn)] = i
            waiting = [*asked, *(c.answer for c in active if c.answer is not None)]
            done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done & asked.keys():
                active[asked.pop(future)].say(*future.result())
    except ServerFailed as error:
        failure = str(error)
    finally:
        servers.failed.set()
    raise_everywhere(failure)


def in_thread(function, *args) -> concurrent.futures.Future:
    """The future of function(*args), in a thread that does not keep the process from ending."""
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# ---------------------------------------------------------------------------------------------------------- the script


@dataclasses.dataclass
class Args:
    """Makes a directory that a vLLM server reads its weights from, and train.py writes them to."""

    model_name_or_path: str
    """directory or hub name of the model that will be trained"""
    directory: str
    """a new directory, in memory (/dev/shm) or on a file system that server and trainer share"""
    model_dtype: policy.Flags.__annotations__["model_dtype"] = "bfloat16"
    """the type that the policy is computed in"""


def main():
    with errors_in_one_line("server.py"):
        args = tyro.cli(Args)
        model, tokenizer = policy.load_policy(
            args.model_name_or_path, args.model_dtype, "cpu", weights_dtype=args.model_dtype
        )
        ChatFormat.of(tokenizer)
        make_directory(model, tokenizer, Path(args.directory))
    options = f"--dtype {args.model_dtype} --logprobs-mode processed_logprobs --generation-config vllm"
    distributed.say(
        f"{args.directory} is ready. Serve it, in an environment with vLLM:\n\n"
        f"VLLM_SERVER_DEV_MODE=1 vllm serve {args.directory} --host 127.0.0.1 --port 8000 {options}\n\n"
        "then train with --rollout_engine vllm --vllm_url http://127.0.0.1:8000"
    )


if __name__ == "__main__":
    main()
