// Generates images over a bad connection: none is lost, and none is generated twice.
//
//     import { generate } from "./retry.mjs";
//     const job = await generate("http://127.0.0.1:7860", { prompt: "a lighthouse", steps: 20 });
//     await fs.promises.writeFile("lighthouse.png", Buffer.from(job.images[0], "base64"));

import { randomUUID } from "node:crypto";

// One request, again and again until it is answered.
async function call(url, options) {
  for (;;) {
    const attempt = new AbortController();
    const timer = setTimeout(() => attempt.abort(), 60_000);
    const response = await fetch(url, { ...options, signal: attempt.signal }).catch(() => null);
    const text = (await response?.text().catch(() => null)) ?? null; // null: no connection, or it broke
    clearTimeout(timer);
    if (text !== null && ![502, 503, 504].includes(response.status)) { // which is a proxy's word, not the webui's
      if (!response.ok) throw new Error(`${response.status}: ${text}`);
      return JSON.parse(text);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
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
  }
}
