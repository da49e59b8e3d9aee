"""policy.py: loading, LoRA, shards, snapshots, and log-probabilities against the plain way."""

import copy
import json
import shutil

import pytest
import torch
from ranks import on_two_ranks

import policy
from distributed import rank
from policy import load_policy, token_logprobs

IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(1))
ONES = torch.ones_like(IDS)
MASK = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(2)) < 0.6
MASK[:, 0] = False


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """The directory of the saved embedded policy."""
    folder = tmp_path_factory.mktemp("base")
    policy.save_policy(*tiny, folder)
    return str(folder)


def load(path, **settings):
    return load_policy(str(path), **{"dtype": "float32", "device": "cpu", **settings})[0]


def scores(model):
    return token_logprobs(model, IDS, ONES).detach()


def gradient_of(model, values):
    model.zero_grad()
    values.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@torch.no_grad()
def move(model, by=0.1):
    for p in policy.trained_parameters(model).values():
        p.add_(policy.placed_like(torch.full(p.shape, by), p))


def test_the_embedded_policy_is_the_same_each_time_and_when_loaded_again(base):
    """To the last bit of log-probabilities and gradients."""
    models = [load(path) for path in ("tiny", "tiny", base)]
    logprobs = [token_logprobs(model, IDS, ONES) for model in models]
    gradients = [gradient_of(*pair) for pair in zip(models, logprobs, strict=True)]
    for k in (1, 2):
        assert torch.equal(logprobs[k], logprobs[0]) and torch.equal(gradients[k], gradients[0])


def test_a_saved_tokenizer_is_loaded_again(tiny, base):
    again = load_policy(base, "float32", "cpu")[1]
    text = 'Hi! <tool_call>\n{"name": "f", "arguments": {"id": "#W12"}}\n</tool_call> 🙂'
    assert again(text).input_ids == tiny[1](text).input_ids and again.chat_template == tiny[1].chat_template
    assert again.decode(again(text).input_ids) == text


def test_attention_can_be_chosen(tiny):
    eager = load("tiny", attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(scores(eager), scores(tiny[0]))


@pytest.mark.parametrize(
    "path, settings, message",
    [
        ("/no/such", {}, "cannot load a model from '/no/such': there is no such directory"),
        ("./no", {}, "no such directory"),
        ("tiny", {"dtype": "float31"}, "unknown dtype 'float31'; choose one of float32, bfloat16"),
        ("tiny", {"attn_implementation": "none_such"}, "cannot load a model from 'tiny'"),
        ("tiny", {"lora_rank": -1}, "lora_rank must be 0"),
        ("tiny", {"lora_rank": 500}, "at most the model's width of 128, got 500"),
    ],
)
def test_bad_settings_are_named(path, settings, message):
    with pytest.raises(ValueError, match=message):
        load(path, **settings)


SLIDING = {"layer_types": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("config.json", SLIDING, "rollouts need full attention in every layer"),
        ("config.json", {"final_logit_softcapping": 30.0}, "models with final_logit_softcapping are not supported"),
        ("adapter_config.json", {"base_model_name_or_path": "/no/base"}, "its base model /no/base is not there"),
        ("model.safetensors", None, "cannot load a model from"),
        ("tokenizer.json", {"type": "\ud800"}, "cannot load a model from"),
    ],
)
def test_models_that_cannot_be_used_are_named(base, file, change, message, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    old = (folder / file).read_bytes() if (folder / file).exists() else b"{}"
    (folder / file).write_bytes(old[:1000] if change is None else json.dumps({**json.loads(old), **change}).encode())
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    """(a model with trained adapters, their directory)."""
    model, tokenizer = load_policy(base, "float32", "cpu", lora_rank=4)
    optimizer = torch.optim.AdamW(policy.trained_parameters(model).values(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        (-token_logprobs(model, IDS, ONES).sum()).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("adapter")
    policy.save_policy(model, tokenizer, folder)
    return model, folder


def test_adapters_change_nothing_at_first(tiny, base):
    model = load(base, lora_rank=4)
    torch.testing.assert_close(scores(model), scores(tiny[0]))
    names = list(policy.trained_parameters(model))
    assert names and all("lora_" in name and "embed" not in name and "lm_head" not in name for name in names)


def test_lora_trains_its_adapters_alone(tiny, lora):
    assert scores(lora[0]).sum() > scores(tiny[0]).sum() + 0.1
    frozen = {n.replace(".base_layer", ""): p for n, p in lora[0].named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, frozen[name]) for name, p in tiny[0].named_parameters())


def test_without_its_adapters_the_model_is_the_reference(tiny, lora):
    trained, after = policy.trained_parameters(lora[0]), scores(lora[0])
    with policy.weights_of(lora[0], None):
        torch.testing.assert_close(scores(lora[0]), scores(tiny[0]))
    assert torch.equal(scores(lora[0]), after) and all(p.requires_grad for p in trained.values())


def test_a_saved_adapter_is_loaded_to_train_on_or_to_evaluate(lora):
    model, folder = lora
    assert not (folder / "model.safetensors").exists()
    for rank_ in (4, 0):
        torch.testing.assert_close(scores(load(folder, lora_rank=rank_)), scores(model))
    trained = policy.trained_parameters(model)
    for name, p in policy.trained_parameters(load(folder, dtype="bfloat16", lora_rank=4)).items():
        assert torch.equal(p, trained[name])  # no bit of the float32 adapters is lost
    with pytest.raises(ValueError, match="the saved adapter has rank 4, not 8"):
        load(folder, lora_rank=8)


@pytest.mark.parametrize("lora_rank, frozen", [(0, set()), (2, {torch.bfloat16})])
def test_bfloat16_trains_float32_weights_and_lora_keeps_the_frozen_ones_small(base, lora_rank, frozen):
    model = load(base, dtype="bfloat16", lora_rank=lora_rank)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == frozen
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_weights_of_a_snapshot_are_exchanged_and_come_back_whatever_happens(tiny):
    model = copy.deepcopy(tiny[0])
    then, before = policy.snapshot(model), scores(model)
    move(model)
    now = policy.snapshot(model)
    with pytest.raises(KeyError), policy.weights_of(model, then):
        assert torch.equal(scores(model), before)
        raise KeyError
    whole = policy.gathered_snapshot(model, then)
    again = policy.snapshot_from(model, whole.__getitem__)
    for name, p in model.named_parameters():
        assert torch.equal(p, now[name])
        assert all(torch.equal(saved[name], tiny[0].get_parameter(name)) for saved in (then, whole, again))


def test_shards_need_ranks():
    with pytest.raises(ValueError, match="torchrun"):
        policy.shard(load("tiny"))


def computed(base, folder, shard) -> dict:
    """What must be equal of a whole model and of one that is sharded over two ranks, each with one sequence."""
    model, tokenizer = load_policy(base, "float32", "cpu")
    mine = slice(rank(), None, 2) if shard else slice(None)
    if shard:
        policy.shard(model)
    then = policy.snapshot(model)
    move(model, 0.01)
    token_logprobs(model, IDS[mine], ONES[mine]).sum().backward()
    found = {f"gradient {n}": policy.whole(p.grad) for n, p in policy.trained_parameters(model).items()}
    twin = policy.plain_copy(model, torch.float32)
    assert not any(p.requires_grad for p in twin.parameters())
    found |= {"scores": scores(model), "copy": scores(twin)}
    with policy.weights_of(model, then):
        found["scores then"] = scores(model)
    weights = policy.gathered_weights(model)
    if rank() == 0:
        policy.save_policy(model, tokenizer, folder, weights)
    assert policy.is_sharded(model) == shard and policy.rank_share(torch.ones(())) == (0.5 if shard else 1.0)
    return found


def test_a_sharded_model_computes_and_saves_what_a_whole_one_does(base, tmp_path):
    ranks = on_two_ranks(computed, tmp_path, base, str(tmp_path / "sharded"), True)
    whole = computed(base, tmp_path / "whole", False)
    for found in ranks:
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(scores(load(tmp_path / name)) for name in ("whole", "sharded")))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_agree_with_the_plain_way(tiny, temperature):
    attention, expected = ONES.clone(), torch.zeros(IDS.shape)
    attention[1, 8:] = 0
    for b, length in enumerate((17, 8)):
        logits = tiny[0](input_ids=IDS[b : b + 1, :length]).logits[0].double() / temperature
        expected[b, 1:length] = logits.log_softmax(-1)[:-1].gather(1, IDS[b, 1:length, None])[:, 0]
    torch.testing.assert_close(token_logprobs(tiny[0], IDS, attention, temperature), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype, tolerance, size", [("float32", 1e-6, 1e-5), ("bfloat16", 0.02, 0.02)])
def test_chunks_computed_again_give_the_plain_gradient_and_entropy(dtype, tolerance, size, monkeypatch):
    """Three tokens a chunk, and layers computed again too, against all logits at once."""
    plain = load("tiny", dtype=dtype)
    with policy.autocast(plain):
        logits = plain(input_ids=IDS, attention_mask=ONES).logits
    distribution = (logits[:, :-1].float() / 0.7).log_softmax(-1)
    expected = distribution.gather(-1, IDS[:, 1:, None])[..., 0] * MASK[:, 1:]
    expected_entropy = torch.distributions.Categorical(logits=distribution.detach()).entropy() * MASK[:, 1:]
    monkeypatch.setattr(policy, "CHUNK", 3 * plain.config.vocab_size)
    model = load("tiny", dtype=dtype, gradient_checkpointing=True)
    found, entropy = token_logprobs(model, IDS, ONES, 0.7, MASK, return_entropy=True)
    torch.testing.assert_close(found[:, 1:], expected, atol=tolerance, rtol=size)
    torch.testing.assert_close(entropy[:, 1:], expected_entropy, atol=tolerance, rtol=size)
    assert not entropy.requires_grad and not model.training
    gradient = gradient_of(plain, expected)
    assert (gradient_of(model, found) - gradient).norm() < size * gradient.norm()


def test_chunks_keep_no_logits_for_the_backward_pass(tiny, monkeypatch):
    kept, vocabulary = [], tiny[0].config.vocab_size
    monkeypatch.setattr(policy, "CHUNK", 3 * vocabulary)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda shape: None):
        token_logprobs(tiny[0], IDS, ONES)
    assert kept and not any(shape and shape[-1] == vocabulary for shape in kept)


@pytest.fixture
def teacher(tiny):
    """(a model whose head has a bias, is trained, and is not tied to the embedding; two tokens of a conversation)."""
    model = copy.deepcopy(tiny[0])
    model.set_output_embeddings(torch.nn.Linear(model.config.hidden_size, model.config.vocab_size))
    return model, (IDS[:1, :4], torch.tensor([[0, 1, 0, 1]]))


def test_a_frozen_head_is_a_copy_unless_the_head_is_not_trained(teacher):
    head, frozen = teacher[0].get_output_embeddings(), policy.frozen_head(teacher[0])
    assert not any(p.requires_grad for p in frozen.parameters())
    assert frozen.weight.data_ptr() != head.weight.data_ptr() and torch.equal(frozen.bias, head.bias)
    assert policy.frozen_head(teacher[0].requires_grad_(False)) is head


@pytest.mark.parametrize("small, given, threads", [(10**7, None, 1), (10**7, "2", 2), (10**5, None, 2)])
def test_a_small_model_takes_one_thread_unless_told_otherwise(small, given, threads, monkeypatch):
    monkeypatch.setattr(policy, "SMALL", small)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        policy.load_policy("tiny", "float32", "cpu")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_weights_of_bfloat16_are_trained_as_such_and_need_to_be_computed_with(tmp_path):
    model, tokenizer = policy.load_policy("tiny", "bfloat16", "cpu", weights_dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = torch.arange(3, 15)[None]
    (-policy.token_logprobs(model, ids, torch.ones_like(ids)).sum()).backward()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    before = policy.snapshot(model)
    optimizer.step()
    moments = next(iter(optimizer.state.values()))
    assert moments["exp_avg"].dtype == torch.bfloat16
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    policy.save_policy(model, tokenizer, tmp_path)
    again, _ = policy.load_policy(str(tmp_path), "bfloat16", "cpu", weights_dtype="bfloat16")
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    with pytest.raises(ValueError, match="weights_dtype bfloat16 needs model_dtype bfloat16, got float32"):
        policy.load_policy("tiny", "float32", "cpu", weights_dtype="bfloat16")
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        policy.load_policy("tiny", weights_dtype="float8")
