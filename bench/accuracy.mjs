// `node bench/accuracy.mjs --work DIR --json FILE --run cuda=4,reference=12`: `fewbit eval` of many names on many backends, several
// processes side by side, for a machine with cores to spare. A JSON line for every row as it comes; a line says how far it is from
// models/reference-perplexity.json. Stopped or out of time, it keeps every window in DIR and goes on after them. FEWBIT names another built package.
import { spawn } from "node:child_process";
import { appendFileSync, readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { fileURLToPath } from "node:url";
import { ACCURACY_NAMES, Command } from "./library.mjs";
import { commit } from "./session.mjs";

const root = fileURLToPath(new URL("..", import.meta.url));
const cli = `${process.env.FEWBIT ?? root}/dist/cli/main.js`;
const { rows: references } = JSON.parse(readFileSync(`${root}/models/reference-perplexity.json`, "utf8"));
const figure = new Map(references.map(({ quantize, bf16 }) => [quantize, bf16]));

const { run, work, json, seconds, names, processes, model, label } = new Command("accuracy")
  .requiredOption("--run <backend=n,...>", "backends in order, and processes of each at most")
  .requiredOption("--work <dir>", "windows that are done")
  .requiredOption("--json <file>", "JSON lines, appended")
  .option("--names <list>", "short names, reference (those with a figure) or all", "reference")
  .option("--processes <n>", "at most, of all backends", String(availableParallelism()))
  .option("--seconds <n>", "when to stop", String(24 * 3600))
  .option("--model <dir>", "a model folder", "models/fewbit-tiny")
  .option("--label <text>", "what the rows are called when --model is a quantized one")
  .parse()
  .opts();
const all = { all: ACCURACY_NAMES, reference: [...figure.keys()] }[names] ?? names.split(",");
const limits = new Map(run.split(",").map((each) => [each.split("=")[0], Number(each.split("=")[1])]));
// Names that have a figure come first.
const groups = [all.filter((name) => figure.has(name)), all.filter((name) => !figure.has(name))];
const jobs = groups.flatMap((group) =>
  [...limits.keys()].flatMap((backend) => group.map((quantize) => ({ backend, quantize }))),
);
const running = new Map();
const begun = performance.now();
let stopped = false;
let failed = 0;

function stop() {
  stopped = true;
  for (const child of running.keys()) child.kill("SIGINT");
}
process.once("SIGINT", stop);
const timer = setTimeout(stop, Number(seconds) * 1000);

/** The next job of a backend that has room. */
function next() {
  const active = (backend) => [...running.values()].filter((job) => job.backend === backend).length;
  const index = jobs.findIndex(({ backend }) => active(backend) < limits.get(backend));
  return index < 0 ? undefined : jobs.splice(index, 1)[0];
}

function evaluate({ backend, quantize }) {
  const args = ["eval", model, "-q", quantize, "--backend", backend, "--work", `${work}/${backend}`, "--json"];
  const child = spawn(process.execPath, [cli, ...args], { stdio: ["ignore", "pipe", "inherit"] });
  const start = performance.now();
  let out = "";
  child.stdout.on("data", (data) => {
    out += data;
  });
  running.set(child, { backend, quantize });
  return new Promise((resolve) => {
    child.on("close", (code) => {
      running.delete(child);
      if (code !== 130) record(backend, quantize, out, (performance.now() - start) / 1000);
      resolve();
    });
  });
}

function record(backend, quantize, out, took) {
  const about = { backend, quantize: label ?? quantize };
  const { device, rows, error = out || "no output" } = readAnswer(out);
  if (rows?.[0]?.result === undefined) {
    failed++;
    return console.log(`${about.quantize} ${backend}: ${error.message ?? error}`);
  }
  const { perplexity, nll, weightBytes, windows } = rows[0].result;
  const torchao = figure.get(about.quantize);
  const difference = torchao === undefined ? undefined : perplexity / torchao - 1;
  const tokens = windows.reduce((sum, window) => sum + window.tokens, 0);
  const date = new Date().toISOString().slice(0, 10);
  const row = { bench: "accuracy", ...about, device: device.name, commit: commit(), date, perplexity, nll, tokens };
  const rest = { weightBytes, ...(torchao && { torchao, difference }), seconds: took };
  appendFileSync(json, `${JSON.stringify({ ...row, ...rest })}\n`);
  const away = difference === undefined ? "" : `  ${(100 * difference).toFixed(4)} %`;
  console.log(`${about.quantize} ${backend}: ${perplexity.toFixed(5)}${away}  ${took.toFixed(1)} s`);
}

function readAnswer(out) {
  try {
    return JSON.parse(out);
  } catch {
    return {};
  }
}

async function worker() {
  while (!stopped) {
    const job = next();
    if (job !== undefined) await evaluate(job);
    else if (jobs.length === 0) return;
    else await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

await Promise.all(Array.from({ length: Number(processes) }, worker));
clearTimeout(timer);
console.log(`${((performance.now() - begun) / 1000).toFixed(0)} s, ${jobs.length} rows not begun, ${failed} failed`);
process.exitCode = failed > 0 ? 1 : 0;
