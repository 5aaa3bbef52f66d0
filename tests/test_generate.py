"""Generation: the cache against the full forward pass, sampling, programs, and the verb."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_tiny, write_torch
from models import random_model, write_with_tokenizer

from llamapro_jax import UserError, cli, generate
from llamapro_jax.data.chat import LLAMA_PRO
from llamapro_jax.expansion import spread
from llamapro_jax.generate import padded_length, stop_ids
from llamapro_jax.hf.tokenizer import with_template
from llamapro_jax.model import api
from llamapro_jax.model.api import Model, load
from llamapro_jax.sampling import Sampling, choose

PROMPT = [5, 17, 90, 3, 44]
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4}
NO_END = {"eos_token_id": "absent"}


def without_cache(model: Model, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens by a full forward pass for each."""
    tokens = list(prompt)
    for _ in range(count):
        # Padding after a token does not change its logits; one length compiles once.
        row = tokens + [0] * (len(prompt) + count - len(tokens))
        scores = model.logits([row])
        tokens.append(int(jnp.argmax(scores[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("insertions", "changes"),
    [
        ((), {}),
        ((), {"num_key_value_heads": 1, "attention_bias": True}),
        ((), MISTRAL),
        (spread(4, 2), {"tie_word_embeddings": True}),
        (spread(4, 4, 2), MISTRAL),
    ],
)
def test_greedy_tokens_are_those_of_the_full_forward_pass(
    insertions: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(tmp_path, insertions, **NO_END, **changes)
    # 5 + 20 tokens cross from a padded prompt of 16 to a cache of 32.
    expected = without_cache(model, PROMPT, 20)
    assert len(set(expected)) > 3  # the comparison means something
    assert model.generate(PROMPT, max_tokens=20) == expected


def test_without_new_blocks_the_base_generates(tmp_path: Path) -> None:
    model = random_model(tmp_path, spread(4, 2), **NO_END)
    off = model.generate(PROMPT, max_tokens=12, new_blocks=False)
    assert off == load(str(tmp_path / "base")).generate(PROMPT, max_tokens=12)
    assert off != model.generate(PROMPT, max_tokens=12)


def test_padding_of_the_prompt_is_never_seen(tmp_path: Path) -> None:
    model = random_model(tmp_path, **NO_END)
    long = [int(i) for i in np.random.default_rng(0).integers(0, 101, 31)]
    for length in (1, 15, 16, 17, 31):
        prompt = long[:length]
        assert model.generate(prompt, max_tokens=6) == without_cache(model, prompt, 6)


@pytest.mark.parametrize("mistral", [False, True])
def test_greedy_tokens_are_those_of_transformers(mistral: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    changes: dict[str, Any] = {"attention_bias": "absent", "mlp_bias": "absent", **MISTRAL}
    model = write_torch(tmp_path / "model", **(changes if mistral else {}))
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, pad_token_id=0
        )[0, len(PROMPT) :].tolist()
    ours = load(str(tmp_path / "model")).generate(PROMPT, max_tokens=16)
    assert ours == [token for token in expected if token != 2]
    assert len(set(ours)) > 3


def test_it_stops_before_an_end_token_and_after_max_tokens(tmp_path: Path) -> None:
    model = random_model(tmp_path, **NO_END)
    free = model.generate(PROMPT, max_tokens=8)
    assert len(free) == 8 and model.generate(PROMPT, max_tokens=3) == free[:3]
    assert model.generate(PROMPT, max_tokens=1) == free[:1]
    end = free[4]
    stopped = generate.stream_tokens(model, PROMPT, max_tokens=8, stops=[99, end])
    assert list(stopped) == free[: free.index(end)]
    for where in ("config.json", "generation_config.json"):
        path = tmp_path / "base" / where
        before = path.read_text() if path.exists() else None
        values = json.loads(before) if before else {}
        path.write_text(json.dumps({**values, "eos_token_id": [99, end]}))
        again = load(str(tmp_path / "base"))
        assert stop_ids(again) == {99, end}
        assert again.generate(PROMPT, max_tokens=8) == free[: free.index(end)]
        path.write_text(before) if before else path.unlink()


def test_length_is_checked_against_the_positions_of_the_model(tmp_path: Path) -> None:
    model = random_model(tmp_path, **NO_END)
    assert len(model.generate(PROMPT)) == 64 - 5  # less than the default of 128 fits
    assert len(model.generate(PROMPT, max_tokens=59)) == 59
    with pytest.raises(UserError, match="5 tokens and max_tokens is 60.*64 pos.*max_tokens 59"):
        model.generate(PROMPT, max_tokens=60)
    with pytest.raises(UserError, match="the prompt has 64 tokens.*shorten the prompt"):
        model.generate([1] * 64)
    with pytest.raises(UserError, match="max_tokens is 0"):
        model.generate(PROMPT, max_tokens=0)
    with pytest.raises(UserError, match="id 101 is not in the vocabulary"):
        model.generate([1, 101])
    with pytest.raises(UserError, match=r"shape \[1, 0\]"):
        model.generate([])


def test_programs_are_few_and_settings_cost_none(tmp_path: Path) -> None:
    model = random_model(tmp_path, spread(4, 2), max_position_embeddings=128, **NO_END)

    def programs() -> tuple[int, int]:
        return generate._prefill._cache_size(), generate._decode._cache_size()

    prefill, decode = programs()
    for length in range(1, 17):
        model.generate([1] * length, max_tokens=16)
        model.generate([1] * length, max_tokens=5, temperature=0.1 * length, top_k=length, seed=1)
    # One padded prompt, caches of 16 and 32.
    assert programs() == (prefill + 1, decode + 2)
    model.generate([1] * 100, max_tokens=4)
    assert programs() == (prefill + 2, decode + 3)


def test_padded_lengths_are_few_and_waste_little() -> None:
    lengths = [padded_length(n) for n in range(1, 5000)]
    assert all(padded >= n for n, padded in enumerate(lengths, start=1))
    assert lengths == sorted(lengths) and len(set(lengths)) == 7 + 4
    assert padded_length(1) == 16 and padded_length(1025) == 2048


# ------------------------------------------------------------------ sampling


def drawn(scores: Any, sampling: Sampling, count: int = 4000) -> np.ndarray:
    scores_V = jnp.asarray(scores, jnp.float32)
    draw = sampling.draw(len(scores))
    one = jax.jit(lambda position: choose(scores_V, draw.at(position)))
    return np.asarray(jax.vmap(one)(jnp.arange(count)))


def shares(ids: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(ids, minlength=size) / len(ids)


PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


def test_temperature_one_draws_from_the_model_s_distribution() -> None:
    ids = drawn(np.log(PROBABILITIES), Sampling(temperature=1.0))
    np.testing.assert_allclose(shares(ids, 5), PROBABILITIES, atol=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    for temperature in (0.5, 2.0):
        expected = PROBABILITIES ** (1 / temperature)
        ids = drawn(np.log(PROBABILITIES), Sampling(temperature=temperature))
        np.testing.assert_allclose(shares(ids, 5), expected / expected.sum(), atol=0.03)


def test_top_k_and_top_p_keep_the_best_and_no_others() -> None:
    scores = np.log(PROBABILITIES)
    three = np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85
    np.testing.assert_allclose(shares(drawn(scores, Sampling(1.0, top_k=3)), 5), three, atol=0.03)
    # 0.4 + 0.3 does not reach 0.71, with 0.15 it does.
    nucleus = shares(drawn(scores, Sampling(1.0, top_p=0.71)), 5)
    np.testing.assert_allclose(nucleus, three, atol=0.03)
    # Of the three best, 0.4 / 0.85 alone does not reach 0.5, but two do.
    both = drawn(scores, Sampling(1.0, top_k=3, top_p=0.5))
    np.testing.assert_allclose(shares(both, 5), np.array([0, 0.4, 0, 0.3, 0]) / 0.7, atol=0.03)


def test_a_choice_of_one_is_the_greedy_one() -> None:
    scores = [0.5, 2.0, 2.0, 1.0]  # of equal scores the first
    for sampling in (Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6)):
        assert set(drawn(scores, sampling, 200)) == {1}


def test_tokens_drawn_are_reproducible_for_a_seed(tmp_path: Path) -> None:
    model = random_model(tmp_path, **NO_END)
    greedy = model.generate(PROMPT, max_tokens=10)
    assert model.generate(PROMPT, max_tokens=10, temperature=1.0, top_k=1) == greedy
    assert model.generate(PROMPT, max_tokens=10, temperature=1.0, top_p=1e-6) == greedy
    options = {"max_tokens": 10, "temperature": 1.5}
    first = model.generate(PROMPT, seed=1, **options)
    assert first == model.generate(PROMPT, seed=1, **options)
    assert first != model.generate(PROMPT, seed=2, **options) and first != greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options)


# ----------------------------------------------------------- text and the verb


def test_pieces_of_text_continue_the_prompt_with_their_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(write_with_tokenizer(tmp_path / "model")))
    prompt, rest = "the cat sat", " on a mat; caf\u00e9 \u2603!"
    before, whole = (model.tokenizer.encode(text) for text in (prompt, prompt + rest))
    assert whole[: len(before)] == before
    monkeypatch.setattr(
        generate, "stream_tokens", lambda model, ids, **options: iter(whole[len(ids) :])
    )
    pieces = list(model.stream(prompt))
    assert "".join(pieces) == rest == model.generate(prompt)
    # The snowman is three byte tokens and comes out whole.
    assert len(pieces) > 5 and all(pieces) and "\ufffd" not in "".join(pieces)


def test_an_empty_prompt_starts_from_the_begin_token(tmp_path: Path) -> None:
    model = load(str(write_with_tokenizer(tmp_path / "model")))
    assert model.generate("", max_tokens=4) != ""
    nothing = replace(model, tokenizer=replace(model.tokenizer, bos_id=None))
    with pytest.raises(UserError, match="the prompt is empty"):
        nothing.generate("")


def test_the_verb_prints_the_prompt_and_what_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_with_tokenizer(tmp_path / "model"))
    assert cli.main(["generate", path, "the cat", "--max-tokens", "8"]) == 0
    expected = load(path).generate("the cat", max_tokens=8)
    assert capsys.readouterr().out == f"the cat{expected}\n"
    options = ["--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--seed", "3"]
    assert cli.main(["generate", path, "the cat", "--max-tokens", "8", *options]) == 0
    expected = load(path).generate(
        "the cat", max_tokens=8, temperature=1.5, top_k=40, top_p=0.9, seed=3
    )
    assert capsys.readouterr().out == f"the cat{expected}\n"


def test_the_verb_prints_the_answer_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_with_tokenizer(tmp_path / "model", max_position_embeddings=128)
    with_template(path, LLAMA_PRO)
    model, asked = load(str(path)), [{"role": "user", "content": "the cat</s>"}]
    ids = generate.chat_ids(model, asked)
    assert model.tokenizer.decode(ids) == "<|user|>\nthe cat</s>\n<|assistant|>\n"
    assert ids.count(model.tokenizer.bos_id) == 1 and model.tokenizer.eos_id not in ids
    expected = "".join(generate.stream_answer(model, asked, max_tokens=6))
    assert cli.main(["generate", str(path), "the cat</s>", "--chat", "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == expected + "\n" != "\n"

    def answer(model: Model, prompt: Any, *, stops: Any, **options: Any) -> Any:
        assert list(prompt) == ids and tuple(stops) == (model.tokenizer.eos_id,)
        return iter(model.tokenizer.encode("on a mat", bos=False))

    monkeypatch.setattr(generate, "stream_tokens", answer)
    assert cli.main(["generate", str(path), "the cat</s>", "--chat"]) == 0
    assert capsys.readouterr().out.strip() == "on a mat"


def test_messages_that_the_template_refuses_are_an_error(tmp_path: Path) -> None:
    path = write_with_tokenizer(tmp_path / "model")
    with_template(path, LLAMA_PRO + "{{ raise_exception('a third') if messages | length > 2 }}")
    model = load(str(path))
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with pytest.raises(UserError, match="the conversation cannot be rendered.*a third"):
        generate.stream_answer(model, turns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["without", "the cat"], "looked for tokenizer.json and tokenizer.model"),
        (["without", "the cat", "--chat"], "looked for tokenizer.json and tokenizer.model"),
        (["with", "the cat", "--chat"], "has no chat template"),
        (["with", "the cat", "--generations", "1"], "generation 1 does not exist"),
        (["with", "the cat", "--strength", "nan"], "strength is nan"),
        (["with", "the cat", "--max-tokens", "0"], "max_tokens is 0"),
        (["with", "the cat", "--max-tokens", "64"], "more than the model's 64 positions"),
        (["with", "the cat", "--temperature", "nan"], "temperature is nan"),
    ],
)
def test_the_verb_refuses_before_it_reads_weights(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tiny(tmp_path / "without")
    write_with_tokenizer(tmp_path / "with")
    monkeypatch.setattr(api, "load_params", None)
    model, *rest = arguments
    assert cli.main(["generate", str(tmp_path / model), *rest]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
