"""The real OpenAI and Anthropic SDKs as agents use them, against a gateway whose model says what it is told (tests/src/scripted.rs).

Usage: sdks.py BASE_URL LONELY_URL, the latter of a gateway without a daemon. Exits 1 if anything failed.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai

from cases import raises, run

BASE_URL, LONELY_URL = sys.argv[1].rstrip("/"), sys.argv[2].rstrip("/")
ai = openai.OpenAI(base_url=BASE_URL + "/v1", api_key="not-needed", max_retries=0, timeout=120)
claude = anthropic.Anthropic(base_url=BASE_URL, api_key="not-needed", max_retries=0, timeout=120)

PATH = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
READ = 'CALL[[["read_file",{"path":"a b.txt"}]]]END SAY[[It says hello.]]END'
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"],
          "additionalProperties": False}
ADA = {"name": "Ada", "age": 36}


def chat_tool(name="read_file"):
    return {"type": "function", "function": {"name": name, "description": "Reads a file.", "parameters": PATH}}


def user(text):
    return {"role": "user", "content": text}


def chat_tool_round():
    messages = [user(READ)]
    answer = ai.chat.completions.create(model="scripted", messages=messages, tools=[chat_tool()]).choices[0]
    assert answer.finish_reason == "tool_calls", answer
    call = answer.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("read_file", {"path": "a b.txt"}), call
    messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "hello"}]
    answer = ai.chat.completions.create(model="scripted", messages=messages, tools=[chat_tool()]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("It says hello.", "stop"), answer


def streamed_chat_tools():
    told = 'CALL[[["read_file",{"path":"a"}],["list_files",{"path":"/"}]]]END'
    with ai.chat.completions.stream(model="scripted", messages=[user(told)], tools=[chat_tool(), chat_tool("list_files")]) as stream:
        answer = stream.get_final_completion().choices[0]
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in answer.message.tool_calls]
    assert calls == [("read_file", {"path": "a"}), ("list_files", {"path": "/"})], calls
    assert answer.finish_reason == "tool_calls", answer


def forced_chat_tool():
    choice = {"type": "function", "function": {"name": "read_file"}}
    answer = ai.chat.completions.create(
        model="scripted", messages=[user(READ)], tools=[chat_tool("list_files"), chat_tool()], tool_choice=choice).choices[0]
    assert answer.message.tool_calls[0].function.name == "read_file", answer
    assert "path" in json.loads(answer.message.tool_calls[0].function.arguments), answer


def chat_schema():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = ai.chat.completions.create(
        model="scripted", messages=[user(f"SAY[[{json.dumps(ADA)}]]END")], response_format=form).choices[0]
    assert json.loads(answer.message.content) == ADA, answer


def several_choices():
    answer = ai.chat.completions.create(model="scripted", messages=[user("SAY[[Hi.]]END")], n=3)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "Hi."), (1, "Hi."), (2, "Hi.")], answer


def completions():
    answer = ai.completions.create(model="scripted", prompt="SAY[[Hi.]]END", max_tokens=8)
    assert answer.object == "text_completion" and answer.choices[0].text == "Hi.", answer


def embeddings_are_refused():
    error = raises(openai.UnprocessableEntityError, lambda: ai.embeddings.create(model="scripted", input="a"))
    assert error.code == "embeddings_not_supported", error


def response_tool_round():
    tool = {"type": "function", "name": "read_file", "parameters": PATH, "strict": False}
    items = [user(READ)]
    first = ai.responses.create(model="scripted", input=items, tools=[tool])
    call = next(item for item in first.output if item.type == "function_call")
    assert (call.name, json.loads(call.arguments)) == ("read_file", {"path": "a b.txt"}), first
    items += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "hello"}]
    second = ai.responses.create(model="scripted", input=items, tools=[tool])
    assert (second.output_text, second.status) == ("It says hello.", "completed"), second
    assert second.usage.total_tokens == second.usage.input_tokens + second.usage.output_tokens, second.usage


def streamed_response():
    kinds = []
    with ai.responses.stream(model="scripted", input="SAY[[Hello there.]]END") as stream:
        for event in stream:
            kinds.append(event.type)
        answer = stream.get_final_response()
    assert answer.output_text == "Hello there.", answer
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed", kinds


def stored_response():
    first = ai.responses.create(model="scripted", input="SAY[[One.]]END", store=True)
    second = ai.responses.create(model="scripted", input="SAY[[Two.]]END", previous_response_id=first.id)
    assert second.output_text == "Two." and second.usage.input_tokens > first.usage.input_tokens, second


def message_tool_round():
    tool = {"name": "read_file", "description": "Reads a file.", "input_schema": PATH}
    messages = [user(READ)]
    first = claude.messages.create(model="scripted", max_tokens=500, messages=messages, tools=[tool])
    assert first.stop_reason == "tool_use", first
    call = next(block for block in first.content if block.type == "tool_use")
    assert (call.name, call.input) == ("read_file", {"path": "a b.txt"}), first
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "hello"}]}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(model="scripted", max_tokens=500, messages=messages, tools=[tool])
    assert (second.content[0].text, second.stop_reason) == ("It says hello.", "end_turn"), second


def message_tool_runner():
    paths = []

    @anthropic.beta_tool
    def read_file(path: str) -> str:
        """Reads a file."""
        paths.append(path)
        return "hello"

    last = claude.beta.messages.tool_runner(model="scripted", max_tokens=500, messages=[user(READ)], tools=[read_file]).until_done()
    assert (last.content[0].text, paths) == ("It says hello.", ["a b.txt"]), last


def more_tokens_than_fit():
    answer = ai.chat.completions.create(model="scripted", messages=[user("SAY[[Hi.]]END")], max_tokens=10**12)
    assert answer.choices[0].message.content == "Hi.", answer
    answer = claude.messages.create(model="scripted", max_tokens=10**7, messages=[user("SAY[[Hi.]]END")], timeout=120)
    assert answer.content[0].text == "Hi.", answer


def two_at_once():
    """As Claude Code's first prompt: a title in a form, and the answer with tools."""
    def title():
        form = {"format": {"type": "json_schema", "schema": PERSON}}
        told = [user(f"SAY[[{json.dumps(ADA)}]]END")]
        return claude.messages.create(model="scripted", max_tokens=32000, messages=told, timeout=120, extra_body={"output_config": form})
    def main():
        tool = {"name": "read_file", "description": "Reads a file.", "input_schema": PATH}
        return claude.messages.create(model="scripted", max_tokens=32000, messages=[user(READ)], tools=[tool], timeout=120)
    with ThreadPoolExecutor() as pool:
        first, second = pool.submit(title), pool.submit(main)
    assert json.loads(first.result().content[0].text) == ADA, first.result()
    assert second.result().content[0].input == {"path": "a b.txt"}, second.result()


def retries_wait_as_told():
    """Nothing listens at this gateway's socket: 503, and Retry-After says 2 seconds."""
    def ask(client):
        start = time.monotonic()
        error = raises((openai.APIStatusError, anthropic.APIStatusError), lambda: client.with_options(max_retries=1).models.list())
        assert error.status_code == 503, error
        return time.monotonic() - start
    clients = openai.OpenAI(base_url=LONELY_URL + "/v1", api_key="x"), anthropic.Anthropic(base_url=LONELY_URL, api_key="x")
    with ThreadPoolExecutor() as pool:
        waited = list(pool.map(ask, clients))
    assert all(seconds >= 1.9 for seconds in waited), waited


def streamed_message():
    tool = {"name": "read_file", "description": "Reads a file.", "input_schema": PATH}
    with claude.messages.stream(model="scripted", max_tokens=500, messages=[user(READ)], tools=[tool]) as stream:
        answer = stream.get_final_message()
    assert answer.content[-1].input == {"path": "a b.txt"} and answer.stop_reason == "tool_use", answer
    with claude.messages.stream(model="scripted", max_tokens=500, messages=[user("SAY[[Hello there.]]END")]) as stream:
        assert "".join(stream.text_stream) == "Hello there."


def counted_tokens():
    counted = claude.messages.count_tokens(model="scripted", messages=[user("SAY[[Hi.]]END")]).input_tokens
    answer = claude.messages.create(model="scripted", max_tokens=10, messages=[user("SAY[[Hi.]]END")])
    used = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert counted == used, (counted, answer.usage)


def one_models_body():
    assert "scripted" in [model.id for model in ai.models.list()]
    assert "scripted" in [model.id for model in claude.models.list()]


def message_errors():
    def ask(**fields):
        return lambda: claude.messages.create(max_tokens=10, **{"model": "scripted", "messages": [user("Hi")], **fields})
    error = raises(anthropic.NotFoundError, ask(model="gpt-9"))
    assert error.body["error"]["type"] == "not_found_error" and error.request_id, error
    error = raises(anthropic.BadRequestError, ask(messages=[user("word " * 200_000)]))
    message = error.body["error"]["message"]
    assert message.startswith("prompt is too long: ") and message.endswith(" maximum"), message


run([chat_tool_round, streamed_chat_tools, forced_chat_tool, chat_schema, several_choices, completions, embeddings_are_refused,
     response_tool_round, streamed_response, stored_response, message_tool_round, message_tool_runner, streamed_message, counted_tokens,
     one_models_body, message_errors, more_tokens_than_fit, two_at_once, retries_wait_as_told], f" (openai {openai.__version__})")
