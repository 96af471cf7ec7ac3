// Asks a server with packages of Node, and prints what they make of it as JSON: node clients.mjs FOLDER URL
import { createRequire } from "node:module";

const [folder, url] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const OpenAI = require("openai").default;
const Anthropic = require("@anthropic-ai/sdk").default;
const { generateObject, generateText, streamText, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");

const towns = ["Paris", "Köln"];
const messages = [{ role: "user", content: "How late is it in Paris?" }];
const parameters = {
  type: "object",
  properties: { town: { enum: towns } },
  required: ["town"],
  additionalProperties: false,
};
const options = { apiKey: "none", maxRetries: 0, timeout: 60_000 };
const told = {};

const openai = new OpenAI({ ...options, baseURL: `${url}/v1` });
const clock = { type: "function", function: { name: "clock", parameters } };
const asked = { model: "me-local", messages, max_tokens: 60, parallel_tool_calls: false };
const message = await openai.chat.completions.stream({ ...asked, tools: [clock], tool_choice: "required" }).finalMessage();
told.stream = message.tool_calls.map((call) => JSON.parse(call.function.arguments).town);
told.runTools = [];
const looking = { ...clock.function, parse: JSON.parse, function: ({ town }) => told.runTools.push(town) && "noon" };
await openai.chat.completions
  .runTools({ ...asked, tools: [{ type: "function", function: looking }], tool_choice: clock })
  .done();
const format = { type: "json_schema", name: "place", schema: parameters };
const response = await openai.responses.create({ model: "me-local", input: "the cat", text: { format } });
told.response = [JSON.parse(response.output_text).town];

const model = createOpenAICompatible({
  name: "me-local",
  baseURL: `${url}/v1`,
  apiKey: "none",
  supportsStructuredOutputs: true,
})("me-local");
const place = z.strictObject({ town: z.enum(towns) });
const common = { model, prompt: "the cat", maxRetries: 0, maxOutputTokens: 60 };
const failures = [];
const stream = streamText({ ...common, onError: ({ error }) => failures.push(error) });
for await (const text of stream.textStream) console.error(text);
if (failures.length) throw failures[0];
told.finish = await stream.finishReason;
told.object = [(await generateObject({ ...common, schema: place })).object.town];
const look = tool({ inputSchema: place, execute: async () => "noon" });
const called = await generateText({ ...common, tools: { look }, toolChoice: { type: "tool", toolName: "look" } });
told.tool = called.toolResults.map((result) => result.input.town);

const anthropic = new Anthropic({ ...options, baseURL: url });
const choice = { type: "any", disable_parallel_tool_use: true };
const used = await anthropic.messages
  .stream({ model: "me-local", max_tokens: 60, messages, tools: [{ name: "clock", input_schema: parameters }], tool_choice: choice })
  .finalMessage();
told.anthropic = used.content.map((block) => block.input.town);

console.log(JSON.stringify(told));
