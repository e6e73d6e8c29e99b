// `npm run bench -- linear|sdpa|model|roofline --backend cuda|webgpu|reference`: times kernels and models against what bytes and
// operations allow, and against PyTorch where it is found. Build first (`npm run build`); FEWBIT names another built package.
import { RECIPES } from "./cases.mjs";
import { Command, InvalidArgumentError, Option } from "./library.mjs";
import { linear } from "./linear.mjs";
import { model } from "./model.mjs";
import { peer } from "./peer.mjs";
import { roofline } from "./roofline.mjs";
import { sdpa } from "./sdpa.mjs";
import { Session } from "./session.mjs";

const BENCHES = { linear, sdpa, model, roofline };

function positive(text) {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1) throw new InvalidArgumentError("It must be a positive integer.");
  return value;
}
const numbers = (text) => text.split(",").map(positive);
const names = (text) => text.split(",");
const shapes = (text) => text.split(",").map((shape) => shape.split("x").map(positive));

const command = (name, about) =>
  new Command(name)
    .description(about)
    .addOption(
      new Option("--backend <name>", "device to run on").choices(["cuda", "webgpu", "reference"]).default("webgpu"),
    )
    .option("--tier <name>", "webgpu: what of the device to use")
    .option("--runs <n>", "samples a case", positive, 7)
    .option("--small", "sizes that a software GPU runs in seconds")
    .option("--json [file]", "JSON lines, appended to a file; to standard output without one")
    .option("--no-peer", "do not time PyTorch beside it")
    .action((options) => main(name, options));

const recipes = () => new Option("--recipes <list>", `of ${RECIPES.join(", ")} and other short names`).argParser(names);
const inputs = () =>
  new Option("--inputs <format>", "what the inputs of weight-only linears are declared to be rounded to")
    .choices(["bf16", "f32"])
    .default("bf16");

const program = new Command("bench")
  .description("Times fewbit against rooflines and PyTorch.")
  .addCommand(
    command("linear", "linears of Llama-3.1-8B")
      .addOption(recipes())
      .addOption(inputs())
      .option("--shapes <NxK,...>", "weights", shapes)
      .option("--rows <M,...>", "rows of the input", numbers),
  )
  .addCommand(
    command("sdpa", "attention: one token after a full cache, and whole prompts")
      .option("--contexts <list>", "keys", numbers)
      .option("--kv <list>", "caches", names)
      .option("--prompts <list>", "operands of prompts: bf16, float8, f32, kv-int8 and other caches", names),
  )
  .addCommand(
    command("model", "a decoder with random weights: tokens/s of a prompt and of decoding")
      .addOption(recipes())
      .addOption(inputs())
      .option("--kv <name>", "the cache's format", "bf16")
      .option(
        "--layers <n>",
        "layers of the decoder: fewer are loaded sooner, to time builds against each other",
        positive,
      )
      .option("--prefill <n>", "tokens of the long prompt", positive)
      .option("--profile", "what each step of a token and of a prompt takes (cuda)"),
  )
  .addCommand(
    command("roofline", "ReLU -> Linear with M = K = N: expected and observed speed-up over bf16")
      .addOption(recipes())
      .addOption(inputs())
      .option("--sizes <list>", "M = K = N", numbers),
  );

async function main(bench, options) {
  const abort = new AbortController();
  // The first Ctrl-C ends after the run in flight and keeps what was measured; a second one ends at once.
  process.once("SIGINT", () => abort.abort());
  const json = options.json === true ? "-" : options.json;
  const shared = { ...options, json, signal: abort.signal, small: options.small ?? false };
  let session;
  try {
    session = await Session.open(bench, shared);
    if (options.peer) await peer(session, shared);
    await BENCHES[bench](session, shared);
  } catch (error) {
    if (!abort.signal.aborted) throw error;
    console.error("stopped");
    process.exitCode = 130;
  } finally {
    await session?.close();
  }
}

try {
  await program.parseAsync();
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
