// The built package and what it depends on: those of this checkout, or of the folder that FEWBIT names.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const root = new URL(process.env.FEWBIT ? `file://${process.env.FEWBIT}/dist/` : "../dist/", import.meta.url);
const load = (path) => import(new URL(path, root));
const { resolve } = createRequire(new URL("../package.json", root));

export const { Command, InvalidArgumentError, Option } = await import(pathToFileURL(resolve("commander")));

export const { open } = await load("runtime/device.js");
export const { GraphBuilder, dense, stored } = await load("ir/graph.js");
export const { typeBytes } = await load("ir/tensor.js");
export const { CODECS, FORMATS } = await load("formats/table.js");
export const { withScale, codecBits, midCode } = await load("formats/format.js");
export const { encode, maxValue } = await load("formats/codec.js");
export const { tensorWords } = await load("formats/tensor.js");
export const { storedLayout } = await load("backends/stored-layout.js");
export const { ACCURACY_NAMES, parseQuantizeName } = await load("quantize/names.js");
export const { kvFormat } = await load("models/kvcache.js");
export const { parseConfig, tensorSpecs } = await load("models/config.js");
export const { packSettings } = await load("ir/sample.js");
export const { buildDecoder, decoderBuckets, ropeTables } = await load("models/decoder.js");
export const { FLOAT8_PROBABILITIES } = await load("models/attention.js");
