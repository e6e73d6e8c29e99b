import { Option } from "commander";
import type { ModelFolderOptions } from "../io/model-folder.js";
import type { Cli } from "./terminal.js";

/** `--revision`. */
export function revisionOption(): Option {
  return new Option("--revision <name>", "of a model of the Hugging Face Hub: a branch, tag or commit (default: main)");
}

/** How a command finds a model that is not on this machine. HF_TOKEN and HF_ENDPOINT are those of the Hub's own tools. */
export function modelSource(cli: Cli, { revision }: { readonly revision?: string }): ModelFolderOptions {
  const { HF_TOKEN, HF_ENDPOINT } = process.env;
  return {
    signal: cli.signal,
    ...(revision === undefined ? {} : { revision }),
    ...(HF_TOKEN ? { accessToken: HF_TOKEN } : {}),
    ...(HF_ENDPOINT ? { hubUrl: HF_ENDPOINT } : {}),
    onNotice: (text) => cli.err.write(`${cli.err.color.yellow("notice")} ${text}\n`),
  };
}
