import { codecName, type Format, type Rule } from "./format.js";

/** Rules for weights, which are quantized on the host, once, whatever the device. */
export const HOST_RULES = {
  hqq: "it searches for scales and zero points",
  hqq_scale: "it searches for scales",
  sinq: "it normalizes columns and rows in turn",
  codebook: "it learns a table",
} as const satisfies Partial<Record<Rule["kind"], string>>;

type HostKind = keyof typeof HOST_RULES;
/** Rules that a device may have kernels for. */
export type DeviceKind = Exclude<Rule["kind"], HostKind>;

export const isHostKind = (kind: Rule["kind"]): kind is HostKind => Object.hasOwn(HOST_RULES, kind);

/** Why no device makes a format's codes, or null. */
export function hostReason(format: Format): string | null {
  const { kind } = format.rule;
  if (isHostKind(kind)) return `rule ${kind} runs on the host: ${HOST_RULES[kind]}`;
  return kind === "nf4" && !isSortedTable(format)
    ? "rule nf4 needs a sorted table of numbers and float32 scales"
    : null;
}

function isSortedTable({ element, scales }: Format): boolean {
  if (element.kind !== "lut" || element.entries === "learned" || element.vector.join() !== "1,1") return false;
  const { entries } = element;
  const sorted = entries.every((entry, i) => i === 0 || entry > (entries[i - 1] as number));
  return sorted && scales.every((level) => codecName(level.codec) === "f32");
}
