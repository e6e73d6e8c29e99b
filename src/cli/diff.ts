import { readFile } from "node:fs/promises";
import { Command } from "commander";
import { FewbitError } from "../core/errors.js";
import { diffReports, type ReportDifference } from "../validate/diff.js";
import { columnOf, countResults, isReport, parseReport, type Report } from "../validate/report.js";
import { examples } from "./options.js";
import { type Cli, printJson } from "./terminal.js";

export function diffCommand(cli: Cli): Command {
  return new Command("diff")
    .summary("compare two validation reports")
    .description(
      "Compares two reports of fewbit validate (two machines, two backends, two versions): what passes in one and fails in the other, error ratios, different kernels. Exits 1 when a case passes in only one of them.",
    )
    .argument("<A.json>", "a report made with --report")
    .argument("<B.json>", "another one")
    .option("--json", "one JSON object on stdout")
    .addHelpText("after", examples(["fewbit diff before.json after.json", "what a change did"]))
    .action((a: string, b: string) => diff(cli, a, b));
}

async function diff(cli: Cli, pathA: string, pathB: string): Promise<void> {
  const [a, b] = await Promise.all([readReport(pathA), readReport(pathB)]);
  const found = diffReports(a, b);
  const broken = found.status.filter((entry) => entry.a?.status !== "failed" && entry.b?.status === "failed");
  if (cli.json) printJson(cli.out, { command: "diff", a: pathA, b: pathB, ...found });
  else cli.out.write(text(pathA, a, pathB, b, found));
  if (broken.length > 0) throw new FewbitError("validate/failed", { failed: broken.length, total: b.results.length });
}

function text(pathA: string, a: Report, pathB: string, b: Report, { status, details, same }: ReportDifference): string {
  const about = (name: string, path: string, report: Report) => {
    const { passed, failed, unsupported } = countResults(report.results);
    const devices = report.devices.map((device) => `${columnOf(device)} on ${device.info.name}`).join(", ");
    return `${name}  ${path}: fewbit ${report.fewbit}, ${passed} passed, ${failed} failed, ${unsupported} without a kernel; ${devices}`;
  };
  const list = (heading: string, entries: ReportDifference["status"]) =>
    entries.length === 0
      ? []
      : ["", heading, ...entries.map(({ device, id, changes }) => `  ${device} ${id}: ${changes.join("; ")}`)];
  const lines = [
    about("A", pathA, a),
    about("B", pathB, b),
    ...list("different outcome:", status),
    ...list("same outcome, different kernel or error:", details),
    "",
    `${same} the same, ${status.length} with another outcome, ${details.length} with another kernel or error`,
  ];
  return `${lines.join("\n")}\n`;
}

async function readReport(path: string): Promise<Report> {
  let content: string;
  try {
    content = await readFile(path, "utf8");
  } catch (cause) {
    throw new FewbitError("io/not-found", { path, reason: (cause as Error).message }, { cause });
  }
  let value: unknown;
  try {
    value = parseReport(content);
  } catch (cause) {
    throw new FewbitError("io/malformed", { path, reason: (cause as Error).message }, { cause });
  }
  if (isReport(value)) return value;
  throw new FewbitError("io/malformed", { path, reason: "it is no report of fewbit validate" });
}
