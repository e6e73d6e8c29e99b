// A thousand generations on the native backend must leave memory where it was: `FEWBIT=/path node bench/gpu/leak.mjs [COUNT]`.
// Compares the addon's counters and the process's resident memory after the first tenth with those at the end.
import { pathToFileURL } from "node:url";

const root = process.env.FEWBIT ?? process.cwd();
const from = (path) => import(pathToFileURL(`${root}/dist/${path}`).href);
const { openCuda } = await from("backends/native/device.js");
const { Device, loadModel } = await from("index.js");
/** Kept for the next use: their number follows from what was in flight at once. */
const KEPT = new Set(["rss", "events"]);
const count = Number(process.argv[2] ?? 1000);

const backend = await openCuda();
const device = new Device(backend);
const model = await loadModel(`${root}/models/fewbit-tiny`, { device, quantize: "int4wo-64", context: 64 });
const snapshot = () => ({ ...backend.counters, rss: process.memoryUsage().rss });
let first = null;
const start = performance.now();
for (let i = 0; i < count; i++) {
  for await (const _ of model.generate("Once", { maxTokens: 8, seed: i, temperature: 1 }));
  if (i + 1 === Math.ceil(count / 10)) first = snapshot();
}
globalThis.gc?.();
const last = snapshot();
console.log(`${count} generations of 8 tokens in ${((performance.now() - start) / 1000).toFixed(1)} s`);
console.log(JSON.stringify({ first, last }));
const same = Object.keys(first).filter((name) => !KEPT.has(name) && first[name] !== last[name]);
const grown = (last.rss - first.rss) / 2 ** 20;
model[Symbol.dispose]();
const after = backend.counters;
const ok = same.length === 0 && grown < 64 && after.bytes === 0 && after.programs === 0 && after.graphs === 0;
console.log(
  `${ok ? "ok" : "FAIL"}: counters that changed: ${same.join(", ") || "none"}; resident memory grew by ${grown.toFixed(1)} MiB; after disposal ${JSON.stringify(after)}`,
);
await device[Symbol.asyncDispose]();
process.exitCode = ok ? 0 : 1;
