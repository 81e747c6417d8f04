// Receives the ends of jobs, checks who sent them, and fetches their images.
//
// npm install express standardwebhooks
// WEBHOOK_SECRET=whsec_... PORT=9000 node receiver.mjs

import { writeFile } from "node:fs/promises";
import express from "express";
import { Webhook } from "standardwebhooks";

const WEBUI = "http://127.0.0.1:7860";
const webhook = new Webhook(process.env.WEBHOOK_SECRET);
const seen = new Set(); // what was received since the start: what comes again after that is done again
const app = express();

// The bytes as they came. Express takes 100 kB by itself, and a job with a long prompt has more.
app.post("/job-ended", express.raw({ type: "*/*", limit: "10mb" }), (request, response) => {
  let event;
  try {
    event = webhook.verify(request.body, request.headers);
  } catch {
    response.sendStatus(401);
    return;
  }
  response.sendStatus(204);
  const id = request.headers["webhook-id"];
  if (seen.has(id)) return;
  seen.add(id);
  handle(event.data).catch(console.error);
});

async function handle(job) {
  console.log(job.id, job.status, job.label, job.error);
  for (const [number, path] of job.image_urls.entries()) {
    const url = path.startsWith("/") ? WEBUI + path : path;
    const response = await fetch(url); // headers: { Authorization: `Basic ${btoa("user:password")}` }
    if (!response.ok) throw new Error(`${url}: ${response.status}`);
    const ending = response.headers.get("Content-Type").split("/")[1];
    await writeFile(`${job.id}-${number}.${ending}`, Buffer.from(await response.arrayBuffer()));
  }
}

app.listen(process.env.PORT);
