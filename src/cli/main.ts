#!/usr/bin/env node
import { Command, CommanderError } from "commander";
import { FewbitError, nearestNames } from "../core/errors.js";
import { autoquantCommand } from "./autoquant.js";
import { calibrateCommand } from "./calibrate.js";
import { chatCommand } from "./chat.js";
import { diffCommand } from "./diff.js";
import { evalCommand } from "./eval.js";
import { explainCommand } from "./explain.js";
import { infoCommand } from "./info.js";
import { examples } from "./options.js";
import { PACKAGE } from "./package.js";
import { quantizeCommand } from "./quantize.js";
import { runCommand } from "./run.js";
import { attach, type Cli, EXIT, printError } from "./terminal.js";
import { traceCommand } from "./trace.js";
import { validateCommand } from "./validate.js";

const EXIT_CODES = `
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C.
NO_COLOR turns colours off, FORCE_COLOR on. Errors carry a code in brackets; with --json they are {"error": {...}} on stdout.
`;

function program(cli: Cli): Command {
  const root = new Command("fewbit")
    .description("Quantized neural-network inference on WebGPU.")
    .version(PACKAGE.version)
    .addCommand(runCommand(cli))
    .addCommand(quantizeCommand(cli))
    .addCommand(autoquantCommand(cli))
    .addCommand(calibrateCommand(cli))
    .addCommand(chatCommand(cli))
    .addCommand(infoCommand(cli))
    .addCommand(evalCommand(cli))
    .addCommand(explainCommand(cli))
    .addCommand(validateCommand(cli))
    .addCommand(diffCommand(cli))
    .addCommand(traceCommand(cli))
    .addHelpText(
      "after",
      examples(["fewbit run", "generate text with the bundled model"], ["fewbit run --help", "every option of run"]) +
        EXIT_CODES,
    );
  for (const command of [root, ...root.commands]) {
    command
      .exitOverride()
      .configureOutput({ outputError: () => {} })
      .configureHelp({ styleTitle: cli.out.color.bold, showGlobalOptions: false })
      .showHelpAfterError(false);
  }
  return root;
}

/** Runs one command line and returns its exit code; nothing is left open. */
async function main(args: readonly string[]): Promise<number> {
  const cli = attach(args.includes("--json"));
  const root = program(cli);
  try {
    if (args.length === 0) {
      root.outputHelp({ error: true });
      return EXIT.usage;
    }
    await root.parseAsync(args, { from: "user" });
    return cli.stopped() === "interrupted" ? EXIT.interrupted : EXIT.ok;
  } catch (caught) {
    if (caught instanceof CommanderError && caught.exitCode === 0) return EXIT.ok;
    if (cli.stopped() === "closed") return EXIT.ok;
    // The command has said what failed.
    if (caught instanceof FewbitError && caught.code === "validate/failed") return EXIT.failure;
    const error = caught instanceof CommanderError ? usageError(caught, root, args) : caught;
    printError(cli, error);
    if (cli.stopped() === "interrupted") return EXIT.interrupted;
    return error instanceof FewbitError && error.code.startsWith("argument/") ? EXIT.usage : EXIT.failure;
  } finally {
    cli.restore();
  }
}

/** What the argument parser says, as an error of ours. */
function usageError({ code, message }: CommanderError, root: Command, args: readonly string[]): FewbitError {
  const names = root.commands.map((candidate) => candidate.name());
  const command = root.commands.find((candidate) => candidate.name() === args[0]);
  const options = (command ?? root).options.map((option) => option.long ?? option.flags);
  const hint = `fewbit ${command ? `${command.name()} ` : ""}--help shows what there is`;
  const [, quoted = ""] = /'([^']*)'/.exec(message) ?? [];
  const unknown = (kind: string, legal: readonly string[]) =>
    new FewbitError("argument/unknown-name", { kind, name: quoted, nearest: nearestNames(quoted, legal, 3) }, { hint });
  const invalid = (name: string, value: string, expected: string) =>
    new FewbitError("argument/invalid", { name, value, expected }, { hint });
  if (code === "commander.unknownCommand") return unknown("command", names);
  if (code === "commander.unknownOption") return unknown("option", options);
  if (code === "commander.optionMissingArgument") return invalid(/--[\w-]+/.exec(quoted)?.[0] ?? quoted, "", "a value");
  const tooMany = code === "commander.excessArguments";
  return invalid(
    "the command line",
    args.join(" "),
    tooMany ? "fewer arguments (quote a text that has spaces)" : message,
  );
}

process.exitCode = await main(process.argv.slice(2));
