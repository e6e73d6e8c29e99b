import type { Tier } from "../../src/backends/webgpu/device.js";
import type { CaseDifference } from "../../src/validate/diff.js";
import type { LogitDifference } from "../../src/validate/logits.js";
import type { MissingKernel } from "../../src/validate/missing.js";
import type { ReportedDevice } from "../../src/validate/report.js";
import type { CaseResult } from "../../src/validate/run.js";

/** What the page shows of an adapter. */
export interface AdapterCard {
  readonly name: string;
  readonly kind: string;
  readonly reason: string;
  readonly info: Readonly<Record<string, string>>;
  /** Everything that the adapter offers. */
  readonly features: readonly string[];
  readonly limits: readonly AdapterLimit[];
  /** Kernels that the bundled model goes without here. */
  readonly missing: readonly (MissingKernel & { readonly quantize: string })[];
  readonly tiers: readonly { readonly tier: Tier; readonly absent: string | null }[];
}

export interface AdapterLimit {
  readonly name: string;
  readonly value: number;
  /** WebGPU's guarantee, where the opened default device tells it. */
  readonly guaranteed: number;
}

/** A case before it runs. */
export interface PlannedCase {
  readonly id: string;
  readonly op: string;
  readonly format: string;
}

/** A result without what is asked for only when a cell is opened. */
export type LightResult = Omit<CaseResult, "wgsl" | "explanation" | "outputs">;

export type ValidateNotice =
  | { readonly kind: "device"; readonly device: ReportedDevice; readonly cases: number }
  | { readonly kind: "result"; readonly result: LightResult }
  | { readonly kind: "absent"; readonly backend: string; readonly tier: string; readonly reason: string }
  | { readonly kind: "culprit"; readonly text: string };

export interface ValidateArguments {
  readonly quick: boolean;
  /** Null: every tier that there is, those above the default with the cases whose kernels differ there. */
  readonly tiers: readonly Tier[] | null;
  /** Go on with the last run's results instead of starting anew. */
  readonly resume: boolean;
}

export interface GenerateArguments {
  readonly quantize: string;
  readonly prompt: string;
  readonly maxTokens: number;
  readonly temperature: number;
  readonly seed: number;
  /** Run the reference over the same tokens. */
  readonly compare: boolean;
}

export type GenerateNotice =
  | { readonly kind: "stage"; readonly text: string; readonly done: number; readonly total: number }
  | { readonly kind: "token"; readonly text: string; readonly logprob: number }
  | { readonly kind: "speed"; readonly speed: Speed }
  | { readonly kind: "difference"; readonly difference: LogitDifference; readonly token: string };

export interface Speed {
  readonly promptTokens: number;
  readonly promptSeconds: number;
  readonly tokens: number;
  readonly decodeSeconds: number;
  readonly weightBytes: number;
}

/** What two reports are, and how they differ. */
export interface Comparison {
  readonly a: ReportSummary;
  readonly b: ReportSummary;
  readonly status: readonly LightDifference[];
  readonly details: readonly LightDifference[];
  readonly same: number;
}

export type LightDifference = Omit<CaseDifference, "a" | "b">;

export interface ReportSummary {
  readonly name: string;
  readonly fewbit: string;
  readonly created: string;
  readonly host: string;
  readonly devices: readonly string[];
  readonly passed: number;
  readonly failed: number;
  readonly unsupported: number;
}

/** Everything the page asks of its worker: arguments, notices on the way, and the answer. */
export interface Calls {
  adapter: { args: null; notice: never; result: AdapterCard };
  names: { args: null; notice: never; result: readonly string[] };
  cases: { args: { readonly quick: boolean }; notice: never; result: readonly PlannedCase[] };
  validate: { args: ValidateArguments; notice: ValidateNotice; result: null };
  /** Runs one case again and keeps every element's error. */
  detail: { args: { readonly id: string; readonly tier: string | null }; notice: never; result: CaseResult };
  generate: { args: GenerateArguments; notice: GenerateNotice; result: null };
  /** The current run as `fewbit validate --report` writes it. */
  report: { args: null; notice: never; result: Blob };
  /** Null stands for the current run. */
  compare: { args: { readonly a: File | null; readonly b: File | null }; notice: never; result: Comparison };
  /** Destroys every open GPUDevice, as a crashed driver would; answers how many. */
  lose: { args: null; notice: never; result: number };
}

export type CallName = keyof Calls;

/** From the page: a call, or the end of one. */
export type Request =
  | { readonly id: number; readonly call: CallName; readonly args: unknown }
  | { readonly id: number; readonly cancel: true };

/** To the page. */
export type Reply =
  | { readonly id: number; readonly notice: unknown }
  | { readonly id: number; readonly result: unknown }
  | { readonly id: number; readonly error: Failure };

export interface Failure {
  /** A `FewbitError`'s code, or `unexpected`. */
  readonly code: string;
  readonly message: string;
  readonly hint: string | undefined;
}
