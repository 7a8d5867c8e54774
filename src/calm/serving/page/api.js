// Requests to the server. If one fails, the error says why in a sentence.

export class Refusal extends Error {
  // field: The argument of the request that is at fault, if the server names one.
  constructor(message, field = null) {
    super(message);
    this.field = field;
  }
}

const GONE = "The server does not answer. Is calm serve still running?";
const BROKEN_OFF = "The connection broke in the middle of the text. Is calm serve still running?";

export async function fetchAbout() {
  return (await request("/page", {})).json();
}

export async function post(path, body, key, signal) {
  const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal(GONE);
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const field = response.status === 401 ? "key" : error?.param;
  throw new Refusal(asSentence(error?.message ?? `the server answered ${response.status}.`), field);
}

// The events of a stream; an error event is thrown.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Refusal(BROKEN_OFF);
    });
    if (done) throw new Refusal(BROKEN_OFF);
    buffer += value;
    const lines = buffer.split("\n\n");
    buffer = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(asSentence(event.error.message), event.error.param);
      yield event;
    }
  }
}

function asSentence(message) {
  return message.charAt(0).toUpperCase() + message.slice(1);
}
