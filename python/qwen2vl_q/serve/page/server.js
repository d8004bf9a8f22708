// The server's API.

/** An answer that is no answer; status 0: there is none. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) });

async function request(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer.");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new ServerError(answer.status, told?.error?.message ?? `The server says ${answer.status}.`);
}

/** The name of the model. */
export async function modelName(key) {
  const answer = await request("v1/models", { headers: headers(key) });
  return (await answer.json()).data[0].id;
}

function brokenOff(error) {
  if (error?.name === "AbortError") throw error;
  throw new ServerError(0, "The answer broke off.");
}

/** Yields the chunks of a streamed answer. */
export async function* complete(body, key, signal) {
  const answer = await request("v1/chat/completions", {
    method: "POST",
    headers: headers(key),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(brokenOff);
    if (done) brokenOff();
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(500, chunk.error.message);
      yield chunk;
    }
  }
}
