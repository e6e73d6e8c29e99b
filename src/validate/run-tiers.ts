import type { Tier } from "../backends/webgpu/device.js";
import { type BackendName, type Device, type OpenOptions, open } from "../runtime/device.js";
import { type CaseProgram, caseTable, DEFAULT_SEED, type Selection, selectCases } from "./cases.js";
import { type Culprit, columnOf, describeDevice, type Report, type ReportedDevice } from "./report.js";
import { type CaseResult, makeOracle, type Oracle, type RunCasesOptions, runCases } from "./run.js";

export const TIERS: readonly Tier[] = ["default", "portable", "subgroups", "f16"];

/** The feature that makes a tier what it is; a device without it does not offer the tier. */
const FEATURE_OF: Readonly<Partial<Record<Tier, string>>> = { subgroups: "subgroups", f16: "shader-f16" };

/** The feature without which a device does not offer the tier, or null when it does. */
export function lackingFeature(tier: Tier, features: ReadonlySet<string>): string | null {
  const feature = FEATURE_OF[tier];
  return feature === undefined || features.has(feature) ? null : feature;
}

/** What can be switched off, most particular first. */
const FEATURES = ["chromium-experimental-subgroup-matrix", "shader-f16", "timestamp-query", "subgroups"] as const;
const LIMITS = "limits above WebGPU's defaults";

export interface ValidateOptions {
  /** Default: reference and webgpu. */
  readonly backends?: readonly BackendName[];
  /** Tiers of WebGPU devices; default: all, above the default one only the quick table's cases, of that those whose kernels differ. */
  readonly tiers?: readonly Tier[];
  readonly selection?: Selection;
  readonly seed?: number;
  readonly signal?: AbortSignal;
  /** Keep shaders in results. */
  readonly shaders?: boolean;
  /** More for `open`, e.g. the caller's own GPU. */
  readonly open?: Omit<OpenOptions, "prefer" | "tier" | "without">;
  /** Cases not to run, by device (as `columnOf` names it) and id: those that were done before a device was lost. */
  readonly skip?: (device: string, id: string) => boolean;
  /** Faults for `runCases`. */
  readonly faults?: Pick<RunCasesOptions, "rewrite" | "tamper">;
}

/** What happens while validating, in order. */
export type ValidateEvent =
  | { readonly kind: "device"; readonly device: ReportedDevice; readonly cases: number }
  | { readonly kind: "result"; readonly result: CaseResult }
  | { readonly kind: "absent"; readonly backend: string; readonly tier: string; readonly reason: string }
  | { readonly kind: "culprit"; readonly culprit: Culprit };

/**
 * Runs the case table on every backend and tier, telling everything as it happens. When a tier fails, its failing cases are run
 * again with one feature switched off after another, to name the one that breaks them.
 * Throws `device/unavailable` for a backend that gives no device, `operation/aborted`, `device/lost`.
 */
export async function* validate(options: ValidateOptions = {}): AsyncGenerator<ValidateEvent> {
  const { selection = { quick: true }, seed = DEFAULT_SEED, signal } = options;
  const programs = selectCases(caseTable({ seed }), selection);
  const oracle = makeOracle();
  for (const backend of options.backends ?? ["reference", "webgpu"]) {
    const tiers: readonly (Tier | null)[] = backend === "webgpu" ? (options.tiers ?? TIERS) : [null];
    for (const tier of tiers) {
      // Asked for by name a tier takes everything; otherwise the tiers above the default take what can differ there.
      const whole = options.tiers !== undefined || tier === null || tier === "default";
      const table = whole
        ? programs
        : selection.quick
          ? programs.filter(({ tiered }) => tiered)
          : selectCases(programs, { quick: true });
      const cases = without(table, columnOf({ backend, tier }), options.skip);
      await using device = await openTier(backend, tier, options);
      const lacking = tier === null ? null : lackingFeature(tier, device.capabilities.features);
      if (tier !== null && lacking !== null) {
        yield { kind: "absent", backend, tier, reason: `${device.info.name} has no ${lacking}` };
        continue;
      }
      yield {
        kind: "device",
        device: describeDevice(device, tier),
        cases: cases.reduce((sum, { runs }) => sum + runs.length, 0),
      };
      const run = { tier, seed, oracle, ...(signal && { signal }), ...options.faults };
      const failed: string[] = [];
      for await (const result of runCases(device, cases, { ...run, ...(options.shaders && { shaders: true }) })) {
        if (result.status === "failed") failed.push(result.id);
        yield { kind: "result", result };
      }
      if (tier === null || failed.length === 0) continue;
      for (const culprit of await blame(
        backend,
        tier,
        device,
        selectFailed(cases, failed),
        { ...options, seed },
        oracle,
      )) {
        yield { kind: "culprit", culprit };
      }
    }
  }
}

function without(programs: readonly CaseProgram[], device: string, skip: ValidateOptions["skip"]): CaseProgram[] {
  return programs.flatMap((program) => {
    const runs = program.runs.filter(({ id }) => !skip?.(device, id));
    return runs.length === 0 ? [] : [{ ...program, runs }];
  });
}

/** A report that grows by events, of one validation or of several that continue each other; it may be taken at any time. */
export class ReportDraft {
  readonly #about: Pick<Report, "fewbit" | "host" | "created" | "seed">;
  readonly #devices = new Map<string, ReportedDevice>();
  readonly #absent = new Map<string, Report["absent"][number]>();
  readonly #culprits: Culprit[] = [];
  readonly #results: CaseResult[] = [];

  constructor(about: Pick<Report, "fewbit" | "host" | "created" | "seed">) {
    this.#about = about;
  }

  get results(): readonly CaseResult[] {
    return this.#results;
  }

  add(event: ValidateEvent): void {
    if (event.kind === "device") this.#devices.set(columnOf(event.device), event.device);
    else if (event.kind === "result") this.#results.push(event.result);
    else if (event.kind === "culprit") this.#culprits.push(event.culprit);
    else {
      const { backend, tier, reason } = event;
      this.#absent.set(columnOf(event), { backend, tier, reason });
    }
  }

  /** `seconds`: how long it all took. */
  report(seconds: number): Report {
    const { fewbit, host, created, seed } = this.#about;
    return {
      format: 1,
      fewbit,
      host,
      created,
      seed,
      devices: [...this.#devices.values()],
      absent: [...this.#absent.values()],
      culprits: [...this.#culprits],
      results: [...this.#results],
      seconds,
    };
  }
}

/** Everything at once, as a report. `onEvent` sees events as they come. */
export async function makeReport(
  options: ValidateOptions,
  about: Pick<Report, "fewbit" | "host" | "created">,
  onEvent: (event: ValidateEvent) => void = () => {},
): Promise<Report> {
  const start = performance.now();
  const draft = new ReportDraft({ ...about, seed: options.seed ?? DEFAULT_SEED });
  for await (const event of validate(options)) {
    draft.add(event);
    onEvent(event);
  }
  return draft.report((performance.now() - start) / 1000);
}

function openTier(
  backend: BackendName,
  tier: Tier | null,
  options: ValidateOptions,
  without: readonly string[] = [],
): Promise<Device> {
  const signal = options.signal && { signal: options.signal };
  return open({ ...options.open, prefer: [backend], ...(tier === null ? {} : { tier, without }), ...signal });
}

/** Failing cases that are run again to find their cause: a handful tells as much as all. */
const BLAMED = 8;

function selectFailed(programs: readonly CaseProgram[], failed: readonly string[]): CaseProgram[] {
  return selectCases(programs, { ids: failed.slice(0, BLAMED) });
}

async function blame(
  backend: BackendName,
  tier: Tier,
  broken: Device,
  programs: readonly CaseProgram[],
  options: ValidateOptions,
  oracle: Oracle,
): Promise<Culprit[]> {
  const cases = programs.flatMap(({ runs }) => runs.map(({ id }) => id));
  const features = FEATURES.filter((feature) => broken.capabilities.features.has(feature));
  const trials: (readonly [what: string, tier: Tier, without: readonly string[]])[] = [
    ...features.map((feature) => [feature, tier, [feature]] as const),
    ...(tier === "default" ? [] : [[LIMITS, "default", []] as const]),
  ];
  const culprits: Culprit[] = [];
  for (const [feature, lower, without] of trials) {
    await using device = await openTier(backend, lower, options, without);
    const passed = new Set<string>();
    const run = { tier: lower, oracle, ...(options.signal && { signal: options.signal }), ...options.faults };
    for await (const result of runCases(device, programs, run)) if (result.status === "passed") passed.add(result.id);
    const cured = cases.filter((id) => passed.has(id));
    if (cured.length > 0) culprits.push({ backend, tier, feature, cases: cured });
    if (cured.length === cases.length) return culprits;
  }
  const rest = cases.filter((id) => !culprits.some((culprit) => culprit.cases.includes(id)));
  if (rest.length > 0) culprits.push({ backend, tier, feature: null, cases: rest });
  return culprits;
}
