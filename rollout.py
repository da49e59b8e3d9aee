"""Multi-turn rollouts: all conversations at once, each token computed once.

Data flow: Episode -> rollout -> Trajectory. An episode is any object with domain, task.id, system, tools, messages,
done, termination, opening(), act(message) and stop(reason), such as episode.Episode.

Three engines sample from the same distributions. "padded" decodes all conversations in one batch, token by token.
"paged" is transformers' continuous batching, which reads a common prefix once. "vllm" asks servers (server.py).
"""

import concurrent.futures
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation import ContinuousBatchingConfig

import server
from chat import ChatFormat
from flags import Count
from grpo import Trajectory, micro_batches
from policy import autocast, is_sharded, plain_copy
from text import reason

Engine = Literal["auto", "padded", "paged", "vllm"]
SLOW_AT_ONCE = 32  # episodes that wait for a server at the same time
READ_TOKENS = 16384  # of openings and answers in one forward pass of the padded engine
READ_SHARE = 0.25  # of the conversations with an answer to read, above which a forward pass of its own reads them
PAGE = 16  # tokens of the paged engine's cache; an incomplete page is computed again in the next turn


@dataclass(kw_only=True)
class Flags:
    """Rollouts."""

    temperature: Annotated[float, Field(ge=0.01, le=100)] = 0.7
    """sampling temperature, in rollouts and in the loss"""
    max_new_tokens: Count = 2048
    """sampled tokens per agent turn"""
    max_context: Count | None = None
    """tokens per conversation. Default: what the model allows"""
    max_user_tokens: Count | None = None
    """cut longer user messages"""
    max_tool_tokens: Count | None = None
    """cut longer tool results"""
    rollout_engine: Engine = "auto"
    """padded, paged (transformers' continuous batching), vllm (servers), or auto: padded, paged for flash attention"""


def settings(args) -> dict:
    """The keyword arguments of `rollout` that an object with these flags holds."""
    names = ("temperature", "max_new_tokens", "max_context", "max_user_tokens", "max_tool_tokens")
    names += ("vllm_url", "vllm_timeout")
    return {**{name: getattr(args, name) for name in names}, "engine": args.rollout_engine}


# ----------------------------------------------------------------------------------------------------- conversations


@dataclass
class _Conversation:
    """A conversation in progress, for both engines."""

    episode: object
    chat: ChatFormat
    max_new_tokens: int
    max_context: int
    cut: dict  # role -> tokens that its messages are cut to
    on_finish: object = None
    pool: object = None  # where a slow episode acts; None: it acts at once
    opened: object = None  # the future of a slow episode's opening
    answer: object = None  # the future of a slow episode's answer to the last turn
    finished: bool = False
    turn: int = 0

    def __post_init__(self):
        self.trajectory = Trajectory(self.episode.domain, str(self.episode.task.id))
        try:
            opening = self._cut(self.episode.opening() if self.opened is None else self.opened.result())
            self.trajectory.append(self.chat.opening(self.episode.system, opening, self.episode.tools))
            if self.room < 1:
                raise ValueError(
                    f"the opening of {self.episode.domain} task {self.episode.task.id} has "
                    f"{len(self.trajectory.token_ids)} tokens, which leaves none in a context of {self.max_context}"
                )
        except Exception as error:
            if self.opened is None:
                raise
            self._fail(error)
            return
        if self.episode.done:
            self.finish(self.episode.termination)

    @property
    def room(self):
        """Tokens that the next turn may have."""
        return min(self.max_new_tokens, self.max_context - len(self.trajectory.token_ids))

    def say(self, ids, logprobs) -> list[int]:
        """Takes a sampled turn, complete or cut off. Returns the ids to read before the next turn. For a slow episode
        these are empty, `answer` is a future, and the caller must call `hear` when it is done."""
        stopped = ids[-1] in self.chat.stop_ids
        self.trajectory.append(ids, self.turn, logprobs)
        self.trajectory.truncated_turns += not stopped
        self.turn += 1
        message = self.chat.parse(self.chat.tokenizer.decode(ids[: len(ids) - stopped], skip_special_tokens=True))
        if self.pool is not None:
            self.answer = self.pool.submit(self.episode.act, message)
            return []
        return self.hear(lambda: self.episode.act(message))

    def hear(self, act=None) -> list[int]:
        """Takes the answer to the last turn: act(), by default the future's result. Returns the ids to read."""
        act, self.answer = act or self.answer.result, None
        try:
            messages = act()
        except Exception as error:  # the trajectory names it, and its group leaves the trajectory out
            return self._fail(error)
        return self.read(messages)

    def read(self, messages) -> list[int]:
        """Appends the answer to the last turn, or ends the conversation. Returns the appended ids."""
        if self.episode.done:
            return self.finish(self.episode.termination)
        ended = self.trajectory.token_ids[-1] == self.chat.end_id
        suffix = ([] if ended else [self.chat.end_id]) + self.chat.answer(self._cut(messages))
        if len(self.trajectory.token_ids) + len(suffix) >= self.max_context:
            self.episode.stop("max_steps")
            return self.finish("max_steps")
        self.trajectory.append(suffix)
        return suffix

    def _cut(self, messages):
        return [self.chat.cut(message, self.cut.get(message["role"])) for message in messages]

    def _fail(self, error):
        self.trajectory.valid = False
        self.trajectory.error = reason(error)
        return self.finish("environment_error")

    def finish(self, termination):
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
    vllm_url=(),
    vllm_timeout=600.0,
) -> list[Trajectory]:
    """Plays all episodes at once and returns their trajectories in the episodes' order.

    It samples from the whole distribution at `temperature` (0: always the most likely token). The log-probabilities
    are those of `token_logprobs`, up to rounding in float32 and about a percent in bfloat16.

    max_new_tokens: sampled tokens per turn. max_context: tokens per conversation (None: the model's limit); a full
    context ends it as "max_steps". max_user_tokens, max_tool_tokens: longer messages are cut to as many tokens.
    generator: of torch, on the model's device; servers draw by themselves. on_finish(episode, trajectory): at an end.
    engine: "padded", "paged", "vllm" or "auto". vllm_url, vllm_timeout: servers, and seconds that one may take.

    An exception in `episode.act` makes the trajectory invalid; its `error` is the exception's text. Episodes with a
    true attribute `slow` (their users are models behind a server) act in threads while the others go on. With a sharded
    model, or with servers, every rank must call, even without episodes. Raises ValueError for bad settings, an opening
    that fills the context, and logits that are not finite; ServerFailed on every rank if a server fails on one.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    engine = choose_engine(model, engine)
    # Sharded weights must be gathered. Continuous batching runs in a thread of its own, where autocast does not reach.
    uniform = {p.dtype for p in model.parameters()} == {getattr(model, "compute_dtype", model.dtype)}
    servers = None
    if engine == "vllm":
        servers = server.connect(tuple(vllm_url), vllm_timeout)
        servers.hand_over(model, tokenizer, temperature)
    elif is_sharded(model) or (engine == "paged" and not uniform):
        model = plain_copy(model, model.compute_dtype)
    max_context = context_length(model, max_context)
    cut = {"tool": max_tool_tokens, "user": max_user_tokens}
    chat = ChatFormat.of(tokenizer)
    pool = concurrent.futures.ThreadPoolExecutor(SLOW_AT_ONCE)
    try:
        pools = [pool if getattr(episode, "slow", False) else None for episode in episodes]
        opened = [slow and slow.submit(episode.opening) for slow, episode in zip(pools, episodes, strict=True)]
        conversations = [
            _Conversation(episode, chat, max_new_tokens, max_context, cut, on_finish, *slow)
            for episode, *slow in zip(episodes, pools, opened, strict=True)
        ]
        active = [c for c in conversations if not c.finished]
        if servers is not None:
            server.play(servers, active, temperature)
        elif active:
            play = _play_paged if engine == "paged" else _play_padded
            with autocast(model):
                play(model, tokenizer, active, temperature, generator)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [c.trajectory for c in conversations]


def choose_engine(model, engine="auto") -> str:
    """Resolves "auto". Raises ValueError for an engine that is unknown or cannot use the model's attention."""
    if engine not in get_args(Engine):
        raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(get_args(Engine))}")
    attention = model.config._attn_implementation
    if engine == "auto":
        engine = "paged" if "flash" in attention else "padded"
    if engine == "vllm":  # the model here samples nothing
        return engine
    if attention not in ("eager", "sdpa") and (engine == "padded" or "flash" not in attention):
        raise ValueError(f"{engine} rollouts need the attention eager or sdpa (paged: or flash), not {attention}")
    return engine


def check_engine(model, args) -> list:
    """The directories that weights are handed over in. Raises ValueError or ServerFailed for an engine that fails."""
    engine = choose_engine(model, args.rollout_engine)
    if (engine == "vllm") != bool(args.vllm_url):
        raise ValueError(f"rollout_engine vllm and vllm_url go together, got {engine} and {args.vllm_url}")
    if engine == "vllm":
        servers = server.connect(tuple(args.vllm_url), args.vllm_timeout)
        servers.check(model, context_length(model, args.max_context))
        return servers.folders
    return []


def context_length(model, max_context=None) -> int:
    """Tokens that a conversation may have. Raises ValueError for more than the model allows."""
    limit = model.config.max_position_embeddings
    if (max_context or 0) > limit:
        raise ValueError(f"max_context must be at most the model's {limit} tokens, got {max_context}")
    return max_context or limit


def check_opening(model, tokenizer, episode, max_context=None, max_user_tokens=None, max_tool_tokens=None):
    """Raises ValueError if an episode's opening leaves no room for a turn, so that a run fails early."""
    cut = {"tool": max_tool_tokens, "user": max_user_tokens}
    _Conversation(episode, ChatFormat.of(tokenizer), 1, context_length(model, max_context), cut)


def demonstration(tokenizer, episode, turns, max_user_tokens=None, max_tool_tokens=None) -> Trajectory:
    """The trajectory of a policy that says `turns` (chat messages) in a fresh `episode`, for a warm start to imitate.
    The action mask is True on these turns; log-probabilities are 0.0."""
    limits = {"tool": max_tool_tokens, "user": max_user_tokens}
    conversation = _Conversation(episode, ChatFormat.of(tokenizer), math.inf, math.inf, limits)
    for k, turn in enumerate(turns):
        conversation.trajectory.append(conversation.chat.turn(turn), turn=k)
        conversation.read(episode.act(turn))
        if episode.done:
            break
    conversation.finish(episode.termination)
    return conversation.trajectory


# ---------------------------------------------------------------------------------------------------- padded engine


class RaggedLayer(DynamicLayer):
    """Keys and values of conversations of different lengths. A forward pass of some `rows` writes to each of them from
    its own `starts` on. transformers' DynamicLayer has one length for all rows and copies everything at every token;
    here the room doubles when it is full."""

    count = 0  # conversations
    room = None  # (2, count, heads, tokens, head_dim)
    rows = starts = None  # of the next forward pass: an index into the conversations, and (b,) tokens
    end = 0  # tokens of the longest row after the next forward pass

    def update(self, key_states, value_states, *args, **kwargs):
        _, heads, width, head_dim = key_states.shape
        if self.room is None or self.room.shape[-2] < self.end:
            size = (2, self.count, heads, max(256, 2 * self.end), head_dim)
            old, self.room = self.room, value_states.new_zeros(size)
            if old is not None:
                self.room[:, :, :, : old.shape[-2]] = old
        rows = torch.arange(self.count, device=self.starts.device)[self.rows]
        columns = self.starts[:, None] + torch.arange(width, device=self.starts.device)
        for half, states in zip(self.room, (key_states, value_states), strict=True):
            half[rows[:, None], :, columns] = states.transpose(1, 2).to(half.dtype)
        return tuple(self.room[:, self.rows, :, : self.end])

    def get_seq_length(self):
        return self.end

    def select(self, rows):
        self.room, self.count = self.room.index_select(1, rows), len(rows)


class _Reader:
    """Feeds texts to the model, each to the conversation (row) whose keys and values the cache holds."""

    def __init__(self, model, count):
        self.model, self.device = model, model.device
        self.lengths = torch.zeros(count, dtype=torch.long, device=self.device)  # tokens in the cache
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [RaggedLayer() for _ in self.cache.layers]
        for layer in self.cache.layers:
            layer.count = count

    def select(self, rows):
        """Keeps these rows, in this order. A row may be kept several times."""
        self.lengths = self.lengths[rows]
        for layer in self.cache.layers:
            layer.select(rows)

    def read(self, texts, rows=slice(None)):
        """The logits (rows, V) after the last token of each row's text."""
        widths = torch.tensor([len(text) for text in texts], device=self.device)
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(self.device)
        starts = self.lengths[rows]
        positions = starts[:, None] + torch.arange(ids.shape[1], device=self.device)
        end = int(starts.max()) + ids.shape[1]
        for layer in self.cache.layers:
            layer.rows, layer.starts, layer.end = rows, starts, end
        seen = torch.arange(end, device=self.device) <= positions[:, :, None]  # never the padding after a text
        if self.model.config._attn_implementation == "eager":
            seen = torch.where(seen, 0.0, torch.finfo(self.model.dtype).min)
        inputs = {"input_ids": ids, "attention_mask": seen[:, None], "position_ids": positions}
        output = self.model.get_decoder()(**inputs, past_key_values=self.cache, use_cache=True)
        last_hidden = output.last_hidden_state[torch.arange(len(texts), device=self.device), widths - 1]
        self.lengths[rows] += widths
        return self.model.get_output_embeddings()(last_hidden)

    def read_long(self, texts, rows):
        """The same, READ_TOKENS in a forward pass."""
        logits = {}
        for part in micro_batches([len(text) for text in texts], READ_TOKENS):
            index = torch.tensor([rows[i] for i in part], device=self.device)
            logits.update(zip(part, self.read([texts[i] for i in part], index), strict=True))
        return torch.stack([logits[i] for i in range(len(texts))])


def draw(logits_BV, temperature, generator) -> tuple[list[int], list[float]]:
    """A token of each row, and its log-probability. Where a uniform number falls in the cumulated distribution is the
    token, in float64: float32 would lose those below 1e-7. torch.multinomial does the same in ten times the time."""
    if not logits_BV.isfinite().all():
        raise ValueError("the policy's logits are not finite; its weights have diverged, lower the learning rate")
    logprobs_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature > 0:
        cumulated_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
        drawn_B = torch.rand(len(logits_BV), 1, generator=generator, device=logits_BV.device, dtype=torch.float64)
        tokens_B = torch.searchsorted(cumulated_BV, drawn_B * cumulated_BV[:, -1:], right=True)
        tokens_B = tokens_B.clamp(max=logits_BV.shape[1] - 1)  # the product may be rounded up to the end
    else:
        tokens_B = logprobs_BV.argmax(-1, keepdim=True)
    return tokens_B[:, 0].tolist(), logprobs_BV.gather(1, tokens_B)[:, 0].tolist()


def _play_padded(model, tokenizer, active, temperature, generator):
    """Each forward pass reads a token of every conversation: the one that it has sampled, or the next of the answer to
    its turn. When READ_SHARE of the conversations have answers, these are read at once. Equal openings are read
    once."""
    openings = [tuple(c.trajectory.token_ids) for c in active]
    distinct = sorted(set(openings))
    reader = _Reader(model, len(distinct))
    copies = torch.tensor([distinct.index(opening) for opening in openings], device=model.device)
    logits_BV = reader.read_long(distinct, range(len(distinct)))[copies]
    reader.select(copies)
    rows = list(range(len(active)))  # the conversations that the logits belong to
    sampled = [[] for _ in active]  # (token, log-probability) of the turn in progress
    pending = [[] for _ in active]  # ids to read before the next token
    while True:
        for i, token, logprob in zip(rows, *draw(logits_BV, temperature, generator), strict=True):
            if active[i].finished or pending[i]:
                continue
            sampled[i].append((token, logprob))
            pending[i] = [token]
            if token in active[i].chat.stop_ids or len(sampled[i]) == active[i].room:
                pending[i] += active[i].say(*map(list, zip(*sampled[i], strict=True)))
                sampled[i] = []
        _wait(active, pending)
        going = [i for i, c in enumerate(active) if not c.finished]
        if not going:
            return
        if len(going) <= 0.8 * len(active):  # copying the cache for each finished conversation would cost more
            active, pending, sampled = ([column[i] for i in going] for column in (active, pending, sampled))
            reader.select(torch.tensor(going, device=model.device))
        ready = [i for i, c in enumerate(active) if not c.finished and c.answer is None]
        answered = [i for i in ready if len(pending[i]) > 1]
        if len(answered) > READ_SHARE * len(ready):
            rows = answered
            logits_BV = reader.read_long([pending[i] for i in rows], rows)
            for i in rows:
                pending[i] = []
            continue
        waiting = any(c.answer is not None for c in active)
        rows = ready if waiting else list(range(len(active)))  # picking rows copies their keys and values
        index = torch.tensor(rows, device=model.device) if waiting else slice(None)
        logits_BV = reader.read([pending[i][:1] or [0] for i in rows], index)
        for i in rows:
            pending[i] = pending[i][1:]


def _wait(active, pending):
    """Adds the answers that have come to `pending`. If every conversation waits for one, blocks until one comes."""
    while True:
        for c, ids in zip(active, pending, strict=True):
            if c.answer is not None and c.answer.done():
                ids += c.hear()
        futures = [c.answer for c in active if c.answer is not None]
        if not futures or any(c.answer is None and not c.finished for c in active):
            return
        concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)


# ----------------------------------------------------------------------------------------------------- paged engine


def _play_paged(model, tokenizer, active, temperature, generator):
    """transformers' continuous batching, with one manager and so one cache for this rollout. A conversation goes on as
    soon as it is answered. Its prefixes that the cache holds, its own or another conversation's, are not read again."""
    sampling = {"do_sample": temperature > 0, "temperature": temperature or None, "top_k": 0, "top_p": 1.0}
    ends = {"eos_token_id": sorted(active[0].chat.stop_ids), "pad_token_id": tokenizer.pad_token_id or 0}
    generation = GenerationConfig(**sampling, **ends, max_new_tokens=active[0].max_new_tokens)
    known = ContinuousBatchingConfig.__dataclass_fields__
    options = {"page_size" if "page_size" in known else "block_size": PAGE}  # block_size before transformers 5.18
    if "auto_switch_to_flash" in known:
        options["auto_switch_to_flash"] = False  # the attention is the user's choice
    if model.device.type == "cpu":  # elsewhere the free memory decides
        options.update(num_blocks=sum(-(-c.max_context // PAGE) for c in active), max_batch_tokens=2048)
    if generator is not None:
        options["seed"] = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    paging = ContinuousBatchingConfig(return_logprobs=True, **options)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):  # the library seeds torch
        manager = model.init_continuous_batching(generation, paging)
        manager.start()
        try:
            _read_shared_prefixes(manager, active)
            requested = set()  # conversations whose turn the manager samples
            while not all(c.finished for c in active):
                for i, c in enumerate(active):
                    if c.answer is not None and c.answer.done():
                        c.hear()
                    if c.answer is None and not c.finished and i not in requested:
                        manager.add_request(c.trajectory.token_ids, str(i), max_new_tokens=c.room)
                        requested.add(i)
                futures = [c.answer for c in active if c.answer is not None]
                if not requested:
                    concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
                elif (result := _next_result(manager, patient=not futures)) is not None:
                    i = int(result.request_id)
                    requested.remove(i)
                    active[i].say(result.generated_tokens, result.logprobs)
        finally:
            manager.stop(block=True, hard_stop=True)


def _read_shared_prefixes(manager, active):
    """Reads what several openings share before they start, because those that start together would each read it: first
    the prefix of a domain (its policy and tools), then the openings that several samples of a task have."""
    samples = Counter((c.episode.domain, tuple(c.trajectory.token_ids)) for c in active)
    by_domain = {}
    for domain, opening in samples:
        by_domain.setdefault(domain, []).append(opening)
    of_domains = [_common_prefix(openings) for openings in by_domain.values() if len(openings) > 1]
    of_tasks = [list(opening) for (_, opening), count in samples.items() if count > 1]
    for prefixes in (of_domains, of_tasks):
        prefixes = [prefix for prefix in prefixes if len(prefix) >= PAGE]
        for i, prefix in enumerate(prefixes):  # two tokens, because the cache forgets a request's last step
            manager.add_request(prefix, f"prefix {i}", max_new_tokens=2, eos_token_id=-1)
        for _ in prefixes:
            _next_result(manager)


def _common_prefix(lists):
    columns = zip(*lists, strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


def _next_result(manager, patient=True):
    """A finished request. If not `patient`, None when there is none within 20 ms."""
    while (result := manager.get_result(timeout=1.0 if patient else 0.02)) is None:
        if not manager.is_running():
            raise RuntimeError(f"continuous batching stopped: {manager.background_thread_status.fatal_error}")
        if not patient:
            return None
    if result.error is not None:
        raise ValueError(f"paged rollouts failed: {result.error}; take fewer conversations at once, or engine padded")
    return result
