// Generates images over a bad connection: none is lost, and none is generated twice.
//
//     import { generate } from "./retry.mjs";
//     const job = await generate("http://127.0.0.1:7860", { prompt: "a lighthouse", steps: 20 });
//     await fs.promises.writeFile("lighthouse.png", Buffer.from(job.images[0], "base64"));

import { randomUUID } from "node:crypto";

const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

// The status, Retry-After and text of one response. Throws if it breaks, or after a minute of silence.
async function receive(request, attempt) {
  const timer = setTimeout(() => attempt.abort(new Error("a minute of silence")), 60_000);
  try {
    const response = await fetch(request);
    const decoder = new TextDecoder();
    let text = "";
    for await (const chunk of response.body ?? []) {
      timer.refresh();
      text += decoder.decode(chunk, { stream: true });
    }
    return { status: response.status, retryAfter: Number(response.headers.get("Retry-After")) || 0, text };
  } finally {
    clearTimeout(timer);
  }
}

// The JSON object in a text. Empty for anything else: a gateway's HTML page, or white space alone.
function jsonOf(text) {
  try {
    return Object(JSON.parse(text));
  } catch {
    return {};
  }
}

// One request, again and again until the webui itself answers it.
async function call(url, options) {
  let doubtful = 0;
  for (let attempt = 1; ; attempt++) {
    const controller = new AbortController();
    const request = new Request(url, { ...options, signal: controller.signal }); // throws if it can never be sent
    let wait = Math.min(attempt, 30);
    let problem;
    const response = await receive(request, controller).catch((error) => { problem = error.cause ?? error; });
    if (response) {
      const { status, text } = response;
      const answer = jsonOf(text);
      if (status < 300 && ("id" in answer || "images" in answer)) return answer;
      problem = `${request.method} ${url}: ${status} ${text.slice(0, 1000)}`;
      // These say that another try may go well, whoever sends them. The rest is a refusal if the request is at
      // fault or the webui says why. Otherwise it may be a gateway, or a webui that is starting: "Not Found".
      if (![408, 425, 429].includes(status) && status <= 500) {
        const refused = [400, 401, 413, 422].includes(status) || (answer.detail ?? "Not Found") !== "Not Found";
        if (refused || ++doubtful === 30) throw new Error(problem);
      }
      wait = Math.max(wait, Math.min(response.retryAfter, 60));
    }
    console.warn(`Trying again in ${wait} s: ${problem}`);
    await sleep(wait * (1 + Math.random() / 2));
  }
}

export async function generate(url, request, headers = {}) {
  // The key makes all attempts one generation; it is accepted at once, and we come back for the images.
  let job = await call(`${url}/sdapi/v1/txt2img`, {
    method: "POST",
    body: JSON.stringify(request),
    headers: {
      "Content-Type": "application/json",
      "Idempotency-Key": randomUUID(),
      Prefer: "respond-async",
      ...headers,
    },
  });
  if (!job.id) throw new Error("jobs are not tracked: this webui would generate anew with every attempt");
  for (;;) {
    job = await call(`${url}/sdapi/v1/job/${job.id}?wait=20`, { headers });
    if (job.status === "Completed") return job;
    if (job.status === "Failed") throw new Error(job.error);
    await sleep(1); // in case something between answers for the webui at once
  }
}
