import { FewbitError, nearestNames, throwIfAborted } from "../core/errors.js";
import { contextOf, type GoldenBackend, type GoldenHandler, type GoldenPrimitives } from "./golden-case.js";
import { ATTENTION_AND_TRAINING } from "./golden-cases-attention.js";
import { BASIC } from "./golden-cases-basic.js";
import { CALIBRATION } from "./golden-cases-calibration.js";
import { FLOAT } from "./golden-cases-float.js";
import { INTEGER } from "./golden-cases-integer.js";
import { MICRO } from "./golden-cases-micro.js";
import {
  type Check,
  checkTensorValues,
  type GoldenCase,
  type GoldenFile,
  type GoldenManifest,
  readGoldenFile,
} from "./golden-tensors.js";

export * from "./golden-case.js";
export * from "./golden-tensors.js";

/** How the cases of each config of the manifest are run. */
export const GOLDEN_HANDLERS: Readonly<Record<string, GoldenHandler>> = {
  ...BASIC,
  ...FLOAT,
  ...INTEGER,
  ...MICRO,
  ...CALIBRATION,
  ...ATTENTION_AND_TRAINING,
};

export interface GoldenResult {
  readonly case: string;
  readonly config: string;
  readonly status: "passed" | "failed" | "unsupported";
  /** Why a case failed or cannot run; null when it passed. */
  readonly reason: string | null;
  /** What of the case ran on the host, and why: a handler's own preparation, formats that the backend quantizes there. */
  readonly host: readonly string[];
  /** How often the case asked the backend for something. */
  readonly calls: number;
  readonly checks: readonly Check[];
}

export interface GoldenOptions {
  readonly manifest: GoldenManifest;
  /** The bytes of one file of the golden directory. */
  readonly readFile: (name: string) => Promise<Uint8Array>;
  readonly backend: GoldenBackend;
  /** Only cases for which this is true. */
  readonly filter?: (golden: GoldenCase) => boolean;
  readonly signal?: AbortSignal;
}

/**
 * Runs every case of a manifest on a backend, in order. A case passes when every tensor it defines agrees under the
 * manifest's tolerance; a defined tensor that no result was given for fails it. Nothing is skipped: what a backend
 * lacks is `unsupported` with the reason.
 */
export async function* runGolden(options: GoldenOptions): AsyncGenerator<GoldenResult> {
  for (const golden of options.manifest.cases) {
    throwIfAborted(options.signal, "running golden cases");
    if (options.filter?.(golden) === false) continue;
    yield await runCase(golden, options);
  }
}

async function runCase(golden: GoldenCase, { readFile, backend }: GoldenOptions): Promise<GoldenResult> {
  const onHost = new Set<string>();
  let calls = 0;
  const result = (
    status: GoldenResult["status"],
    reason: string | null,
    checks: readonly Check[] = [],
  ): GoldenResult => ({
    case: golden.name,
    config: golden.config,
    status,
    reason,
    host: [...onHost],
    calls,
    checks,
  });
  const handler = GOLDEN_HANDLERS[golden.config];
  if (handler === undefined) {
    const nearest = nearestNames(golden.config, Object.keys(GOLDEN_HANDLERS), 2).join(", ");
    return result("unsupported", `no known way to run config "${golden.config}" (nearest: ${nearest})`);
  }
  const needs = typeof handler.needs === "function" ? handler.needs(golden) : handler.needs;
  const missing = needs.filter((primitive) => backend.primitives[primitive] === undefined);
  if (missing.length > 0) {
    const reasons = missing.map((primitive) => backend.lacks?.[primitive] ?? `${backend.name} has no ${primitive}`);
    return result("unsupported", reasons.join("; "));
  }
  try {
    const openFile = async (name: string) => readGoldenFile(await readFile(name), name);
    const file = await openFile(golden.file);
    const results: [name: string, values: ArrayLike<number>][] = [];
    const primitives = observed(backend, (reason) => {
      calls++;
      if (reason !== null) onHost.add(reason);
    });
    if (handler.host !== undefined) onHost.add(handler.host);
    await handler.run(contextOf(golden, file, primitives, results, openFile));
    const checks = checkAll(golden, file, results);
    const failed = checks.filter((check) => check.mismatch !== null);
    if (failed.length === 0) return result("passed", null, checks);
    return result("failed", failed.map((check) => `${check.tensor}: ${check.mismatch}`).join("; "), checks);
  } catch (error) {
    if (error instanceof FewbitError && (error.code === "plan/no-kernel" || error.code === "quantize/unsupported")) {
      return result("unsupported", error.message);
    }
    if (error instanceof FewbitError && error.code === "operation/aborted") throw error;
    return result("failed", error instanceof Error ? error.message : String(error));
  }
}

/** A backend's primitives that tell of every call, and of quantization that the backend leaves to the host. */
function observed(backend: GoldenBackend, tell: (host: string | null) => void): GoldenPrimitives {
  const entries = Object.entries(backend.primitives).map(([name, call]) => [
    name,
    (...args: unknown[]) => {
      const quantizing = name === "quantize" ? (args as Parameters<GoldenPrimitives["quantize"]>) : null;
      tell(quantizing === null ? null : (backend.quantizesOnHost?.(quantizing[3], quantizing[4]) ?? null));
      return (call as (...args: unknown[]) => unknown)(...args);
    },
  ]);
  return Object.fromEntries(entries) as GoldenPrimitives;
}

function checkAll(
  golden: GoldenCase,
  file: GoldenFile,
  results: readonly (readonly [string, ArrayLike<number>])[],
): Check[] {
  const checks: Check[] = [];
  for (const info of golden.tensors) {
    if (info.tolerance.kind === "info") continue;
    const given = results.filter(([name]) => name === info.name);
    if (given.length === 0) {
      checks.push({ tensor: info.name, tolerance: info.tolerance.kind, mismatch: "no result was given" });
    }
    for (const [, values] of given) checks.push(checkTensorValues(info, file.numbers(info.name), values, golden, file));
  }
  return checks;
}
