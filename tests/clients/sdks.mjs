// OpenAI's, Anthropic's and ollama's packages for JavaScript and the AI SDK, against a gateway whose model says what it is told
// (tests/src/scripted.rs). Usage: node sdks.mjs BASE_URL LONELY_URL, beside a node_modules folder with them; the latter is of a gateway
// without a daemon. Exits 1 if anything failed.

import assert from "node:assert/strict";

import Anthropic from "@anthropic-ai/sdk";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { Ollama } from "ollama";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [base, lonely] = process.argv.slice(2).map((url) => url.replace(/\/$/, ""));
const options = { apiKey: "not-needed", maxRetries: 0 };
const openai = new OpenAI({ ...options, baseURL: `${base}/v1` });
const claude = new Anthropic({ ...options, baseURL: base });
const ollama = new Ollama({ host: base });
const chatModel = createOpenAICompatible({ name: "flash", baseURL: `${base}/v1`, includeUsage: true }).chatModel("scripted");
const responsesModel = createOpenAI({ baseURL: `${base}/v1`, apiKey: "not-needed" })("scripted");

const model = "scripted";
const hello = "SAY[[Hello there.]]END";
const thought = "SAY[[<think>\nShould I?\n</think>\n\nHello there.]]END";
const read = 'CALL[[["read_file",{"path":"a b.txt"}]]]END SAY[[It says hello.]]END';
const long = `SAY[[${"word ".repeat(3000)}]]END`;
const ada = { name: "Ada", age: 36 };
const told = `SAY[[${JSON.stringify(ada)}]]END`;
const person = z.object({ name: z.string(), age: z.number().int() });
const path = { type: "object", properties: { path: { type: "string" } }, required: ["path"] };
const user = (content) => [{ role: "user", content }];
const chatTool = { type: "function", function: { name: "read_file", description: "Reads a file.", parameters: path } };
const claudeTool = { name: "read_file", description: "Reads a file.", input_schema: path };

async function all(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

// The daemon is free again within a second.
async function freed() {
  const end = Date.now() + 1000;
  for (;;) {
    const metrics = await (await fetch(`${base}/metrics`)).text();
    const running = Number(/^flash_requests_running (\d+)/m.exec(metrics)[1]);
    if (running === 0) return;
    assert(Date.now() < end, "the slot is still taken a second after the client has gone");
    await new Promise((wake) => setTimeout(wake, 10));
  }
}

const cases = {
  async "openai: models"() {
    assert((await all(openai.models.list())).some((found) => found.id === model));
    assert.equal((await openai.models.retrieve(model)).id, model);
  },
  async "openai: chat stream"() {
    const stream = openai.chat.completions.stream({ model, messages: user(hello), stream_options: { include_usage: true } });
    const whole = await stream.finalChatCompletion();
    assert.equal(whole.choices[0].message.content, "Hello there.");
    assert.equal(whole.choices[0].finish_reason, "stop");
    assert(whole.usage.completion_tokens > 0);
  },
  async "openai: runTools"() {
    const paths = [];
    const run = (args) => (paths.push(args.path), "hello");
    const tools = [{ type: "function", function: { ...chatTool.function, function: run, parse: JSON.parse } }];
    for (const stream of [false, true]) {
      const runner = openai.chat.completions.runTools({ model, messages: user(read), tools, stream });
      assert.equal(await runner.finalContent(), "It says hello.");
    }
    assert.deepEqual(paths, ["a b.txt", "a b.txt"]);
  },
  async "openai: forced tool"() {
    const tool_choice = { type: "function", function: { name: "read_file" } };
    const answer = await openai.chat.completions.create({ model, messages: user("SAY[[No!]]END"), tools: [chatTool], tool_choice, max_tokens: 200 });
    assert.equal(answer.choices[0].message.tool_calls[0].function.name, "read_file");
  },
  async "openai: parse"() {
    const chat = await openai.chat.completions.parse({ model, messages: user(told), response_format: zodResponseFormat(person, "person") });
    assert.deepEqual(chat.choices[0].message.parsed, ada);
    const response = await openai.responses.parse({ model, input: told, text: { format: zodTextFormat(person, "person") } });
    assert.deepEqual(response.output_parsed, ada);
  },
  async "openai: responses stream"() {
    const stream = openai.responses.stream({ model, input: hello });
    const kinds = (await all(stream)).map((event) => event.type);
    assert.deepEqual([kinds[0], kinds.at(-1)], ["response.created", "response.completed"]);
    assert.equal((await stream.finalResponse()).output_text, "Hello there.");
  },
  async "openai: responses tool round"() {
    const tools = [{ type: "function", name: "read_file", parameters: path, strict: false }];
    const input = user(read);
    const first = await openai.responses.create({ model, input, tools });
    const call = first.output.find((item) => item.type === "function_call");
    assert.deepEqual(JSON.parse(call.arguments), { path: "a b.txt" });
    input.push(...first.output, { type: "function_call_output", call_id: call.call_id, output: "hello" });
    assert.equal((await openai.responses.create({ model, input, tools })).output_text, "It says hello.");
  },
  async "openai: completions"() {
    const chunks = await all(await openai.completions.create({ model, prompt: hello, max_tokens: 20, stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), "Hello there.");
  },
  async "openai: break and abort"() {
    for await (const chunk of await openai.chat.completions.create({ model, messages: user(long), stream: true })) {
      if (chunk.choices[0].delta.content) break;
    }
    await freed();
    const whole = new AbortController();
    const asked = openai.chat.completions.create({ model, messages: user(long) }, { signal: whole.signal });
    setTimeout(() => whole.abort(), 100);
    await assert.rejects(asked, OpenAI.APIUserAbortError);
    await freed();
  },
  async "openai: errors"() {
    const fails = (act, kind, code) => assert.rejects(act, (error) => error instanceof kind && error.code === code);
    await fails(openai.chat.completions.create({ model: "gpt-9", messages: user("Hi") }), OpenAI.NotFoundError, "model_not_found");
    await fails(openai.chat.completions.create({ model, messages: user("Hi"), temperature: 9 }), OpenAI.BadRequestError, "invalid_value");
    await fails(openai.embeddings.create({ model, input: "a" }), OpenAI.UnprocessableEntityError, "embeddings_not_supported");
    const much = openai.responses.create({ model, input: "word ".repeat(200_000) });
    await fails(much, OpenAI.BadRequestError, "context_length_exceeded");
  },

  async "anthropic: stream"() {
    const stream = claude.messages.stream({ model, max_tokens: 100, messages: user(hello) });
    assert.equal(await stream.finalText(), "Hello there.");
    assert.equal((await stream.finalMessage()).stop_reason, "end_turn");
  },
  async "anthropic: thinking"() {
    const thinking = { type: "enabled", budget_tokens: 1024 };
    const stream = claude.messages.stream({ model, max_tokens: 2000, messages: user(thought), thinking });
    const { content } = await stream.finalMessage();
    assert.deepEqual(content.map((block) => block.type), ["thinking", "text"]);
    assert.deepEqual([content[0].thinking, content[1].text], ["Should I?", "Hello there."]);
  },
  async "anthropic: tool round"() {
    const messages = user(read);
    const ask = () => claude.messages.stream({ model, max_tokens: 500, messages, tools: [claudeTool] }).finalMessage();
    const first = await ask();
    const call = first.content.find((block) => block.type === "tool_use");
    assert.deepEqual([first.stop_reason, call.input], ["tool_use", { path: "a b.txt" }]);
    messages.push({ role: "assistant", content: first.content });
    messages.push({ role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "hello" }] });
    assert.equal((await ask()).content[0].text, "It says hello.");
  },
  async "anthropic: toolRunner"() {
    const paths = [];
    const run = (args) => (paths.push(args.path), "hello");
    const tools = [{ ...claudeTool, type: "custom", run, parse: (input) => input }];
    const last = await claude.beta.messages.toolRunner({ model, max_tokens: 500, messages: user(read), tools });
    assert.deepEqual([last.content[0].text, paths], ["It says hello.", ["a b.txt"]]);
  },
  async "anthropic: count and models"() {
    const messages = user(hello);
    const { input_tokens } = await claude.messages.countTokens({ model, messages });
    const { usage } = await claude.messages.create({ model, max_tokens: 20, messages });
    assert.equal(usage.input_tokens + usage.cache_read_input_tokens, input_tokens);
    assert((await all(claude.models.list())).some((found) => found.id === model));
  },
  async "anthropic: abort"() {
    const stream = claude.messages.stream({ model, max_tokens: 5000, messages: user(long) });
    stream.on("text", () => stream.abort());
    await assert.rejects(stream.done(), Anthropic.APIUserAbortError);
    await freed();
  },
  async "anthropic: errors"() {
    const wrong = claude.messages.create({ model: "gpt-9", max_tokens: 10, messages: user("Hi") });
    await assert.rejects(wrong, (error) => error instanceof Anthropic.NotFoundError && error.error.error.type === "not_found_error");
    const much = claude.messages.create({ model, max_tokens: 10, messages: user("word ".repeat(200_000)) });
    await assert.rejects(much, (error) => error instanceof Anthropic.BadRequestError && /prompt is too long: \d+ tokens > \d+ maximum/.test(error.message));
  },

  async "ollama: tags"() {
    assert((await ollama.list()).models.some((found) => found.name === model));
  },
  async "ollama: chat"() {
    const messages = user(hello);
    const parts = await all(await ollama.chat({ model, messages, stream: true }));
    assert.equal(parts.map((part) => part.message.content).join(""), "Hello there.");
    assert.deepEqual([parts.length > 2, parts.at(-1).done_reason], [true, "stop"]);
    assert.equal((await ollama.chat({ model, messages })).message.content, "Hello there.");
  },

  // Nothing listens at this gateway's socket: 503, and Retry-After says 2 seconds.
  async "retries wait as told"() {
    const once = { apiKey: "x", maxRetries: 1 };
    const clients = [new OpenAI({ ...once, baseURL: `${lonely}/v1` }), new Anthropic({ ...once, baseURL: lonely })];
    const ask = async (client) => {
      const start = performance.now();
      await assert.rejects(client.models.list(), { status: 503 });
      return performance.now() - start;
    };
    const waited = await Promise.all(clients.map(ask));
    assert(waited.every((milliseconds) => milliseconds >= 1900), String(waited));
  },
};

for (const [name, ai] of [["openai-compatible", chatModel], ["responses", responsesModel]]) {
  const of = (what) => `ai-sdk, ${name}: ${what}`;
  Object.assign(cases, {
    async [of("stream")]() {
      const answer = streamText({ model: ai, prompt: hello, maxRetries: 0 });
      assert.equal((await all(answer.textStream)).join(""), "Hello there.");
      assert.equal(await answer.finishReason, "stop");
      assert((await answer.usage).outputTokens > 0);
    },
    // OpenAI's provider sends what was answered by its ids, not as it is.
    async [of("second turn")]() {
      const ask = (messages) => generateText({ model: ai, messages, maxRetries: 0 });
      const { response } = await ask(user(thought));
      const [whole, cut] = [await ask([...user(thought), ...response.messages, ...user(hello)]), await ask([...user(thought), ...user(hello)])];
      assert.equal(whole.text, "Hello there.");
      assert(whole.usage.inputTokens > cut.usage.inputTokens, `${whole.usage.inputTokens} tokens, ${cut.usage.inputTokens} without the answer`);
    },
    async [of("reasoning")]() {
      const ask = { model: ai, prompt: thought, maxRetries: 0, providerOptions: { openai: { reasoningSummary: "auto", forceReasoning: true } } };
      const answer = await generateText(ask);
      assert.deepEqual([answer.reasoningText, answer.text], ["Should I?", "Hello there."]);
      const streamed = streamText(ask);
      assert.equal((await all(streamed.textStream)).join(""), "Hello there.");
      assert.equal(await streamed.reasoningText, "Should I?");
    },
    async [of("tool loop")]() {
      const paths = [];
      const execute = async (args) => (paths.push(args.path), "hello");
      const tools = { read_file: tool({ description: "Reads a file.", inputSchema: z.object({ path: z.string() }), execute }) };
      const ask = { model: ai, prompt: read, tools, stopWhen: stepCountIs(3), maxRetries: 0 };
      assert.equal((await generateText(ask)).text, "It says hello.");
      assert.equal(await streamText(ask).text, "It says hello.");
      assert.deepEqual(paths, ["a b.txt", "a b.txt"]);
      const forced = await generateText({ ...ask, prompt: "SAY[[No!]]END", toolChoice: "required", maxOutputTokens: 200, stopWhen: stepCountIs(1) });
      assert.equal(forced.toolCalls[0]?.toolName, "read_file");
    },
    async [of("object")]() {
      const { output } = await generateText({ model: ai, prompt: told, output: Output.object({ schema: person }), maxRetries: 0 });
      assert.deepEqual(output, ada);
    },
    async [of("abort")]() {
      const gone = new AbortController();
      const answer = streamText({ model: ai, prompt: long, abortSignal: gone.signal, maxRetries: 0, onError() {} });
      for await (const part of answer.fullStream) {
        if (part.type === "text-delta") gone.abort();
      }
      await freed();
    },
  });
}

let failed = 0;
for (const [name, run] of Object.entries(cases)) {
  try {
    await run();
    console.log(`ok      ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}`);
    console.log(error);
  }
}
console.log(`${Object.keys(cases).length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
