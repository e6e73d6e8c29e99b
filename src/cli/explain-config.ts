import { readFile } from "node:fs/promises";
import { basename } from "node:path";
import type { Capabilities } from "../backends/backend.js";
import { cudaCapabilities, H100 } from "../backends/native/capabilities.js";
import { NATIVE_KERNELS } from "../backends/native/kernels/table.js";
import { openTrace } from "../backends/trace/device.js";
import { WEBGPU_KERNELS } from "../backends/webgpu/kernels/table.js";
import { FewbitError } from "../core/errors.js";
import { type Outline, outlineModel } from "../models/outline.js";
import { explainPlan } from "../plan/plan.js";
import { Device } from "../runtime/device.js";
import type { ModelOptions } from "./options.js";
import { type Cli, count, printJson, showBytes, table } from "./terminal.js";

interface ConfigOptions extends ModelOptions {
  readonly tokens: number;
  /** Decimal gigabytes and megabytes. */
  readonly memory?: number;
  readonly maxBinding?: number;
}

/** A discrete GPU as Dawn shows it on Linux: the largest storage binding is 2 GiB - 4. */
const IMAGINED: Capabilities = {
  features: new Set(["shader-f16", "subgroups"]),
  maxBinding: 2 ** 31 - 4,
  maxBuffer: 2 ** 32,
  workgroupMemory: 32768,
  maxInvocations: 1024,
  maxWorkgroupsPerDimension: 65535,
  maxStorageBuffers: 10,
  subgroupSize: [32, 32],
  bandwidth: 1e12,
  flops: 2e13,
  dispatchSeconds: 2e-6,
};

/** Plans a model from its config.json without a GPU. Throws `plan/memory` for what the imagined device cannot hold. */
export async function explainConfig(
  cli: Pick<Cli, "out" | "err" | "json">,
  file: string,
  options: ConfigOptions,
): Promise<void> {
  const { memory, maxBinding } = options;
  const cuda = options.backend === "cuda";
  const capabilities: Capabilities = {
    ...(cuda ? cudaCapabilities(H100) : IMAGINED),
    ...(maxBinding === undefined ? {} : { maxBinding: maxBinding * 1e6 }),
    ...(memory === undefined ? {} : { memory: memory * 1e9 }),
  };
  const name = `an imagined ${cuda ? H100.name : "GPU"}, planned for and not opened`;
  const kernels = cuda ? NATIVE_KERNELS : WEBGPU_KERNELS;
  await using device = new Device(openTrace({ name, kernels, capabilities }));
  const { quantize, kv, attention, context, tokens } = options;
  const outline = outlineModel(await readConfig(file), {
    device,
    ...(quantize === "none" ? {} : { quantize }),
    kv,
    attention,
    prefillChunk: tokens,
    ...(context === undefined ? {} : { context }),
  });
  if (cli.json) {
    const { plan, bytes } = outline;
    const steps = plan.buckets.map(({ symbols, choices }) => ({
      symbols,
      steps: choices.map((choice) => choice.explanation),
    }));
    return printJson(cli.out, {
      command: "explain",
      config: file,
      quantize,
      kv,
      attention,
      context: outline.context,
      bytes,
      plan: { buckets: steps },
    });
  }
  cli.err.write(`${explainPlan(outline.plan)}\n\n`);
  cli.out.write(table(rows(file, options, outline), cli.out.color));
}

function rows(
  file: string,
  { quantize, kv, attention, memory }: ConfigOptions,
  { config, context, bytes }: Outline,
): [string, string][] {
  const heads = `${config.layers} layers, ${config.heads} heads over ${config.kvHeads} KV heads of ${config.headDim}`;
  return [
    ["model", `${config.architecture}, ${heads}`],
    ["config", `${basename(file)}, weights ${quantize}, KV ${kv}, attention ${attention}`],
    ["context", `${count(context, "token")}, ${showBytes(bytes.cachePerToken)} of cache each`],
    ["weights", exact(bytes.weights)],
    ["KV cache", exact(bytes.cache)],
    ["activations", exact(bytes.activations)],
    ["scratch", exact(bytes.scratch)],
    ["total", `${exact(bytes.total)}${memory === undefined ? "" : `, of ${showBytes(memory * 1e9)}`}`],
  ];
}

const exact = (bytes: number) => `${showBytes(bytes)} (${bytes.toLocaleString("en-US")} B)`;

async function readConfig(path: string): Promise<Readonly<Record<string, unknown>>> {
  const text = await readFile(path, "utf8").catch((cause: NodeJS.ErrnoException) => {
    throw new FewbitError("io/not-found", { path, reason: cause.code ?? cause.message }, { cause });
  });
  try {
    const json: unknown = JSON.parse(text);
    if (typeof json === "object" && json !== null && !Array.isArray(json)) return json as Record<string, unknown>;
  } catch (cause) {
    throw new FewbitError("io/malformed", { path, reason: "it is not JSON" }, { cause });
  }
  throw new FewbitError("io/malformed", { path, reason: "it is not an object" });
}
