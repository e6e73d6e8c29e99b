// PyTorch on the same device, in a process of its own: it ends before ours is timed, so that neither waits for the other.
import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { casesOf, configOf } from "./cases.mjs";

/** The cases that PyTorch is asked for. */
function asked(session, options) {
  const cases = casesOf(session.bench, options);
  if (session.bench === "model") return { ...cases, shape: configOf(cases) };
  return cases;
}

/** Times the peer's cases and records them beside ours; says so when there is no PyTorch with a GPU. */
export async function peer(session, options) {
  if (options.backend === "reference") return;
  const script = fileURLToPath(new URL("peer/torch_peer.py", import.meta.url));
  const { signal } = session;
  const child = spawn("python3", [script, session.bench, String(session.runs)], {
    signal,
    stdio: ["pipe", "pipe", "pipe"],
  });
  let complaint = "";
  child.stderr.on("data", (data) => {
    complaint = `${complaint}${data}`.slice(-2000);
  });
  const ended = new Promise((resolve) => {
    child.on("error", (error) => resolve(error.message));
    child.on("close", (code) => resolve(code === 0 ? null : complaint.trim().split("\n").at(-1)));
  });
  child.stdin.on("error", () => {});
  child.stdin.end(JSON.stringify(asked(session, options)));
  for await (const line of createInterface({ input: child.stdout })) {
    const { samples, ...about } = JSON.parse(line);
    const row = { ...about, peer: "torch" };
    if (samples === undefined) {
      session.refuse(row, row.refused);
      continue;
    }
    samples.sort((a, b) => a - b);
    const rate =
      about.tokens === undefined ? {} : { rate: about.tokens / samples[samples.length >> 1], unit: "tokens/s" };
    session.record({ ...row, ...rate, samples });
  }
  const failed = await ended;
  signal.throwIfAborted();
  if (failed !== null) session.note(`no peer: ${failed}`);
}
