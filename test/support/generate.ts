import type { LoadModelOptions } from "../../src/models/load.js";
import { type GeneratedToken, type GenerateOptions, loadModel, type Model } from "../../src/models/model.js";
import { type Device, open } from "../../src/runtime/device.js";
import { tinyModel } from "./tiny-model.js";

export const reference = () => open({ prefer: ["reference"] });

/** A tiny model, or the given folder's, on a device. */
export const load = (device: Device, options: Partial<LoadModelOptions> = {}, folder = tinyModel()) =>
  loadModel(folder, { device, ...options });

/** Twelve tokens, whatever they are, unless the options say otherwise. */
export async function collect(
  model: Model,
  prompt: string | number[],
  options: GenerateOptions = {},
): Promise<GeneratedToken[]> {
  const tokens: GeneratedToken[] = [];
  for await (const token of model.generate(prompt, { ignoreEos: true, maxTokens: 12, ...options })) tokens.push(token);
  return tokens;
}

/** Seventeen tokens of the tiny model's tokenizer. */
export const PROMPT = "Call me Ishmael.";
