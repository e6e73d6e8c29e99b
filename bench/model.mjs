// A decoder with random weights: a long prompt in one run, and single tokens after a short one.
import { casesOf, configOf } from "./cases.mjs";
import {
  buildDecoder,
  decoderBuckets,
  FORMATS,
  kvFormat,
  packSettings,
  parseConfig,
  ropeTables,
  storedLayout,
  tensorSpecs,
} from "./library.mjs";
import { randomDense, randomTensor } from "./random.mjs";
import { formatsOf, inputFormat, unitOf } from "./recipes.mjs";
import { BF16_PROBABILITIES } from "./sdpa.mjs";

export async function model(session, options) {
  const cases = casesOf("model", options);
  for (const recipe of cases.recipes) {
    const named = cases.layers === undefined ? cases.config : `${cases.config}, layers ${cases.layers},`;
    const about = { name: `${named} ${recipe}`, recipe, kv: options.kv ?? "bf16", inputs: options.inputs };
    try {
      await one(session, about, cases);
    } catch (error) {
      session.refuse(about, error);
    }
  }
  const rates = (recipe, pass) =>
    [false, true].map((theirs) => {
      const own = (row) => row.recipe === recipe && row.pass === pass && (row.peer !== undefined) === theirs;
      const rate = session.rows.find((row) => own(row) && row.rate !== undefined)?.rate;
      return rate === undefined ? "-" : Number(rate.toPrecision(4));
    });
  session.note("\ntokens/s (PyTorch's as its lines above say):");
  session.table([
    ["recipe", "decode", "PyTorch", "prompt", "PyTorch"],
    ...cases.recipes.map((recipe) => [recipe, ...rates(recipe, "decode"), ...rates(recipe, "prefill")]),
  ]);
  return session.rows;
}

/** Matrices follow the recipe, but for the embedding; what it refuses stays bf16. */
function formatOf(recipe, inputs) {
  return ({ role, shape }) => {
    if (role === "embedding") return { weight: FORMATS.bf16, activation: null };
    try {
      return formatsOf(recipe, shape, inputs);
    } catch {
      return { weight: FORMATS.bf16, activation: inputs };
    }
  };
}

/** A weight source by type. Layers share what they are given; each has a buffer of its own on the device. */
function randomWeights(graph) {
  const types = new Map(graph.values.filter(({ role }) => role === "weight").map(({ name, type }) => [name, type]));
  const made = new Map();
  return (name) => {
    const type = types.get(name);
    const key = `${type.kind} ${type.format?.name} ${type.shape}`;
    if (!made.has(key))
      made.set(key, type.kind === "format" ? randomTensor(type.format, type.shape) : randomDense(type.shape));
    return made.get(key);
  };
}

/** A graph whose every node is what `change(node, values, quantized)` makes of it; `quantized(id, shape, attrs)` is the value of a quantize before it. */
function rewritten(graph, change) {
  const values = [...graph.values];
  const nodes = graph.nodes.flatMap((node) => {
    const before = [];
    const quantized = (id, shape, attrs) => {
      const { format } = attrs;
      const made = { id: values.length, name: `${values[id].name}.${format.name}`, role: "value" };
      values.push({ ...made, type: { kind: "format", format, shape } });
      before.push({ op: "quantize", inputs: [id], outputs: [made.id], attrs });
      return made.id;
    };
    const changed = change(node, values, quantized); // fills `before`
    return [...before, changed];
  });
  return { ...graph, values, nodes };
}

/** Queries and probabilities of every sdpa declared bf16, as the inputs of linears are. */
const withBf16Attention = (graph) =>
  rewritten(graph, (node, values, quantized) => {
    const [q, ...rest] = node.inputs;
    const type = values[q]?.type;
    if (node.op !== "sdpa" || type.kind !== "dense") return node;
    const { heads } = node.attrs;
    const [tokens, width] = type.shape;
    const stored = quantized(q, [tokens, heads, width / heads], { format: FORMATS.bf16, heads });
    return { ...node, inputs: [stored, ...rest], attrs: { ...node.attrs, probabilities: BF16_PROBABILITIES } };
  });

/** The input of the head in the format that those of other linears have: `buildDecoder` leaves it float32. */
const withHeadInput = (graph, format) =>
  rewritten(graph, (node, values, quantized) => {
    const [x, ...rest] = node.inputs;
    if (node.op !== "linear" || values[node.outputs[0]].name !== "logits") return node;
    return { ...node, inputs: [quantized(x, values[x].type.shape, { format }), ...rest] };
  });

/** Bytes and operations of a token and of a prompt, from the shapes. */
function costs(config, formats, kv, { decode, prefill }) {
  const { layers, kvHeads, heads, headDim } = config;
  const matrices = tensorSpecs(config).filter(({ role, shape }) => shape.length === 2 && role !== "embedding");
  const bytes = matrices.reduce((sum, spec) => sum + storedLayout(formats(spec).weight, spec.shape).bytes, 0);
  const count = (specs) => specs.reduce((sum, { shape: [n, k] }) => sum + n * k, 0);
  const cache = (tokens) => 2 * layers * storedLayout(kv, [kvHeads * tokens, headDim]).bytes;
  const inner = matrices.filter(({ role }) => role !== "head");
  return {
    token: { bytes: bytes + cache(decode.prompt + decode.tokens / 2), flops: 2 * count(matrices) },
    // The head sees the last token alone.
    prompt: {
      bytes,
      flops: 2 * prefill * count(inner) + 2 * layers * heads * headDim * prefill * (prefill + 1),
      unit: unitOf(formats(inner[0])),
    },
  };
}

async function one(session, about, cases) {
  const { decode, prefill } = cases;
  const { signal } = session;
  const config = parseConfig(configOf(cases));
  const formats = formatOf(about.recipe, inputFormat(about.inputs));
  const capacity = Math.max(prefill, decode.prompt + decode.tokens);
  const kv = kvFormat(about.kv);
  const decoder = buildDecoder(config, {
    weightFormat: (spec) => formats(spec).weight,
    activationFormat: (spec) => formats(spec).activation,
    fastAccum: (spec) => formats(spec).attrs?.fastAccum === true,
    kvFormat: kv,
    maxTokens: prefill,
    capacity,
    logits: "last",
  });
  const { activation } = formats(tensorSpecs(config).find(({ role }) => role === "head"));
  const declared = activation === null ? decoder : withHeadInput(decoder, activation);
  const graph = about.inputs === "bf16" ? withBf16Attention(declared) : declared;
  const { token, prompt } = costs(config, formats, kv, { decode, prefill });
  const predicted = {
    token: session.predict({ ...token, launches: 0 }),
    prompt: session.predict({ ...prompt, kind: prompt.unit }),
  };
  if (predicted.token !== null) {
    const [tokens, prompts] = [1 / predicted.token, prefill / predicted.prompt].map(Math.round);
    session.note(`${about.name}: memory allows ${tokens} tokens/s, ${prompt.unit} units ${prompts} of a prompt`);
  }
  const [random, tables] = [randomWeights(graph), ropeTables(config, capacity)];
  const program = await session.device.compile(graph, {
    signal,
    buckets: decoderBuckets(capacity),
    weights: (weight) => tables.get(weight) ?? random(weight),
    onProgress: (done, all) => session.progress(`${about.name}: ${gigabytes(done)} of ${gigabytes(all)} GB`),
  });
  try {
    await measure(session, about, program, { config, decode, prefill, token, prompt, predicted });
  } finally {
    program[Symbol.dispose]();
  }
}

/** Steps of a run by kernel and ops, the costliest first: each timed by itself, so some microseconds longer than in a graph. */
async function profile(session, about, { executable, plan }, symbols) {
  if (executable.profile === undefined) return;
  await executable.profile(symbols);
  const seconds = await executable.profile(symbols);
  const bucket = plan.buckets.find(({ symbols: most }) =>
    Object.entries(symbols).every(([name, n]) => n <= most[name]),
  );
  const kinds = new Map();
  for (const [i, step] of plan.steps.entries()) {
    const kind = `${bucket.choices[i].kernel.id} ${step.nodes.map(({ op }) => op).join("+")}`;
    const { count, total } = kinds.get(kind) ?? { count: 0, total: 0 };
    kinds.set(kind, { count: count + 1, total: total + seconds[i] * 1e6 });
  }
  session.note(`profile of ${about.name}, ${symbols.T} tokens after ${symbols.past}:`);
  const sorted = [...kinds].sort(([, a], [, b]) => b.total - a.total);
  session.table([
    ["step", "count", "us each", "us"],
    ...sorted.map(([kind, { count, total }]) => [kind, count, (total / count).toFixed(1), total.toFixed(0)]),
  ]);
}

const gigabytes = (bytes) => (bytes / 1e9).toFixed(1);

async function measure(session, about, program, { config, decode, prefill, token, prompt, predicted }) {
  const { executable, plan } = program;
  const settings = (step) => {
    const data = packSettings({ temperature: 0, topK: 0, topP: 1, seed: 0, step });
    executable.write("settings", { dtype: "u32", shape: [5], data });
  };
  /** A run of many tokens from an empty cache; the token that it draws is the input of the next. */
  const start = async (count) => {
    const data = Int32Array.from({ length: count }, (_, i) => (i * 7919) % config.vocabSize);
    executable.write("ids", { dtype: "i32", shape: [count], data });
    settings(0);
    executable.submit({ T: count, past: 0 });
    await executable.read("sampled");
  };
  if (session.profiles) {
    await start(decode.prompt);
    for (const symbols of [
      { T: 1, past: decode.prompt },
      { T: prefill, past: 0 },
    ])
      await profile(session, about, program, symbols);
  }
  const kernels = (bucket) =>
    Object.fromEntries(plan.steps.map(({ kind }, i) => [kind, plan.buckets[bucket].choices[i].kernel.id]));
  const rate = (count, samples) => ({ rate: count / samples[samples.length >> 1], unit: "tokens/s" });

  const prompts = await session.time(() => start(prefill));
  session.record({
    ...about,
    ...{ name: `${about.name} prompt`, pass: "prefill", tokens: prefill, kernels: kernels(plan.buckets.length - 1) },
    ...{ samples: prompts, predicted: predicted.prompt, bytes: prompt.bytes, flops: prompt.flops },
    ...rate(prefill, prompts),
  });
  // As a generation runs: the token stays on the device, and the next run is on its way before the host has seen it.
  const tokens = await session.time(async () => {
    await start(decode.prompt);
    const begin = performance.now();
    let drawn = null;
    for (let step = 1; step <= decode.tokens; step++) {
      session.signal.throwIfAborted();
      settings(step);
      executable.submit({ T: 1, past: decode.prompt + step - 1 });
      const next = executable.read("sampled");
      await drawn;
      drawn = next;
    }
    await drawn;
    return (performance.now() - begin) / 1000;
  }, decode.tokens);
  session.record({
    ...about,
    ...{
      name: `${about.name} decode`,
      pass: "decode",
      prompt: decode.prompt,
      tokens: decode.tokens,
      kernels: kernels(0),
    },
    ...{ samples: tokens, predicted: predicted.token, bytes: token.bytes, flops: token.flops },
    ...rate(1, tokens),
  });
}
