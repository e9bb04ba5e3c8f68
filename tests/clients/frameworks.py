"""What people build with on top of the SDKs, from PyPI, against a gateway whose model says what it is told (tests/src/scripted.rs).

Usage: frameworks.py BASE_URL FOLDER, the folder being one that llm may keep its things in. Exits 1 if anything failed.
"""

import os
import sys
from pathlib import Path

BASE_URL, FOLDER = sys.argv[1].rstrip("/") + "/v1", Path(sys.argv[2])
os.environ |= {"OPENAI_AGENTS_DISABLE_TRACING": "1", "LANGSMITH_TRACING": "false", "LLM_USER_PATH": str(FOLDER)}
(FOLDER / "extra-openai-models.yaml").write_text(f"""
- model_id: chat
  model_name: scripted
  api_base: {BASE_URL}
  api_key_name: none
  supports_tools: true
  supports_schema: true
- model_id: raw
  model_name: scripted
  api_base: {BASE_URL}
  api_key_name: none
  completion: true
""")

import agents
import instructor
import langchain_anthropic
import langchain_openai
import llm
import ollama
import openai
import pydantic
import pydantic_ai
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from cases import raises, run

KEY = "not-needed"
HELLO = "SAY[[Hello there.]]END"
ADA = 'CALL[[["Person",{"name":"Ada","age":36}]]]END'
ADA_TEXT = 'SAY[[{"name":"Ada","age":36}]]END'
READ = 'CALL[[["read_file",{"path":"a b.txt"}]]]END SAY[[It says hello.]]END'


class Person(pydantic.BaseModel):
    name: str
    age: int


def is_ada(person):
    assert (person.name, person.age) == ("Ada", 36), person


def read_file(path: str) -> str:
    """Reads a file."""
    assert path == "a b.txt", path
    read_file.calls += 1
    return "hello"


def reads_once(act):
    read_file.calls = 0
    said = act()
    assert (read_file.calls, said) == (1, "It says hello."), (read_file.calls, said)


def llm_streams():
    chunks = list(llm.get_model("chat").prompt(HELLO, key=KEY))
    assert "".join(chunks) == "Hello there." and len(chunks) > 1, chunks


def llm_calls_tools():
    reads_once(lambda: llm.get_model("chat").chain(READ, tools=[read_file], key=KEY).text())


def llm_keeps_a_schema():
    said = llm.get_model("chat").prompt(ADA_TEXT, schema=Person, key=KEY).text()
    is_ada(Person.model_validate_json(said))


def llm_completes():
    said = llm.get_model("raw").prompt(HELLO, key=KEY).text()
    assert said == "Hello there.", said


def instruct(mode, told):
    client = instructor.from_openai(openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0), mode=mode)
    return client, {"model": "scripted", "messages": [{"role": "user", "content": told}], "max_retries": 0, "max_tokens": 200}


def instructor_forces_a_tool():
    client, ask = instruct(instructor.Mode.TOOLS, ADA)
    is_ada(client.create(response_model=Person, **ask))


def instructor_asks_for_json():
    for mode in (instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
        client, ask = instruct(mode, ADA_TEXT)
        is_ada(client.create(response_model=Person, **ask))


def instructor_speaks_responses():
    client, ask = instruct(instructor.Mode.RESPONSES_TOOLS, ADA)
    is_ada(client.create(response_model=Person, **ask))


def instructor_streams_a_part_at_a_time():
    client, ask = instruct(instructor.Mode.TOOLS, ADA.replace("Person", "PartialPerson"))
    parts = list(client.create_partial(response_model=Person, **ask))
    is_ada(parts[-1])
    assert len(parts) > 2, parts


def langchain(**options):
    return langchain_openai.ChatOpenAI(model="scripted", base_url=BASE_URL, api_key=KEY, max_retries=0, **options)


def langchains():
    claude = langchain_anthropic.ChatAnthropic(model="scripted", base_url=sys.argv[1], api_key=KEY, max_retries=0)
    return [langchain(stream_usage=True), langchain(use_responses_api=True), claude]


def langchain_streams():
    for model in langchains():
        chunks = list(model.stream(HELLO))
        whole = sum(chunks[1:], chunks[0])
        assert whole.text == "Hello there." and len(chunks) > 2, chunks
        assert whole.usage_metadata["output_tokens"] > 0, whole


def langchain_calls_tools():
    for model in langchains():
        model = model.bind_tools([read_file])
        first = model.invoke(READ)
        assert [(call["name"], call["args"]) for call in first.tool_calls] == [("read_file", {"path": "a b.txt"})], first
        result = {"role": "tool", "tool_call_id": first.tool_calls[0]["id"], "content": "hello"}
        second = model.invoke([{"role": "user", "content": READ}, first, result])
        assert second.text == "It says hello.", second


def langchain_structures_output():
    chat, _, claude = langchains()
    for model, method, told in [(chat, "json_schema", ADA_TEXT), (chat, "json_mode", ADA_TEXT), (chat, "function_calling", ADA),
                                (claude, "json_schema", ADA_TEXT), (claude, "function_calling", ADA)]:
        is_ada(model.with_structured_output(Person, method=method).invoke(told))


def pydantic_models():
    provider = OpenAIProvider(base_url=BASE_URL, api_key=KEY)
    return [OpenAIChatModel("scripted", provider=provider), OpenAIResponsesModel("scripted", provider=provider)]


def pydantic_ai_calls_tools():
    for model in pydantic_models():
        reads_once(lambda: pydantic_ai.Agent(model, tools=[read_file]).run_sync(READ).output)


def pydantic_ai_wants_a_type():
    for model in pydantic_models():
        told = 'CALL[[["final_result",{"name":"Ada","age":36}]]]END'
        is_ada(pydantic_ai.Agent(model, output_type=Person).run_sync(told).output)
        is_ada(pydantic_ai.Agent(model, output_type=pydantic_ai.NativeOutput(Person)).run_sync(ADA_TEXT).output)


def agent_models():
    client = openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
    return [agents.OpenAIChatCompletionsModel("scripted", client), agents.OpenAIResponsesModel("scripted", client)]


def openai_agents_call_tools():
    for model in agent_models():
        agent = agents.Agent("reader", instructions="Be brief.", model=model, tools=[agents.function_tool(read_file)])
        reads_once(lambda: agents.Runner.run_sync(agent, READ).final_output)


def openai_agents_must_call():
    for model in agent_models():
        settings = agents.ModelSettings(tool_choice="required")
        agent = agents.Agent("reader", model=model, tools=[agents.function_tool(read_file)], model_settings=settings)
        reads_once(lambda: agents.Runner.run_sync(agent, READ).final_output)


def openai_agents_want_a_type():
    for model in agent_models():
        is_ada(agents.Runner.run_sync(agents.Agent("who", model=model, output_type=Person), ADA_TEXT).final_output)


OLLAMA = ollama.Client(host=sys.argv[1])


def ollama_streams():
    said = [{"role": "user", "content": HELLO}]
    parts = [part.message.content for part in OLLAMA.chat("scripted", said, stream=True)]
    assert "".join(parts) == OLLAMA.chat("scripted", said).message.content == OLLAMA.generate("scripted", HELLO).response == "Hello there."


def ollama_calls_tools():
    said = [{"role": "user", "content": READ}]
    asked = OLLAMA.chat("scripted", said, tools=[read_file]).message
    (call,) = asked.tool_calls
    told = {"role": "tool", "tool_name": call.function.name, "content": read_file(**call.function.arguments)}
    assert OLLAMA.chat("scripted", [*said, asked, told], tools=[read_file]).message.content == "It says hello."


def ollama_keeps_a_schema():
    said = OLLAMA.chat("scripted", [{"role": "user", "content": ADA_TEXT}], format=Person.model_json_schema()).message.content
    is_ada(Person.model_validate_json(said))


def ollama_lists():
    assert "scripted" in [model.model for model in OLLAMA.list().models]
    shown = OLLAMA.show("scripted")
    assert "tools" in shown.capabilities and shown.details.family, shown
    OLLAMA.chat("scripted", [{"role": "user", "content": HELLO}])
    assert [model.model for model in OLLAMA.ps().models] == ["scripted"]


def errors_are_theirs():
    assert raises(ollama.ResponseError, lambda: OLLAMA.chat("gpt-9")).status_code == 404
    error = raises(openai.NotFoundError, lambda: langchain(model_kwargs={}).bind(model="gpt-9").invoke("Hi"))
    assert error.code == "model_not_found", error


run([llm_streams, llm_calls_tools, llm_keeps_a_schema, llm_completes, instructor_forces_a_tool, instructor_asks_for_json,
     instructor_speaks_responses, instructor_streams_a_part_at_a_time, langchain_streams, langchain_calls_tools,
     langchain_structures_output, pydantic_ai_calls_tools, pydantic_ai_wants_a_type, openai_agents_call_tools, openai_agents_must_call,
     openai_agents_want_a_type, ollama_streams, ollama_calls_tools, ollama_keeps_a_schema, ollama_lists, errors_are_theirs])
