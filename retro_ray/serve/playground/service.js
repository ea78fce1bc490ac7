// The service as this page sees it: JSON requests, and completions as a stream of events.

let apiKey = "";

/** The key that goes with every request from now on; "" for none. */
export function useApiKey(key) {
  apiKey = key.trim();
}

/** A refusal or a failure, with a message for people. `status` is HTTP's, or 0 when no answer came. */
export class ServiceError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service does not answer. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `The service answered ${response.status} ${response.statusText}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not OpenAI's form: something in between answered.
  }
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` (Try again in ${wait} s.)`;
  return new ServiceError(message, response.status);
}

/** The answer to a GET, or to a POST of `body`, as an object. */
export async function fetchJson(path, options) {
  return (await request(path, options)).json();
}

/** The chunks of a streamed completion, in order; ends after [DONE]. Throws ServiceError when it breaks off. */
export async function* streamCompletion(body, signal) {
  const response = await request("v1/completions", { body: { ...body, stream: true }, signal });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServiceError(chunk.error.message);
    yield chunk;
  }
  throw new ServiceError("The answer broke off: the connection ended before the text did.");
}

// The data of each event. (ReadableStream is not iterable in every browser, so it is read by hand.)
async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServiceError("The answer broke off: the connection was lost.");
    });
    if (done) return;
    const lines = (pending + value).split(/\r?\n/);
    pending = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}
