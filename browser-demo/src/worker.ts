import { version } from "../../package.json";
import { requestGpu } from "../../src/backends/webgpu/adapter.js";
import { FewbitError, throwIfAborted } from "../../src/core/errors.js";
import { loadModel, type Model } from "../../src/models/model.js";
import { listQuantizeNames } from "../../src/quantize/names.js";
import { type Device, open } from "../../src/runtime/device.js";
import { caseTable, DEFAULT_SEED, selectCases } from "../../src/validate/cases.js";
import { type CaseDifference, diffReports } from "../../src/validate/diff.js";
import { logitDifferences } from "../../src/validate/logits.js";
import { missingKernels } from "../../src/validate/missing.js";
import { columnOf, countResults, isReport, parseReport, type Report, reportJson } from "../../src/validate/report.js";
import { type CaseResult, runCases } from "../../src/validate/run.js";
import { lackingFeature, ReportDraft, TIERS, type ValidateEvent, validate } from "../../src/validate/run-tiers.js";
import { destroyAll, trackDevices } from "./live-devices.js";
import { modelConfig, modelFiles } from "./model-files.js";
import type {
  AdapterCard,
  AdapterLimit,
  CallName,
  Calls,
  Comparison,
  Failure,
  GenerateArguments,
  GenerateNotice,
  LightResult,
  Reply,
  ReportSummary,
  Request,
  ValidateArguments,
  ValidateNotice,
} from "./protocol.js";

trackDevices();

type Handler<Name extends CallName> = (
  args: Calls[Name]["args"],
  notice: (value: Calls[Name]["notice"]) => void,
  signal: AbortSignal,
) => Promise<Calls[Name]["result"]>;

const HANDLERS: { readonly [Name in CallName]: Handler<Name> } = {
  adapter: (_, __, signal) => adapterCard(signal),
  names: async () => listQuantizeNames(),
  cases: async ({ quick }) =>
    selectCases(caseTable(), { quick }).flatMap(({ op, format, runs }) => runs.map(({ id }) => ({ id, op, format }))),
  validate: (args, notice, signal) => alone(signal, () => runValidation(args, notice, signal)),
  detail: runDetail,
  generate: (args, notice, signal) =>
    alone(
      signal,
      () => runGeneration(args, notice, signal),
      () => notice({ kind: "stage", text: "Waiting for the other run to finish", done: 0, total: 1 }),
    ),
  report: async () => new Blob([reportJson(currentReport())], { type: "application/json" }),
  compare: async ({ a, b }) => comparison(await named(a), await named(b)),
  lose: async () => destroyAll(),
};

const running = new Map<number, AbortController>();

self.addEventListener("message", async ({ data }: MessageEvent<Request>) => {
  if ("cancel" in data) return running.get(data.id)?.abort();
  const { id, call, args } = data;
  const controller = new AbortController();
  running.set(id, controller);
  const reply = (message: Reply) => self.postMessage(message);
  try {
    const handler = HANDLERS[call] as Handler<CallName>;
    const result = await handler(args as never, (notice) => reply({ id, notice }), controller.signal);
    reply({ id, result });
  } catch (error) {
    reply({ id, error: failureOf(error) });
  } finally {
    running.delete(id);
  }
});

/** Work that is timed runs alone: what comes meanwhile waits for its turn, unless it is cancelled before. */
let occupied: Promise<unknown> | null = null;

async function alone<T>(signal: AbortSignal, work: () => Promise<T>, waiting: () => void = () => {}): Promise<T> {
  const aborted = new Promise<never>((_, reject) =>
    signal.addEventListener("abort", () => reject(new FewbitError("operation/aborted", { operation: "waiting" }))),
  );
  aborted.catch(() => {});
  while (occupied !== null) {
    waiting();
    await Promise.race([occupied, aborted]);
  }
  const mine = work();
  occupied = mine
    .catch(() => {})
    .then(() => {
      occupied = null;
    });
  return mine;
}

function failureOf(error: unknown): Failure {
  if (error instanceof FewbitError) return { code: error.code, message: error.message, hint: error.hint };
  const message = error instanceof Error ? error.message : String(error);
  return { code: "unexpected", message, hint: undefined };
}

// --- the adapter ---------------------------------------------------------------------------------------------------

/** Configs whose plans between them use every kind of linear kernel. */
const PLANNED = ["int4wo-64", "int8dq"];

const LIMITS = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxStorageBuffersPerShaderStage",
] as const satisfies readonly (keyof GPUSupportedLimits)[];

async function adapterCard(signal: AbortSignal): Promise<AdapterCard> {
  const { adapter, name, kind, reason, info } = await requestGpu({ signal });
  const features = [...adapter.features].sort();
  const most = LIMITS.map((limit) => adapter.limits[limit]);
  // A device that asks for nothing has what WebGPU guarantees.
  const plain = await adapter.requestDevice();
  const limits = LIMITS.map((limit, i): AdapterLimit => {
    return { name: limit, value: most[i] as number, guaranteed: plain.limits[limit] };
  });
  plain.destroy();
  const config = await modelConfig();
  await using device = await open({ prefer: ["webgpu"], signal });
  const { capabilities } = device;
  return {
    name,
    kind,
    reason,
    info,
    features,
    limits,
    missing: PLANNED.flatMap((quantize) =>
      missingKernels(capabilities, config, quantize).map((kernel) => ({ ...kernel, quantize })),
    ),
    tiers: TIERS.map((tier) => ({ tier, absent: lackingFeature(tier, new Set(features)) })),
  };
}

// --- validation ----------------------------------------------------------------------------------------------------

/** The run that the page shows; kept here, so that reports are made and compared beside the page. */
interface Run {
  readonly draft: ReportDraft;
  seconds: number;
}

let run: Run | null = null;

async function runValidation(
  { quick, tiers, resume }: ValidateArguments,
  notice: (value: ValidateNotice) => void,
  signal: AbortSignal,
): Promise<null> {
  const about = { fewbit: version, host: navigator.userAgent, created: new Date().toISOString(), seed: DEFAULT_SEED };
  const current: Run = resume && run !== null ? run : { draft: new ReportDraft(about), seconds: 0 };
  run = current;
  const done = new Set(current.draft.results.map((result) => `${columnOf(result)} ${result.id}`));
  const before = current.seconds;
  const start = performance.now();
  const options = {
    backends: ["webgpu" as const],
    selection: { quick },
    shaders: true,
    signal,
    skip: (device: string, id: string) => done.has(`${device} ${id}`),
    ...(tiers === null ? {} : { tiers }),
  };
  try {
    for await (const event of validate(options)) {
      current.draft.add(event);
      current.seconds = before + (performance.now() - start) / 1000;
      notice(lightEvent(event));
    }
  } finally {
    current.seconds = before + (performance.now() - start) / 1000;
  }
  return null;
}

function lightEvent(event: ValidateEvent): ValidateNotice {
  if (event.kind === "result") return { kind: "result", result: light(event.result) };
  if (event.kind !== "culprit") return event;
  const { backend, tier, feature, cases } = event.culprit;
  const what =
    feature === null ? "whatever is switched off, cases still fail" : `the failures go away without ${feature}`;
  return { kind: "culprit", text: `${backend}/${tier}: ${what} (${cases.join(", ")})` };
}

function light({ wgsl: _, explanation: __, outputs: ___, ...result }: CaseResult): LightResult {
  return result;
}

async function runDetail({ id, tier }: Calls["detail"]["args"], _: unknown, signal: AbortSignal): Promise<CaseResult> {
  const known = TIERS.find((name) => name === tier);
  await using device = await open({ prefer: ["webgpu"], signal, ...(known && { tier: known }) });
  const programs = selectCases(caseTable(), { ids: [id] });
  for await (const result of runCases(device, programs, {
    tier,
    seed: DEFAULT_SEED,
    signal,
    shaders: true,
    detail: true,
  }))
    return result;
  throw new FewbitError("argument/unknown-name", { kind: "case", name: id, nearest: [] });
}

// --- reports -------------------------------------------------------------------------------------------------------

function currentReport(): Report {
  if (run !== null) return run.draft.report(run.seconds);
  throw new FewbitError("argument/invalid", { name: "run", value: null, expected: "a validation to be started first" });
}

async function named(file: File | null): Promise<readonly [name: string, report: Report]> {
  if (file === null) return ["this run", currentReport()];
  let value: unknown;
  try {
    value = parseReport(await file.text());
  } catch (cause) {
    throw new FewbitError("io/malformed", { path: file.name, reason: (cause as Error).message }, { cause });
  }
  if (isReport(value)) return [file.name, value];
  throw new FewbitError("io/malformed", { path: file.name, reason: "it is no report of fewbit validate" });
}

function comparison(
  ...[[nameA, a], [nameB, b]]: readonly [readonly [string, Report], readonly [string, Report]]
): Comparison {
  const { status, details, same } = diffReports(a, b);
  const slim = (list: readonly CaseDifference[]) => list.map(({ id, device, changes }) => ({ id, device, changes }));
  return { a: summaryOf(nameA, a), b: summaryOf(nameB, b), status: slim(status), details: slim(details), same };
}

function summaryOf(name: string, { fewbit, created, host, devices, results }: Report): ReportSummary {
  const byName = new Map<string, string[]>();
  for (const device of devices) {
    const { name: adapter } = device.info;
    byName.set(adapter, [...(byName.get(adapter) ?? []), columnOf(device)]);
  }
  const list = [...byName].map(([adapter, columns]) => `${adapter}: ${columns.join(", ")}`);
  return { name, fewbit, created, host, devices: list, ...countResults(results) };
}

// --- text ----------------------------------------------------------------------------------------------------------

async function runGeneration(
  args: GenerateArguments,
  notice: (value: GenerateNotice) => void,
  signal: AbortSignal,
): Promise<null> {
  await using device = await open({ prefer: ["webgpu"], signal });
  using model = await load(device, args.quantize, "this GPU", notice, signal);
  const prompt = model.tokenizer.encode(args.prompt);
  const ids: number[] = [];
  const { maxTokens, temperature, seed } = args;
  for await (const { id, text, logprob } of model.generate(prompt, { maxTokens, temperature, seed, signal })) {
    ids.push(id);
    notice({ kind: "token", text, logprob });
  }
  const { statistics, weightBytes } = model;
  if (statistics !== null) notice({ kind: "speed", speed: { ...statistics, weightBytes } });
  if (!args.compare || ids.length === 0) return null;

  await using reference = await open({ prefer: ["reference"], signal });
  using definition = await load(reference, args.quantize, "the reference", notice, signal);
  // The last token is not read by anything that was generated.
  let i = 0;
  for await (const difference of logitDifferences(model, definition, prompt, ids.slice(0, -1), signal)) {
    notice({ kind: "difference", difference, token: model.tokenizer.decode([ids[i++] as number]) });
    // The reference computes without a pause: this is where a cancel is heard.
    await new Promise((resolve) => setTimeout(resolve));
    throwIfAborted(signal, "comparing logits");
  }
  return null;
}

async function load(
  device: Device,
  quantize: string,
  where: string,
  notice: (value: GenerateNotice) => void,
  signal: AbortSignal,
): Promise<Model> {
  const stage = (text: string, done: number, total: number) => notice({ kind: "stage", text, done, total });
  stage(`Loading the model for ${where}`, 0, 1);
  return loadModel(await modelFiles(), {
    device,
    quantize,
    signal,
    onProgress: ({ stage: name, done, total }) => {
      if (name === "quantize") stage(`Quantizing and uploading for ${where}`, done, total);
      else if (done >= total) stage(`Building kernels for ${where}`, done, total);
    },
  });
}
