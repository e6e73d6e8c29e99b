import config from "../../models/fewbit-tiny/config.json?url";
import weights from "../../models/fewbit-tiny/model.safetensors?url";
import tokenizer from "../../models/fewbit-tiny/tokenizer.json?url";
import tokenizerConfig from "../../models/fewbit-tiny/tokenizer_config.json?url";

const ADDRESSES = {
  "config.json": config,
  "model.safetensors": weights,
  "tokenizer.json": tokenizer,
  "tokenizer_config.json": tokenizerConfig,
} as const;

let files: Promise<ReadonlyMap<string, Uint8Array>> | null = null;

/** The bundled model, read once. Whole files: a static host need not answer ranges. */
export function modelFiles(): Promise<ReadonlyMap<string, Uint8Array>> {
  files ??= Promise.all(Object.entries(ADDRESSES).map(async ([name, url]) => [name, await bytes(url)] as const)).then(
    (entries) => new Map(entries),
  );
  files.catch(() => {
    files = null;
  });
  return files;
}

export async function modelConfig(): Promise<Readonly<Record<string, unknown>>> {
  return JSON.parse(new TextDecoder().decode(await bytes(config)));
}

async function bytes(url: string): Promise<Uint8Array> {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: HTTP ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}
