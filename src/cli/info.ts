import { Command } from "commander";
import type { Capabilities } from "../backends/backend.js";
import { FewbitError } from "../core/errors.js";
import { FORMATS } from "../formats/table.js";
import { listQuantizeNames } from "../quantize/names.js";
import { type BackendName, openBackend, whyAbsent } from "../runtime/device.js";
import { backendOption, examples, openDevice } from "./options.js";
import { bundledModel, PACKAGE, shortPath } from "./package.js";
import { describeDevice, deviceRows } from "./report.js";
import { type Cli, printJson, showBytes, table } from "./terminal.js";

const GPU_BACKENDS: readonly BackendName[] = ["webgpu", "cuda"];

export function infoCommand(cli: Cli): Command {
  return new Command("info")
    .summary("say what is here: device, formats, names for --quantize")
    .description(
      "Opens the device that run would take and says which it is, why, and what it can do; then the formats and names that fewbit knows.",
    )
    .addOption(backendOption())
    .option("--json", "one JSON object on stdout")
    .addHelpText(
      "after",
      examples(["fewbit info", "everything"], ["fewbit info --json | jq -r '.quantize[]'", "the names for --quantize"]),
    )
    .action((options: { backend: string }) => info(cli, options.backend));
}

/** Without a device the rest is still said, and the command then fails with the device's error. */
async function info(cli: Cli, backend: string): Promise<void> {
  const here = {
    command: "info",
    version: PACKAGE.version,
    node: process.versions.node,
    platform: `${process.platform}-${process.arch}`,
    model: shortPath(bundledModel()),
    quantize: listQuantizeNames(),
    formats: Object.keys(FORMATS),
  };
  const device = await openDevice(backend, cli.signal).catch((error: unknown) => {
    if (whyAbsent(error) === null) throw error;
    return error as FewbitError;
  });
  if (device instanceof FewbitError) {
    if (!cli.json) cli.out.write(text(cli, here, [["device", "none"], ...otherRows(await others())]));
    throw device;
  }
  await using opened = device;
  const about = describeDevice(opened);
  const also = await others(about.backend);
  const { capabilities } = opened;
  if (cli.json) {
    return printJson(cli.out, {
      ...here,
      device: about,
      others: also,
      capabilities: { ...capabilities, features: [...capabilities.features] },
    });
  }
  cli.out.write(
    text(cli, here, [...deviceRows(about), ...otherRows(also), ...capabilityRows(about.backend, capabilities)]),
  );
}

/** A GPU backend that was not opened: the device it would give, or null and the reason why there is none. */
interface OtherBackend {
  readonly backend: BackendName;
  readonly device: string | null;
  readonly reason: string;
}

/** The GPU backends but for the one in use. */
async function others(used?: string): Promise<OtherBackend[]> {
  const found: OtherBackend[] = [];
  for (const backend of GPU_BACKENDS.filter((name) => name !== used)) {
    try {
      await using device = await openBackend(backend);
      found.push({ backend, device: device.info.name, reason: device.info.reason });
    } catch (error) {
      const reason = whyAbsent(error);
      if (reason === null) throw error;
      found.push({ backend, device: null, reason });
    }
  }
  return found;
}

const otherRows = (found: readonly OtherBackend[]): [string, string][] =>
  found.map(({ backend, device, reason }) => [
    backend,
    device === null ? `none: ${reason}` : `${device}, with --backend ${backend}`,
  ]);

function text(
  cli: Cli,
  here: { version: string; node: string; platform: string; model: string; quantize: string[]; formats: string[] },
  device: [string, string][],
): string {
  return table(
    [
      ["fewbit", `${here.version}, Node ${here.node} on ${here.platform}`],
      ...device,
      ["model", here.model],
      ["quantize", wrap(families(here.quantize))],
      ["formats", wrap(here.formats)],
    ],
    cli.out.color,
  );
}

function capabilityRows(backend: string, capabilities: Capabilities): [string, string][] {
  if (backend === "reference") return [];
  const { features, maxBuffer, maxBinding, workgroupMemory, maxInvocations, subgroupSize } = capabilities;
  const [least, most] = subgroupSize;
  const subgroups = most === 0 ? "no subgroups" : `subgroups of ${least === most ? least : `${least} to ${most}`}`;
  return [
    ["features", wrap([...features])],
    ["limits", `buffer ${showBytes(maxBuffer)}, binding ${showBytes(maxBinding)}`],
    ["workgroup", `${showBytes(workgroupMemory)}, ${maxInvocations} invocations, ${subgroups}`],
  ];
}

/** Names that differ in a bit width or a group size only, as one: `int4wo-{32,64,128,256}`. */
function families(names: readonly string[]): string[] {
  const found = new Map<string, Set<string>[]>();
  for (const name of names) {
    const numbers: string[] = [];
    const family = name.replace(/(?<=^intx|^8da)\d|(?<=-)\d+/g, (number) => `{${numbers.push(number) - 1}}`);
    const values = found.get(family) ?? numbers.map(() => new Set<string>());
    for (const [i, number] of numbers.entries()) values[i]?.add(number);
    found.set(family, values);
  }
  return [...found].map(([family, values]) =>
    family.replace(/\{(\d)\}/g, (_, i: string) => {
      const list = [...(values[Number(i)] as Set<string>)];
      return list.length === 1 ? (list[0] as string) : `{${list.join(",")}}`;
    }),
  );
}

/** Words in lines of at most 100 characters. */
function wrap(words: readonly string[]): string {
  const lines: string[] = [];
  for (const word of words) {
    const last = lines.at(-1);
    if (last !== undefined && last.length + word.length < 100) lines[lines.length - 1] = `${last} ${word}`;
    else lines.push(word);
  }
  return lines.join("\n") || "none";
}
