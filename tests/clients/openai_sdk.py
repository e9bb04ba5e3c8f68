"""The real OpenAI SDK against a running gateway: what its users see, errors included.

Usage: openai_sdk.py BASE_URL SOCKET [KEYED_BASE_URL]

BASE_URL is the gateway's http://host:port, SOCKET the daemon's (named in messages only), KEYED_BASE_URL a second
gateway that was started with --api-key; without it the 401 is not tried. Exits 1 if anything failed.
"""

import sys
import time
import urllib.request

import openai

from cases import raises, run

BASE_URL, SOCKET = sys.argv[1].rstrip("/"), sys.argv[2]
KEYED_BASE_URL = sys.argv[3].rstrip("/") if len(sys.argv) > 3 else None
MESSAGES = [{"role": "user", "content": "Tell me a short story about a little dog named Pip."}]
client = openai.OpenAI(base_url=BASE_URL + "/v1", api_key="not-needed", max_retries=0, timeout=120)


def models():
    listed = client.models.list().data
    assert listed, "no model is listed"
    assert client.models.retrieve(listed[0].id).id == listed[0].id


def completion():
    answer = client.chat.completions.create(model="local", messages=MESSAGES, max_tokens=30, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert "Pip" in answer.choices[0].message.content, answer
    assert answer.choices[0].finish_reason == "length", answer
    assert answer.usage.completion_tokens == 30, answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 30, answer.usage


def streamed_completion():
    options = dict(model="local", messages=MESSAGES, max_tokens=30, temperature=0)
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert all(chunk.choices for chunk in chunks), "a chunk without choices although no usage was asked for"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


def usage_chunk():
    chunks = list(client.chat.completions.create(
        model="local", messages=MESSAGES, max_tokens=7, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 7, chunks[-1]
    assert all(chunk.usage is None for chunk in chunks[:-1])


def stop_string():
    answer = client.chat.completions.create(model="local", messages=MESSAGES, max_tokens=200, temperature=0, stop=["Pip"])
    assert "Pip" not in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop", answer


def log_probabilities():
    answer = client.chat.completions.create(
        model="local", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == 3, content
    for token in content:
        assert len(token.top_logprobs) == 2 and token.logprob <= 0
        assert token.logprob == max(alternative.logprob for alternative in token.top_logprobs), "greedy takes the likeliest"


def equal_seeds():
    options = dict(model="local", messages=MESSAGES, max_tokens=20, temperature=1, seed=7)
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.system_fingerprint and first.system_fingerprint == second.system_fingerprint


def running():
    with urllib.request.urlopen(BASE_URL + "/metrics") as metrics:
        for line in metrics.read().decode().splitlines():
            if line.startswith("flash_requests_running"):
                return float(line.rsplit(" ", 1)[1])
    raise AssertionError("no flash_requests_running in /metrics")


def within_a_second(condition):
    end = time.monotonic() + 1
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def closed_stream():
    # Without its two end tokens the model talks until the context is full, unless that is sooner than it is seen.
    for seed in range(5):
        stream = client.chat.completions.create(
            model="local", messages=MESSAGES, temperature=1, seed=seed, stream=True, logit_bias={"8191": -100, "8189": -100})
        next(iter(stream))
        seen = within_a_second(lambda: running() == 1)
        stream.close()
        assert within_a_second(lambda: running() == 0), "the slot is still taken a second after the stream was closed"
        if seen:
            return
    raise AssertionError("no request was seen running")


def fails(kind, status, code, act):
    error = raises(kind, act)
    assert (error.status_code, error.code) == (status, code), error


def bad_request():
    def ask(**fields):
        return lambda: client.chat.completions.create(**{"model": "local", "messages": MESSAGES, **fields})
    fails(openai.BadRequestError, 400, "invalid_value", ask(temperature=9))
    fails(openai.BadRequestError, 400, "invalid_value", ask(messages=[{"role": "user", "content": 7}]))
    fails(openai.BadRequestError, 400, "context_length_exceeded", ask(messages=[{"role": "user", "content": "word " * 9000}]))


def unknown_model():
    fails(openai.NotFoundError, 404, "model_not_found",
          lambda: client.chat.completions.create(model="gpt-9", messages=MESSAGES))
    fails(openai.NotFoundError, 404, "model_not_found", lambda: client.models.retrieve("gpt-9"))


def wrong_key():
    keyed = openai.OpenAI(base_url=KEYED_BASE_URL + "/v1", api_key="wrong", max_retries=0)
    fails(openai.AuthenticationError, 401, "invalid_api_key", lambda: keyed.models.list())


cases = [models, completion, streamed_completion, usage_chunk, stop_string, log_probabilities, equal_seeds, closed_stream, bad_request,
         unknown_model]
run(cases + ([wrong_key] if KEYED_BASE_URL else []), f" (openai {openai.__version__}, daemon at {SOCKET})")
