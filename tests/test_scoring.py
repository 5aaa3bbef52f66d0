"""Log-likelihoods and greedy texts of many requests at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import disturbed, english, expand_to, random_model, save, write_with_tokenizer

from llamapro_jax import UserError
from llamapro_jax.evaluation import scoring, shared_prefix
from llamapro_jax.evaluation.scoring import generate_until, loglikelihoods
from llamapro_jax.evaluation.shared_prefix import row_length
from llamapro_jax.expansion import spread
from llamapro_jax.model.api import Model, load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_model(tmp_path_factory.mktemp("scoring"))


def some_requests(model: Model, number: int = 11) -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(3)
    vocabulary, longest = model.config.vocab_size, model.config.max_position_embeddings

    def ids(most: int) -> list[int]:
        return random.integers(0, vocabulary, random.integers(1, most)).tolist()

    # The last one is too long and loses its beginning.
    pairs = [(ids(16), ids(16)) for _ in range(number)]
    return [*pairs, (ids(9) * longest, ids(9))]


def by_hand(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    longest = model.config.max_position_embeddings
    tokens = (context + continuation)[-(longest + 1) :]
    end = len(tokens) - 1
    padded = tokens[:-1] + [0] * (longest - end)  # one length, compiled once
    scores = np.asarray(model.logits([padded]), np.float64)[0, end - len(continuation) : end]
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return (
        float(log_p[np.arange(len(continuation)), continuation].sum()),
        bool((scores.argmax(-1) == continuation).all()),
    )


def greedy_continuation(model: Model, context: list[int], tokens: int) -> list[int]:
    made: list[int] = []
    for end in range(len(context), len(context) + tokens):
        padded = (context + made + [0] * 64)[: model.config.max_position_embeddings]
        made.append(int(np.asarray(model.logits([padded]))[0, end - 1].argmax()))
    return made


def test_each_request_is_what_its_own_logits_say(model: Model) -> None:
    requests = some_requests(model)
    requests.append(([1, 5, 9], greedy_continuation(model, [1, 5, 9], 3)))
    results = loglikelihoods(model, requests, batch_size=3)
    for (log_p, greedy), request in zip(results, requests, strict=True):
        expected, is_greedy = by_hand(model, *request)
        assert log_p == pytest.approx(expected, abs=1e-4)
        assert greedy is is_greedy
    assert results[-1][1] and not results[0][1]
    assert loglikelihoods(model, []) == []


@pytest.mark.parametrize("batch_size", [1, 32])
def test_neither_the_batch_nor_the_order_changes_a_figure(
    batch_size: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = some_requests(model)
    expected = dict(enumerate(loglikelihoods(model, requests, batch_size=3)))
    monkeypatch.setattr(scoring, "SCORES_AT_ONCE", 7)
    order = np.random.default_rng(0).permutation(len(requests)).tolist()
    results = loglikelihoods(model, [requests[i] for i in order], batch_size=batch_size)
    for i, (log_p, greedy) in zip(order, results, strict=True):
        assert log_p == pytest.approx(expected[i][0], abs=1e-4) and greedy is expected[i][1]


def test_requests_that_differ_in_the_last_token_are_one_row(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    states = scoring._states
    monkeypatch.setattr(
        scoring, "_states", lambda *a, **k: calls.append(a[2].shape) or states(*a, **k)
    )
    context = [1, 7, 3, 2]
    results = loglikelihoods(model, [(context, [i]) for i in range(40)], batch_size=2)
    assert calls == [(2, 16)]
    scores = np.asarray(model.logits([context]), np.float64)[0, -1]
    log_p = scores - np.log(np.exp(scores).sum())
    np.testing.assert_allclose([r[0] for r in results], log_p[:40], atol=1e-5)


def test_without_the_new_blocks_it_is_the_base(tmp_path: Path) -> None:
    base = random_model(tmp_path / "a")
    grown = random_model(tmp_path / "b", spread(4, 2))
    requests = some_requests(base)[:3]
    expected = loglikelihoods(base, requests, batch_size=3)
    assert loglikelihoods(grown, requests, batch_size=3, new_blocks=False) == expected
    assert loglikelihoods(grown, requests, batch_size=3) != expected


@pytest.mark.parametrize(
    ("beginnings", "window", "new_blocks"),
    [(1, None, True), pytest.param(2, 12, False, marks=pytest.mark.slow)],
)
def test_a_beginning_that_rows_share_goes_through_the_model_once(
    beginnings: int,
    window: int | None,
    new_blocks: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    model = random_model(tmp_path, spread(4, 2), **changes)
    random = np.random.default_rng(5)

    def ids(count: int) -> list[int]:
        return random.integers(0, model.config.vocab_size, count).tolist()

    first, second = ids(37), ids(21)
    requests = [(first + ids(1 + n % 3), ids(2)) for n in range(9)]
    requests += [(first, ids(3)), (ids(30), ids(4)), (ids(2), ids(1))]
    if beginnings == 2:
        requests += [(second + ids(n % 5), ids(1 + n % 3)) for n in range(12)]
    order = random.permutation(len(requests)).tolist()
    requests = [requests[i] for i in order]
    expected = loglikelihoods(model, requests, new_blocks=new_blocks)
    calls = []
    states, prefill = shared_prefix._states_after, shared_prefix._prefill
    monkeypatch.setattr(
        shared_prefix, "_states_after", lambda *a: calls.append("after") or states(*a)
    )
    monkeypatch.setattr(
        shared_prefix, "_prefill", lambda *a: calls.append(int(a[3])) or prefill(*a)
    )
    monkeypatch.setattr(shared_prefix, "SHORTEST", 8)
    monkeypatch.setattr(shared_prefix, "TOKENS_AT_ONCE", 16)
    results = loglikelihoods(model, requests, batch_size=3, new_blocks=new_blocks)
    # The last token of a context predicts: 36 tokens are padded to 48, 20 to 32.
    assert [call for call in calls if call != "after"] == [12] * beginnings
    assert calls.count("after") > 2 * beginnings
    for (log_p, greedy), (value, is_greedy) in zip(results, expected, strict=True):
        assert log_p == pytest.approx(value, abs=1e-4) and greedy is is_greedy


def test_short_or_few_beginnings_are_not_worth_it() -> None:
    def row(shared: int, rest: int) -> shared_prefix.Row:
        return shared_prefix.Row((*[1] * shared, rest, rest), [(0, shared + 1, [rest])])

    def lengths(rows: list[shared_prefix.Row]) -> tuple[list[int], list[tuple[int, int]]]:
        alone, together = shared_prefix.split(rows)
        return [len(r.tokens) for r in alone], [(n, len(batch)) for n, batch in together]

    assert lengths([row(200, i) for i in range(2, 4)]) == ([202, 202], [])
    assert lengths([row(200, i) for i in range(2, 10)]) == ([], [(200, 8)])
    assert lengths([row(100, i) for i in range(2, 10)]) == ([102] * 8, [])
    assert lengths([row(9, 2), row(11, 2), row(10, 2)]) == ([13, 12, 11], [])


@pytest.mark.parametrize(("tokens", "length"), [(1, 16), (17, 32), (33, 48), (49, 64), (65, 96)])
def test_rows_have_few_lengths(tokens: int, length: int) -> None:
    assert row_length(tokens) == length


def test_rows_are_never_shorter_than_their_tokens() -> None:
    lengths = {n: row_length(n) for n in range(1, 5000)}
    assert all(n <= length for n, length in lengths.items()) and len(set(lengths.values())) < 20


@pytest.mark.parametrize(
    ("requests", "options", "message"),
    [
        ([([], [1])], {}, "request 0: has no context; .* begin token"),
        ([([1], [2]), ([1], [])], {}, "request 1: has no token to score"),
        ([([1], [2] * 9)], {"max_length": 8}, "request 0: has 9 tokens to score, more than the 8"),
        ([([1], [101])], {}, "id 101 is not in the vocabulary, which has 101"),
        ([([1], [2])], {"max_length": 65}, "max_length is 65; this model takes 1 to 64"),
        ([([1], [2])], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_requests_that_cannot_be_scored(
    requests: list, options: dict, message: str, model: Model
) -> None:
    with pytest.raises(UserError, match=message):
        loglikelihoods(model, requests, **options)


@pytest.mark.slow
def test_log_likelihoods_are_those_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = write_with_tokenizer(tmp_path / "base")
    ours = disturbed(load(str(expand_to(path, tmp_path / "grown"))))
    model = transformers.AutoModelForCausalLM.from_pretrained
    theirs = model(str(save(ours, tmp_path / "model"))).eval()
    tokenizer = ours.require_tokenizer()
    ids = [tokenizer.encode(english(seed, 12)) for seed in range(6)]
    requests = [(one[: 3 + i], one[3 + i :]) for i, one in enumerate(ids)]
    for (context, continuation), (log_p, _) in zip(
        requests, loglikelihoods(ours, requests, batch_size=4), strict=True
    ):
        tokens = torch.tensor([context + continuation])
        with torch.no_grad():
            scores = theirs(tokens).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
        expected = scores.gather(-1, tokens[0, len(context) :, None]).sum().item()
        assert log_p == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------- greedy texts


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model with a tokenizer, of which one cannot tell the end by an id."""
    path = write_with_tokenizer(tmp_path_factory.mktemp("speaker") / "base")
    return load(str(path))


@pytest.fixture(scope="module")
def prompts(speaker: Model) -> list[list[int]]:
    tokenizer = speaker.require_tokenizer()
    return [tokenizer.encode(english(seed, words).strip()) for seed, words in enumerate((2, 8, 5))]


def said(speaker: Model, prompt: list[int], ids: list[int]) -> str:
    """The text of the ids as it stands behind the prompt."""
    decoder = speaker.require_tokenizer().stream_decoder()
    for token in prompt:
        decoder.push(token)
    return "".join(map(decoder.push, ids)) + decoder.flush()


def test_texts_of_a_batch_are_those_generated_alone(
    speaker: Model, prompts: list[list[int]]
) -> None:
    texts = generate_until(speaker, prompts, max_tokens=8, batch_size=2)
    assert len({len(prompt) for prompt in prompts}) == 3
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == said(speaker, prompt, speaker.generate(prompt, max_tokens=8)) != ""


def test_texts_end_before_the_first_of_the_stops(speaker: Model, prompts: list[list[int]]) -> None:
    whole = generate_until(speaker, prompts[:2], max_tokens=8, batch_size=2)[1]
    late, early = whole[5:7], whole[2:4]
    expected = whole[: min(whole.find(late), whole.find(early))]
    options = {"max_tokens": 8, "until": [late, early], "batch_size": 2}
    assert generate_until(speaker, prompts[:2], **options)[1] == expected


def test_an_end_token_ends_a_text_and_not_the_others(
    speaker: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [speaker.generate(prompt, max_tokens=6) for prompt in prompts]
    end = ids[0][3]
    monkeypatch.setattr(scoring, "stop_ids", lambda model: {end})
    texts = generate_until(speaker, prompts, max_tokens=6, batch_size=2)
    for i, text in enumerate(texts):
        kept = ids[i][: ids[i].index(end)] if end in ids[i] else ids[i]
        assert text == said(speaker, prompts[i], kept)


def test_a_long_prompt_loses_its_beginning(speaker: Model, prompts: list[list[int]]) -> None:
    long = [i for prompt in prompts * 4 for i in prompt]
    assert len(long) > 64
    options = {"max_tokens": 8, "batch_size": 2}
    expected = generate_until(speaker, [long[-56:]], **options)
    assert generate_until(speaker, [long], **options) == expected
    shorter = generate_until(speaker, [long[-12:]], **options)
    assert generate_until(speaker, [long], max_length=20, **options) == shorter


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt 0: is empty; give it the begin token"),
        ([999], {}, "id 999 is not in the vocabulary"),
        ([1], {"max_tokens": 64}, "max_tokens is 64; it must be from 1 to 63"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1], {"until": ["a", ""]}, "until: holds an empty string"),
    ],
)
def test_texts_that_cannot_be_made(
    prompt: list[int], options: dict, message: str, speaker: Model
) -> None:
    with pytest.raises(UserError, match=message):
        generate_until(speaker, [prompt], **{"max_tokens": 4, **options})
