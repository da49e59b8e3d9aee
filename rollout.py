"""Multi-turn rollouts: all conversations at once, each token computed once.

Data flow: Episode -> rollout -> Trajectory. An episode is anything with domain, task.id, system, tools, messages, done,
termination, opening(), act(message) and stop(reason); oracle.Episode is one.

Two engines sample from the same distributions. "padded" decodes all conversations in one batch, token by token.
"paged" is transformers' continuous batching: answers are read in one piece, and common prefixes once.
"""

import concurrent.futures
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from pydantic import PositiveFloat, PositiveInt
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation import ContinuousBatchingConfig

from chat import ChatFormat
from grpo import Trajectory, micro_batches
from policy import autocast, is_sharded, plain_copy

Engine = Literal["auto", "padded", "paged"]
SLOW_AT_ONCE = 32  # conversations that wait for a server at the same time


@dataclass(kw_only=True)
class Flags:
    """Rollouts."""

    temperature: PositiveFloat = 0.7
    """sampling temperature, in rollouts and in the loss"""
    max_new_tokens: PositiveInt = 2048
    """sampled tokens per agent turn"""
    max_context: PositiveInt | None = None
    """tokens per conversation. Default: what the model allows"""
    max_user_tokens: PositiveInt | None = None
    """cut longer user messages"""
    max_tool_tokens: PositiveInt | None = None
    """cut longer tool results"""
    rollout_engine: Engine = "auto"
    """paged (continuous batching), padded, or auto: paged on a GPU, padded elsewhere"""


def settings(args) -> dict:
    """The keyword arguments of `rollout` that an object with these flags holds."""
    names = ("temperature", "max_new_tokens", "max_context", "max_user_tokens", "max_tool_tokens")
    return {**{name: getattr(args, name) for name in names}, "engine": args.rollout_engine}


class RaggedLayer(DynamicLayer):
    """Keys and values of conversations of different lengths, in room that doubles when it is full: a forward pass of
    some `rows` writes to each from its own `starts` on. transformers' DynamicLayer has one length for all and copies
    everything at every token."""

    count = 0  # conversations
    room = None  # (2, count, heads, tokens, head_dim)
    rows = starts = None  # of the next forward pass, (b,); rows None: all
    end = 0

    def update(self, key_states, value_states, *args, **kwargs):
        batch, heads, width, head_dim = key_states.shape
        if self.room is None or self.room.shape[-2] < self.end:
            old = self.room
            self.room = value_states.new_zeros((2, self.count, heads, max(256, 2 * self.end), head_dim))
            if old is not None:
                self.room[:, :, :, : old.shape[-2]] = old
        rows = torch.arange(batch, device=self.starts.device) if self.rows is None else self.rows
        columns = self.starts[:, None] + torch.arange(width, device=self.starts.device)
        for half, states in zip(self.room, (key_states, value_states), strict=True):
            half[rows[:, None], :, columns] = states.transpose(1, 2).to(half.dtype)
        seen = self.room[:, :, :, : self.end]
        return tuple(seen if self.rows is None else seen[:, rows])

    def get_seq_length(self):
        return self.end

    def select(self, rows):
        self.room, self.count = self.room.index_select(1, rows), len(rows)


def _new_cache(model):
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        name = model.config.name_or_path or model.config.model_type
        raise ValueError(f"{name}: rollouts need full attention in every layer; this model has other layers")
    cache.layers = [RaggedLayer() for _ in cache.layers]
    return cache


@dataclass
class _Conversation:
    """A conversation in progress, whichever way its turns are sampled."""

    episode: object
    chat: ChatFormat
    max_new_tokens: int
    max_context: int
    cut: dict  # tokens that a message of a role is cut to
    on_finish: object
    opened: object = None  # of an episode that waits for a server: the future of its opening
    finished: bool = False
    turn: int = 0
    answer: object = None  # of such an episode: the future of its answer to the last turn

    def __post_init__(self):
        self.trajectory = Trajectory(self.episode.domain, str(self.episode.task.id))
        try:
            opening = self._cut(self.episode.opening() if self.opened is None else self.opened.result())
        except Exception as error:
            if self.opened is None:
                raise
            self._fail(error)
            return
        self.trajectory.append(self.chat.opening(self.episode.system, opening, self.episode.tools))
        if self.room < 1:
            raise ValueError(
                f"the opening of {self.episode.domain} task {self.episode.task.id} has "
                f"{len(self.trajectory.token_ids)} tokens, which leaves none in a context of {self.max_context}"
            )
        if self.episode.done:
            self._finish(self.episode.termination)

    @property
    def room(self):
        """Tokens that the next turn may have."""
        return min(self.max_new_tokens, self.max_context - len(self.trajectory.token_ids))

    def say(self, ids, logprobs, pool=None) -> list[int]:
        """A sampled turn, to its end or to where it was cut. Returns what is to be read before the next one; nothing
        where the answer has to be waited for: then `answer` is its future (in `pool`), and `hear` is to be called."""
        stopped = ids[-1] in self.chat.stop_ids
        self.trajectory.append(ids, self.turn, logprobs)
        self.trajectory.truncated_turns += not stopped
        self.turn += 1
        text = self.chat.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
        if pool is not None and getattr(self.episode, "slow", False):
            self.answer = pool.submit(self.episode.act, self.chat.parse(text))
            return []
        return self.hear(lambda: self.episode.act(self.chat.parse(text)))

    def hear(self, act=None) -> list[int]:
        """The answer to the last turn, by default the one that was waited for."""
        answer, self.answer = self.answer, None
        try:
            answers = act() if act is not None else answer.result()
        except Exception as error:  # named in the trajectory, which its group leaves out
            return self._fail(error)
        if self.episode.done:
            return self._finish(self.episode.termination)
        ended = self.trajectory.token_ids[-1] == self.chat.end_id
        suffix = ([] if ended else [self.chat.end_id]) + self.chat.answer(self._cut(answers))
        if len(self.trajectory.token_ids) + len(suffix) >= self.max_context:
            self.episode.stop("max_steps")
            return self._finish("max_steps")
        self.trajectory.append(suffix)
        return suffix

    def _cut(self, messages):
        return [self.chat.cut(message, self.cut.get(message["role"])) for message in messages]

    def _fail(self, error):
        self.trajectory.valid = False
        self.trajectory.error = f"{type(error).__name__}: {error}"
        return self._finish("environment_error")

    def _finish(self, termination):
        self.finished = True
        self.trajectory.termination = termination
        self.trajectory.messages = self.episode.messages
        if self.on_finish is not None:
            self.on_finish(self.episode, self.trajectory)
        return []


@torch.no_grad()
def rollout(
    model,
    tokenizer,
    episodes,
    temperature=1.0,
    max_new_tokens=512,
    max_context=None,
    max_user_tokens=None,
    max_tool_tokens=None,
    generator=None,
    on_finish=None,
    engine="auto",
) -> list[Trajectory]:
    """Plays all episodes at once and returns their trajectories in the episodes' order.

    Sampling is from the whole distribution at `temperature` (0: the most likely token), so the log-probabilities are
    those of the loss: to rounding in float32; in bfloat16, where engines, autocast and shards round in other places, to
    about a percent. Each token is computed once, and none waits for the others' turns.

    max_new_tokens: sampled tokens a turn; max_context: tokens a conversation (None: the model's limit), at which it
    ends as "max_steps"; max_user_tokens, max_tool_tokens: tokens of one message to the policy, cut beyond.
    generator: a torch.Generator on the model's device. on_finish(episode, trajectory): called when one ends.
    engine: "padded" decodes all conversations in one batch, token by token; "paged" is transformers' continuous
    batching, where answers are read in one piece and common prefixes once; "auto": paged on a GPU, padded elsewhere
    (`python grpo.py` measures both). With a sharded model every rank must call, with episodes or without.
    An exception of `episode.act` makes the trajectory invalid, with the error's text. Episodes with a true attribute
    `slow` (their users are models behind a server) are asked in threads, SLOW_AT_ONCE at a time, while others go on.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    engine = choose_engine(model, engine)
    # Sharded weights are gathered, and continuous batching runs in a thread of its own, outside autocast.
    uniform = {p.dtype for p in model.parameters()} == {getattr(model, "compute_dtype", model.dtype)}
    if is_sharded(model) or (engine == "paged" and not uniform):
        model = plain_copy(model, model.compute_dtype)
    max_context = context_length(model, max_context)
    cut = {"tool": max_tool_tokens, "user": max_user_tokens}
    chat = ChatFormat.of(tokenizer)
    pool = concurrent.futures.ThreadPoolExecutor(SLOW_AT_ONCE)
    try:
        opened = [pool.submit(e.opening) if getattr(e, "slow", False) else None for e in episodes]
        conversations = [
            _Conversation(episode, chat, max_new_tokens, max_context, cut, on_finish, opening)
            for episode, opening in zip(episodes, opened, strict=True)
        ]
        active = [c for c in conversations if not c.finished]
        if active:
            play = _play_paged if engine == "paged" else _play_padded
            with autocast(model):
                play(model, tokenizer, active, temperature, generator, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [c.trajectory for c in conversations]


SLOW_AT_ONCE = 32  # conversations that wait for a server at the same time


ENGINES = ("auto", "padded", "paged")


def choose_engine(model, engine="auto") -> str:
    """What "auto" stands for. Raises ValueError for an unknown engine, or one that the model's attention rules out."""
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if engine == "auto":
        engine = "paged" if torch.cuda.is_available() else "padded"
    attention = model.config._attn_implementation
    if engine == "padded" and attention not in ("eager", "sdpa"):
        raise ValueError(f"padded rollouts need the attention eager or sdpa, not {attention}")
    if engine == "paged" and not (attention in ("eager", "sdpa") or "flash" in attention):
        raise ValueError(f"paged rollouts need the attention eager, sdpa or a flash one, not {attention}")
    return engine


def context_length(model, max_context=None) -> int:
    """Tokens that a conversation may have. ValueError where that is more than the model allows."""
    limit = model.config.max_position_embeddings
    if (max_context or 0) > limit:
        raise ValueError(f"max_context must be at most the model's {limit} tokens, got {max_context}")
    return max_context or limit


def check_opening(model, tokenizer, episode, max_context=None, max_user_tokens=None, max_tool_tokens=None):
    """Raises ValueError where an episode's opening leaves no room for a turn: better known at the start of a run."""
    cut = {"tool": max_tool_tokens, "user": max_user_tokens}
    _Conversation(episode, ChatFormat.of(tokenizer), 1, context_length(model, max_context), cut, None)


def _play_padded(model, tokenizer, active, temperature, generator, pool=None):
    """All conversations sample one token per forward pass; those that have been answered read the answer first, in a
    pass of their own. Equal prompts are read once."""
    device = model.device
    prompts = [tuple(c.trajectory.token_ids) for c in active]
    distinct = sorted(set(prompts))
    cache = _new_cache(model)
    lengths = torch.zeros(len(distinct), dtype=torch.long, device=device)  # tokens in the cache
    head = model.get_output_embeddings()

    def read(rows, texts):
        """Feeds each row its next tokens; logits (rows, V) behind the last one."""
        widths = torch.tensor([len(text) for text in texts], device=device)
        ids = torch.zeros((len(texts), max(map(len, texts))), dtype=torch.long)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.tensor(text)
        index = None if rows is None else torch.tensor(rows, device=device)
        starts = lengths if rows is None else lengths[index]
        positions = starts[:, None] + torch.arange(ids.shape[1], device=device)
        end = int(starts.max()) + ids.shape[1]
        for layer in cache.layers:
            layer.rows, layer.starts, layer.end = index, starts, end
        seen = torch.arange(end, device=device) <= positions[:, :, None]  # and so never the padding behind a text
        if model.config._attn_implementation == "eager":
            seen = torch.where(seen, 0.0, torch.finfo(model.dtype).min)
        hidden = model.get_decoder()(
            input_ids=ids.to(device),
            attention_mask=seen[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = head(hidden[torch.arange(len(texts), device=device), widths - 1])
        if rows is None:
            lengths.add_(widths)
        else:
            lengths[index] += widths
        return logits

    def read_long(rows, texts):
        """The same in passes of 16k tokens."""
        logits = {}
        for part in micro_batches([len(text) for text in texts], 16384):
            found = read([rows[i] for i in part], [texts[i] for i in part])
            logits.update(zip(part, found, strict=True))
        return torch.stack([logits[i] for i in range(len(texts))])

    cache_rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
    for layer in cache.layers:
        layer.count = len(distinct)
    logits_BV = read_long(range(len(distinct)), distinct)[cache_rows]
    for layer in cache.layers:
        layer.select(cache_rows)
    lengths = lengths[cache_rows]
    rows = list(range(len(active)))  # whose logits these are
    sampled = [[] for _ in active]  # of the turn in progress: (token, log-probability)
    pending = [[] for _ in active]  # to be read before the next token
    while True:
        if not logits_BV.isfinite().all():
            raise ValueError("the policy's logits are not finite; its weights have diverged, lower the learning rate")
        logprobs_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
        if temperature > 0:
            tokens_B = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)
        else:
            tokens_B = logprobs_BV.argmax(-1, keepdim=True)
        chosen_B = logprobs_BV.gather(1, tokens_B)[:, 0].tolist()
        for i, token, logprob in zip(rows, tokens_B[:, 0].tolist(), chosen_B, strict=True):
            if active[i].finished:
                continue
            sampled[i].append((token, logprob))
            pending[i] = [token]
            if token in active[i].chat.stop_ids or len(sampled[i]) == active[i].room:
                pending[i] += active[i].say(*map(list, zip(*sampled[i], strict=True)), pool)
                sampled[i] = []
        _wait(active, pending)
        kept = [i for i, c in enumerate(active) if not c.finished]
        if not kept:
            return
        if len(kept) <= 0.8 * len(active):  # finished conversations leave the batch a fifth at a time
            active, pending, sampled = ([column[i] for i in kept] for column in (active, pending, sampled))
            index = torch.tensor(kept, device=device)
            lengths = lengths[index]
            for layer in cache.layers:
                layer.select(index)
        waiting = {i for i, c in enumerate(active) if c.answer is not None}
        rows = [i for i, text in enumerate(pending) if len(text) > 1 and not active[i].finished and i not in waiting]
        if rows:
            logits_BV = read_long(rows, [pending[i] for i in rows])
        elif waiting:
            rows = [i for i, c in enumerate(active) if not c.finished and i not in waiting]
            logits_BV = read(rows, [pending[i][:1] for i in rows])
        else:
            rows = list(range(len(active)))
            logits_BV = read(None, [text[:1] for text in pending])


def _wait(active, pending):
    """Takes the answers that have come; where every conversation waits for one, until one has."""
    while True:
        going = False
        for i, c in enumerate(active):
            if c.answer is not None and c.answer.done():
                pending[i] += c.hear()
            going = going or (c.answer is None and not c.finished)
        futures = [c.answer for c in active if c.answer is not None]
        if going or not futures:
            return
        concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)


PAGE = 16  # tokens; what is not a whole page is read again when its conversation goes on


def _play_paged(model, tokenizer, active, temperature, generator, pool=None):
    """transformers' continuous batching: one manager, and so one cache, for this rollout and no longer. A conversation
    goes on as soon as it is answered; what it shares with any other one so far, or with itself, is not read again."""
    settings = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0,
        top_p=1.0,
        max_new_tokens=active[0].max_new_tokens,
        eos_token_id=sorted(active[0].chat.stop_ids),
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device)) if generator else None
    sizes = {}
    if model.device.type == "cpu":  # elsewhere they follow from the free memory
        sizes = {"num_blocks": sum(-(-c.max_context // PAGE) for c in active), "max_batch_tokens": 2048}
    known = ContinuousBatchingConfig.__dataclass_fields__
    if "auto_switch_to_flash" in known:
        sizes["auto_switch_to_flash"] = False  # the attention is the user's choice
    sizes["page_size" if "page_size" in known else "block_size"] = PAGE  # its name before transformers 5.18
    paging = ContinuousBatchingConfig(return_logprobs=True, seed=seed, **sizes)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the library seeds the global generator
        manager = model.init_continuous_batching(settings, paging)
        manager.start()
        try:
            _read_shared_prefixes(manager, active)
            sampling = set(range(len(active)))  # of whom the manager has a request
            going_on = list(sampling)
            while not all(c.finished for c in active):
                for i in going_on:
                    manager.add_request(active[i].trajectory.token_ids, str(i), max_new_tokens=active[i].room)
                asked = {c.answer: i for i, c in enumerate(active) if c.answer is not None}
                answered = []
                if not sampling:
                    concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_COMPLETED)
                elif (result := _next_result(manager, patient=not asked)) is not None:
                    i = int(result.request_id)
                    sampling.remove(i)
                    active[i].say(result.generated_tokens, result.logprobs, pool)
                    answered += [i] if active[i].answer is None else []
                for answer, i in asked.items():
                    if answer.done():
                        active[i].hear()
                        answered.append(i)
                going_on = [i for i in answered if not active[i].finished]
                sampling.update(going_on)
        finally:
            manager.stop(block=True, hard_stop=True)


def _read_shared_prefixes(manager, active):
    """Conversations that start together would each read the prompt that they share: it is read once before, first what
    all of one domain share (its policy and tools), then what the samples of one task do."""
    by_domain, by_prompt = {}, Counter(tuple(c.trajectory.token_ids) for c in active)
    for c in active:
        by_domain.setdefault(c.episode.domain, []).append(c.trajectory.token_ids)
    policies = [_common_prefix(min(p), max(p)) for p in by_domain.values() if min(p) != max(p)]
    samples = [list(prompt) for prompt, count in by_prompt.items() if count > 1]
    for prefixes in (policies, samples):
        prefixes = [prefix for prefix in prefixes if len(prefix) >= PAGE]
        for i, prefix in enumerate(prefixes):  # two tokens: the cache forgets what a request's last step completed
            manager.add_request(prefix, f"prefix {i}", max_new_tokens=2, eos_token_id=-1)
        for _ in prefixes:
            _next_result(manager)


def _common_prefix(a, b):
    """Of the least and the greatest of some lists, it is the common prefix of all."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))]


def _next_result(manager, patient=True):
    """A finished request; impatiently None if there is none soon."""
    result = None
    while result is None:
        result = manager.get_result(timeout=1.0 if patient else 0.02)
        if result is None and not manager.is_running():
            raise RuntimeError(f"continuous batching stopped: {manager.background_thread_status.fatal_error}")
        if result is None and not patient:
            return None
    if result.error is not None:
        raise ValueError(f"paged rollouts failed: {result.error}; take fewer conversations at once, or engine padded")
    return result


def demonstration(tokenizer, episode, turns, max_user_tokens=None, max_tool_tokens=None) -> Trajectory:
    """The trajectory of a policy that says `turns` (chat messages) in a fresh `episode`: what a warm start imitates.
    The action mask is True on what the policy says; log-probabilities are 0.0."""
    chat = ChatFormat.of(tokenizer)
    limits = {"tool": max_tool_tokens, "user": max_user_tokens}
    opening = [chat.cut(message, limits.get(message["role"])) for message in episode.opening()]
    trajectory = Trajectory(episode.domain, str(episode.task.id))
    trajectory.append(chat.opening(episode.system, opening, episode.tools))
    for k, turn in enumerate(turns):
        trajectory.append(chat.turn(turn), turn=k)
        answers = episode.act(turn)
        if episode.done:
            break
        trajectory.append(chat.answer([chat.cut(message, limits.get(message["role"])) for message in answers]))
    trajectory.messages, trajectory.termination = episode.messages, episode.termination
    return trajectory
