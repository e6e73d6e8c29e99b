import { toFloat32, viewAs } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { openSafetensors, type SafetensorsDtype } from "../io/safetensors.js";
import { memorySource } from "../io/source.js";

/** How a result may differ from a stored tensor; the manifest's `tolerance_kinds`. */
export type Tolerance =
  | { readonly kind: "exact" }
  | { readonly kind: "close"; readonly rtol: number; readonly atol: number; readonly rms?: number }
  | { readonly kind: "codes_mostly"; readonly fraction: number; readonly max_delta: number }
  | { readonly kind: "info" };

/** What need not match; the manifest's `dont_care_kinds`. */
export type DontCare =
  | { readonly kind: "nan_code"; readonly tensors: readonly string[]; readonly format: "float8_e4m3fn" | "float8_e5m2" }
  | {
      readonly kind: "block_scale_byte";
      readonly tensors: readonly string[];
      readonly scale: string;
      readonly value: number;
      readonly block: number;
    }
  | { readonly kind: "scale_byte"; readonly value: number; readonly pairs: Readonly<Record<string, string>> }
  | { readonly kind: "all"; readonly tensors: readonly string[] };

export interface GoldenTensorInfo {
  readonly name: string;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
  readonly meaning: string;
  readonly tolerance: Tolerance;
}

/** One case of a golden directory. */
export interface GoldenCase {
  readonly name: string;
  readonly file: string;
  readonly config: string;
  readonly args: Readonly<Record<string, unknown>>;
  readonly shapes: Readonly<Record<string, readonly number[]>>;
  readonly tensors: readonly GoldenTensorInfo[];
  readonly dont_care?: readonly DontCare[];
}

/** `manifest.json` of a golden directory. */
export interface GoldenManifest {
  readonly format: number;
  readonly cases: readonly GoldenCase[];
}

/** Checks that parsed JSON is a manifest this version reads. Throws `io/malformed`. */
export function parseManifest(json: unknown, path = "manifest.json"): GoldenManifest {
  const manifest = json as Partial<GoldenManifest> | null;
  if (manifest === null || typeof manifest !== "object" || !Array.isArray(manifest.cases)) {
    throw new FewbitError("io/malformed", { path, reason: "it has no list of cases" });
  }
  if (manifest.format !== 1) {
    throw new FewbitError("io/malformed", {
      path,
      reason: `its format is ${String(manifest.format)}: this version reads 1`,
    });
  }
  return manifest as GoldenManifest;
}

/** Numbers of a stored tensor: float32 for every float dtype, integers as they are. */
export type Numbers = Float32Array | Int32Array | Uint8Array | Uint32Array;

/** The tensors of one golden file. */
export interface GoldenFile {
  /** The numbers of a tensor; throws `model/missing-tensor`. */
  numbers(name: string): Numbers;
  has(name: string): boolean;
  /** A tensor as it is stored, of any dtype. */
  part(name: string): { readonly dtype: string; readonly shape: readonly number[]; readonly bytes: Uint8Array };
  readonly metadata: ReadonlyMap<string, string>;
}

/** Reads a whole golden file. */
export async function readGoldenFile(bytes: Uint8Array, name: string): Promise<GoldenFile> {
  const file = await openSafetensors(memorySource(bytes, name));
  const parts = new Map<string, ReturnType<GoldenFile["part"]>>();
  for (const info of file.tensors.values()) {
    parts.set(info.name, { dtype: info.dtype, shape: info.shape, bytes: await file.read(info.name) });
  }
  const part = (tensor: string) => {
    const found = parts.get(tensor);
    if (found === undefined) throw new FewbitError("model/missing-tensor", { name: tensor, path: name });
    return found;
  };
  const widened = new Map<string, Numbers>();
  return {
    part,
    metadata: file.metadata,
    has: (tensor) => parts.has(tensor),
    numbers: (tensor) => {
      const known = widened.get(tensor);
      if (known !== undefined) return known;
      const { dtype, bytes: raw } = part(tensor);
      const numbers = widen(dtype as SafetensorsDtype, raw, name);
      widened.set(tensor, numbers);
      return numbers;
    },
  };
}

function widen(dtype: SafetensorsDtype, bytes: Uint8Array, path: string): Numbers {
  switch (dtype) {
    case "F32":
      return viewAs("f32", bytes);
    case "BF16":
      return toFloat32("bf16", viewAs("bf16", bytes));
    case "F16":
      return toFloat32("f16", viewAs("f16", bytes));
    case "U8":
      return bytes;
    case "I8":
      return Int32Array.from(viewAs("i8", bytes));
    case "U16":
      return Uint32Array.from(viewAs("f16", bytes));
    case "I16":
      return Int32Array.from(viewAs("f16", bytes), (word) => (word << 16) >> 16);
    case "I32":
      return viewAs("i32", bytes);
    default:
      throw new FewbitError("io/malformed", { path, reason: `a golden file holds no ${dtype}` });
  }
}

/** One comparison: what was found, or null when the tensor agrees. */
export interface Check {
  readonly tensor: string;
  readonly tolerance: Tolerance["kind"];
  /** Null when it agrees. */
  readonly mismatch: string | null;
}

/** Compares a result with a stored tensor under its tolerance, skipping what the case does not define. */
export function checkTensorValues(
  info: GoldenTensorInfo,
  expected: Numbers,
  actual: ArrayLike<number>,
  golden: GoldenCase,
  file: GoldenFile,
): Check {
  const done = (mismatch: string | null): Check => ({ tensor: info.name, tolerance: info.tolerance.kind, mismatch });
  if (actual.length !== expected.length) return done(`${actual.length} elements: ${expected.length} expected`);
  const skip = skipper(info, golden, file);
  const same = equality(info, golden);
  const { tolerance } = info;
  let differing = 0;
  let first = "";
  let worst = 0;
  let squares = 0;
  let counted = 0;
  for (let i = 0; i < expected.length; i++) {
    if (skip(i)) continue;
    counted++;
    const [a, b] = [actual[i] as number, expected[i] as number];
    if (same(a, b)) continue;
    const delta = Math.abs(a - b);
    if (tolerance.kind === "close") {
      squares += delta * delta;
      // The stored value may be infinite (a documented overflow), which any finite result is close to.
      if (delta <= tolerance.atol + tolerance.rtol * Math.abs(b)) continue;
    }
    worst = Math.max(worst, delta);
    if (differing++ === 0) first = `element ${i} is ${a}: ${b} expected`;
  }
  if (tolerance.kind === "codes_mostly") {
    const agreeing = counted === 0 ? 1 : (counted - differing) / counted;
    const passed = agreeing >= tolerance.fraction && worst <= tolerance.max_delta;
    return done(passed ? null : `${(agreeing * 100).toFixed(2)} % equal, largest step ${worst}; ${first}`);
  }
  if (differing > 0) return done(`${differing} of ${counted} differ; ${first}`);
  if (tolerance.kind === "close" && tolerance.rms !== undefined) {
    const rms = Math.sqrt(squares / Math.max(counted, 1));
    if (rms > tolerance.rms) return done(`root mean square error ${rms}: at most ${tolerance.rms} expected`);
  }
  return done(null);
}

function skipper(info: GoldenTensorInfo, golden: GoldenCase, file: GoldenFile): (index: number) => boolean {
  for (const rule of golden.dont_care ?? []) {
    if (rule.kind === "all" && rule.tensors.includes(info.name)) return () => true;
    if (rule.kind === "block_scale_byte" && rule.tensors.includes(info.name)) {
      const scale = file.numbers(rule.scale);
      const block = info.name.endsWith("packed") ? rule.block / 2 : rule.block;
      return (i) => scale[Math.floor(i / block)] === rule.value;
    }
    if (rule.kind === "scale_byte" && info.name in rule.pairs) {
      const scale = file.numbers(rule.pairs[info.name] as string);
      return (i) => scale[i] === rule.value;
    }
  }
  return () => false;
}

function equality(info: GoldenTensorInfo, golden: GoldenCase): (a: number, b: number) => boolean {
  for (const rule of golden.dont_care ?? []) {
    if (rule.kind !== "nan_code" || !rule.tensors.includes(info.name)) continue;
    const isNaNCode =
      rule.format === "float8_e4m3fn"
        ? (code: number) => (code & 0x7f) === 0x7f
        : (code: number) => (code & 0x7f) > 0x7c;
    return (a, b) => a === b || (isNaNCode(a) && isNaNCode(b));
  }
  return (a, b) => a === b || (Number.isNaN(a) && Number.isNaN(b));
}
