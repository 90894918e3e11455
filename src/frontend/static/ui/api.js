// Calls the server: the list of models, and chat completions as a stream.

export class ApiError extends Error {
  constructor(message, { status = 0, code = "", retryAfter = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

const headersFor = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const told = { status: response.status, retryAfter: response.headers.get("Retry-After") ?? "" };
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { ...told, code: error.code ?? "" });
  } catch {
    return new ApiError(`The server answered ${response.status} ${response.statusText}.`, told);
  }
}

/** The entries of /v1/models. */
export async function models(key) {
  const response = await call("/v1/models", { headers: headersFor(key) });
  return (await response.json()).data;
}

/** Posts a chat; yields each chunk of the stream. Throws ApiError, also for an error within the stream. */
export async function* chat(body, key, signal) {
  const response = await call("/v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json", Accept: "text/event-stream", ...headersFor(key) },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { code: chunk.error.code ?? "" });
    yield chunk;
  }
  throw new ApiError("The connection was lost before the answer was complete.");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
