// Talks to the server: what the ensemble is, and a reply while it is made. Knows nothing of the page but that addresses
// are relative to it, for servers behind a prefix.

const LOST = "The server cannot be reached. Is me-local serve still running?";
const BROKEN = "The connection ended before the reply was finished.";

/** Why there is no reply, or no more of it; `status` is 0 where no answer came. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The ensemble as GET /v1/models describes it, and with each of its `presets`. Throws Failure. */
export async function ensemble(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  const { data } = await response.json();
  const [first] = data;
  return { ...first, presets: data.filter(({ id }) => id.startsWith(`${first.id}:`)) };
}

/** The chunks of a reply. Throws Failure, or an AbortError where `signal` says so. */
export async function* reply(body, key, signal) {
  const init = { method: "POST", headers: headers(key), body: JSON.stringify(body), signal };
  const response = await ask("v1/chat/completions", init);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(explained(chunk.error));
    yield chunk;
  }
  throw new Failure(BROKEN);
}

function headers(key) {
  const plain = { "Content-Type": "application/json" };
  return key ? { ...plain, Authorization: `Bearer ${key}` } : plain;
}

async function ask(path, init) {
  let response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(LOST);
  }
  if (!response.ok) throw await refused(response);
  return response;
}

async function refused(response) {
  const wait = response.headers.get("Retry-After");
  const body = await response.json().catch(() => null);
  const error = body?.error?.message ? body.error : { message: `the server answered with status ${response.status}` };
  return new Failure(explained(error, wait), response.status);
}

/** The server's own words, with what to do about them. */
function explained({ message, code }, wait = null) {
  if (code === "queue_full") return `The server is busy: ${message}. Try again in ${wait} s.`;
  if (code === "context_length_exceeded") return `The conversation is too long: ${message}. Or start a new chat.`;
  if (code === "body_too_large") return `The conversation is too long: ${message}. Start a new chat.`;
  if (code === "timeout") return `The server gave up: the reply was ${message}.`;
  return sentence(message);
}

function sentence(text) {
  const end = /[.!?]$/.test(text) ? "" : ".";
  return text.charAt(0).toUpperCase() + text.slice(1) + end;
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) if (event.startsWith("data: ")) yield event.slice("data: ".length);
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(BROKEN);
  }
}
