import { mkdir, readFile, writeFile } from "node:fs/promises";
import { arch, platform } from "node:os";
import { dirname, extname, join } from "node:path";
import { Command, Option } from "commander";
import type { Tier } from "../backends/webgpu/device.js";
import { FewbitError, nearestNames } from "../core/errors.js";
import { FORMATS } from "../formats/table.js";
import { OPS } from "../ir/ops.js";
import { type BackendName, open } from "../runtime/device.js";
import { DEFAULT_SEED } from "../validate/cases.js";
import { parseManifest, runGolden } from "../validate/golden.js";
import { goldenDevice } from "../validate/golden-device.js";
import { REFERENCE_GOLDEN } from "../validate/golden-reference.js";
import { columnOf, countResults, type Report, reportJson, showCell, summarize } from "../validate/report.js";
import { reportHtml } from "../validate/report-html.js";
import { makeReport, TIERS } from "../validate/run-tiers.js";
import { examples, integer } from "./options.js";
import { PACKAGE } from "./package.js";
import { type Cli, progressLine } from "./terminal.js";

const BACKENDS: readonly BackendName[] = ["reference", "webgpu", "cuda"];

interface ValidateArguments {
  readonly backend?: BackendName[];
  readonly tier?: Tier[];
  readonly formats?: string[];
  readonly ops?: string[];
  readonly full?: boolean;
  readonly golden?: string;
  readonly report?: string;
  readonly case?: string[];
  readonly shard?: { readonly index: number; readonly count: number };
  readonly seed: number;
}

export function validateCommand(cli: Cli): Command {
  return new Command("validate")
    .summary("check every kernel against the definition, with derived error bounds")
    .description(
      "Runs the case table (ops x formats x shapes) on each backend and tier, judges every element against a float64 evaluation with a derived bound, and checks the guard words around every buffer. Exits 1 when a case fails.",
    )
    .addOption(
      list(
        "--backend <name>",
        "a backend to check (default: reference and webgpu); may be repeated",
        "backend",
        BACKENDS,
      ),
    )
    .addOption(
      list(
        "--tier <name>",
        "how much of a WebGPU adapter to use: default, portable, subgroups, f16; may be repeated",
        "tier",
        TIERS,
      ),
    )
    .addOption(list("--formats <names>", "only these formats, separated by commas", "format", Object.keys(FORMATS)))
    .addOption(list("--ops <names>", "only these ops, separated by commas", "op", Object.keys(OPS)))
    .option("--quick", "the quick table (the default)")
    .option(
      "--full",
      "every format, block and shape; tiers above the default take the quick table unless named with --tier",
    )
    .option("--case <id>", "only this case; may be repeated", (id: string, before: string[] = []) => [...before, id])
    .option("--shard <i/n>", "only the ith of n parts of all that, to share it among processes", shardOf)
    .option("--seed <n>", "the seed of all random numbers", integer("--seed", 0, 2 ** 32 - 1), DEFAULT_SEED)
    .option("--golden <dir>", "run a directory of golden vectors (manifest.json) instead of the table")
    .option("--report <file>", "write a report: .json (to send, compare and diff) or .html (to read)")
    .option("--json", "the report on stdout, as JSON")
    .addHelpText(
      "after",
      examples(
        ["fewbit validate", "the quick table on the reference and on WebGPU"],
        ["fewbit validate --full --backend webgpu --report out.html", "everything, with a page to read"],
        ["fewbit validate --backend cuda --backend webgpu", "both on one card, side by side"],
        ["fewbit validate --ops linear --formats int8,mxfp4", "two formats of one op"],
        ["fewbit validate --full --backend cuda --shard 3/8", "the third of eight processes, side by side"],
        ["fewbit validate --golden test/golden/data", "vectors recorded from torchao"],
      ),
    )
    .action((options: ValidateArguments) =>
      options.golden === undefined ? table(cli, options) : golden(cli, options, options.golden),
    );
}

/** An option that takes names, by commas or repeated. */
function list<T extends string>(flags: string, what: string, kind: string, legal: readonly T[]): Option {
  return new Option(flags, what).argParser((text: string, before: T[] | undefined) => {
    const names = text.split(",").map((name) => name.trim());
    for (const name of names) {
      if (!legal.includes(name as T))
        throw new FewbitError("argument/unknown-name", { kind, name, nearest: nearestNames(name, legal) });
    }
    return [...(before ?? []), ...(names as T[])];
  });
}

/** Throws `argument/invalid`. */
function shardOf(text: string): { index: number; count: number } {
  const [, index = 0, count = 0] = (/^(\d+)\/(\d+)$/.exec(text) ?? []).map(Number);
  if (index >= 1 && index <= count) return { index, count };
  throw new FewbitError("argument/invalid", {
    name: "--shard",
    value: text,
    expected: "i/n with i from 1 to n, like 3/8",
  });
}

async function table(cli: Cli, options: ValidateArguments): Promise<void> {
  const { backend, tier, formats, ops, shard, full, seed } = options;
  const format = reportFormat(options.report);
  const line = progressLine(cli);
  const { red } = cli.err.color;
  const selection = {
    quick: !full && options.case === undefined,
    ...(formats && { formats }),
    ...(ops && { ops }),
    ...(options.case && { ids: options.case }),
    ...(shard && { shard }),
  };
  let [done, total, device] = [0, 0, ""];
  const soFar = { passed: 0, failed: 0, unsupported: 0 };
  const report = await makeReport(
    {
      ...(backend && { backends: backend }),
      ...(tier && { tiers: tier }),
      selection,
      seed,
      signal: cli.signal,
      shaders: format !== null || cli.json,
    },
    {
      fewbit: PACKAGE.version,
      host: `${platform()} ${arch()}, Node ${process.versions.node}`,
      created: new Date().toISOString(),
    },
    (event) => {
      if (event.kind === "device") {
        [done, total, device] = [0, event.cases, columnOf(event.device)];
        line.clear();
        if (!cli.json) cli.err.write(`${device}: ${event.device.info.name}, ${total} cases\n`);
      } else if (event.kind === "result") {
        const { status, id, reason, rerun } = event.result;
        soFar[status]++;
        line.show(`${device} ${++done}/${total}  ${id}`);
        if (status !== "failed" || cli.json) return;
        line.clear();
        cli.err.write(`${red("failed")} ${id}: ${reason}\n       ${rerun}\n`);
      } else if (event.kind === "absent" && !cli.json)
        cli.err.write(`${event.backend}/${event.tier}: not run: ${event.reason}\n`);
    },
  )
    .catch((error: unknown) => {
      line.clear();
      const { passed, failed } = soFar;
      cli.err.write(`ended early, ${device} at ${done} of ${total} cases: ${passed} passed, ${failed} failed so far\n`);
      throw error;
    })
    .finally(() => line.clear());
  if (options.report !== undefined) {
    await mkdir(dirname(options.report), { recursive: true });
    await writeFile(options.report, format === "html" ? reportHtml(report) : reportJson(report));
  }
  if (cli.json) cli.out.write(`${reportJson(report)}\n`);
  else cli.out.write(summary(report));
  finish(cli, countResults(report.results));
}

function reportFormat(path: string | undefined): "json" | "html" | null {
  if (path === undefined) return null;
  const extension = extname(path).slice(1);
  if (extension === "json" || extension === "html") return extension;
  throw new FewbitError("argument/invalid", {
    name: "--report",
    value: path,
    expected: "a file that ends in .json or .html",
  });
}

/** Format x device with the worst errors, what has no kernel, what broke. */
function summary(report: Report): string {
  const { rows, columns, cell } = summarize(report.results);
  const width = Math.max(...rows.map((name) => name.length), 6) + 2;
  const widths = columns.map(
    (column) => Math.max(column.length, ...rows.map((name) => showCell(cell(name, column)).length)) + 2,
  );
  const lineOf = (name: string, cells: readonly string[]) =>
    `${name.padEnd(width)}${cells.map((text, i) => text.padEnd(widths[i] as number)).join("")}`.trimEnd();
  const lines = ["worst error as a fraction of its bound", lineOf("format", columns)];
  for (const name of rows)
    lines.push(
      lineOf(
        name,
        columns.map((column) => showCell(cell(name, column))),
      ),
    );
  const unsupported = report.results.filter(({ status }) => status === "unsupported");
  if (unsupported.length > 0) {
    lines.push("", "no kernel:");
    for (const result of unsupported) lines.push(`  ${columnOf(result)} ${result.id}: ${shortReason(result.reason)}`);
  }
  for (const { backend, tier, feature, cases } of report.culprits) {
    const what = feature === null ? "not one feature's doing" : `the failures go away without ${feature}`;
    lines.push("", `${backend}/${tier}: ${what}: ${cases.join(", ")}`);
  }
  return `${lines.join("\n")}\n`;
}

/** The last line of an explanation names what is missing. */
const shortReason = (reason: string | null): string =>
  (reason ?? "")
    .split("\n")
    .slice(1)
    .map((text) => text.trim().replace(/\s+/g, " "))
    .join("; ") ||
  (reason ?? "");

/** The closing line. Throws `validate/failed`, which main turns into exit code 1 without another word. */
function finish(cli: Cli, { passed, failed }: { passed: number; failed: number }): void {
  if (!cli.json) cli.out.write(`${passed} passed, ${failed} failed\n`);
  if (failed > 0) throw new FewbitError("validate/failed", { failed, total: passed + failed });
}

async function golden(cli: Cli, { backend }: ValidateArguments, folder: string): Promise<void> {
  const manifest = parseManifest(await readJson(join(folder, "manifest.json")));
  const line = progressLine(cli);
  const counts = { passed: 0, failed: 0, unsupported: 0 };
  const all: unknown[] = [];
  for (const name of backend ?? ["reference"]) {
    const onHost = new Map<string, string[]>();
    const byConfig = new Map<string, { passed: number; failed: number; unsupported: number }>();
    await using device = await open({ prefer: [name], signal: cli.signal });
    const runner = name === "reference" ? REFERENCE_GOLDEN : goldenDevice(device);
    for await (const result of runGolden({
      manifest,
      backend: runner,
      signal: cli.signal,
      readFile: (file) => readFile(join(folder, file)),
    })) {
      counts[result.status]++;
      const config = byConfig.get(result.config) ?? { passed: 0, failed: 0, unsupported: 0 };
      config[result.status]++;
      byConfig.set(result.config, config);
      line.show(`${name} ${result.case}`);
      if (cli.json) all.push({ backend: name, ...result });
      else if (result.status !== "passed") {
        line.clear();
        cli.out.write(`${result.status.padEnd(12)}${name} ${result.case}: ${result.reason}\n`);
      }
      if (name === "reference" || result.status !== "passed") continue;
      const how = result.calls === 0 ? "wholly" : "in part";
      for (const reason of result.host) {
        const key = `${how} on the host (${reason})`;
        onHost.set(key, [...(onHost.get(key) ?? []), result.case]);
      }
    }
    line.clear();
    const width = Math.max(...[...byConfig.keys()].map((config) => config.length), 6) + 2;
    if (cli.json) continue;
    cli.out.write(`${"config".padEnd(width)}${name}\n`);
    for (const [config, { passed, failed, unsupported }] of byConfig) {
      const notes = [
        `${passed} passed`,
        ...(failed > 0 ? [`${failed} failed`] : []),
        ...(unsupported > 0 ? [`${unsupported} unsupported`] : []),
      ];
      cli.out.write(`${config.padEnd(width)}${notes.join(", ")}\n`);
    }
    for (const [reason, cases] of onHost) cli.out.write(`${name}, ${reason}: ${cases.join(", ")}\n`);
  }
  if (cli.json) cli.out.write(`${JSON.stringify({ command: "validate", golden: folder, ...counts, results: all })}\n`);
  finish(cli, counts);
}

async function readJson(path: string): Promise<unknown> {
  let text: string;
  try {
    text = await readFile(path, "utf8");
  } catch (cause) {
    throw new FewbitError("io/not-found", { path, reason: (cause as Error).message }, { cause });
  }
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new FewbitError("io/malformed", { path, reason: (cause as Error).message }, { cause });
  }
}
