// Attention: one token after a full cache, and whole prompts.
import { casesOf } from "./cases.mjs";
import { CODECS, FLOAT8_PROBABILITIES, FORMATS, kvFormat, storedLayout, withScale } from "./library.mjs";
import { clock, graphBuilder, ROTATED, run } from "./program.mjs";
import { randomDense, randomTensor } from "./random.mjs";

/** Attentions that a run holds at least: a token has one in each layer, and one alone would be timed with its submission. */
const LAYERS = 4;

/** Probabilities that meet values in bf16: declared, as everything that rounds. */
export const BF16_PROBABILITIES = { codec: CODECS.bf16, scale: 1 };

export async function sdpa(session, options) {
  const cases = casesOf("sdpa", options);
  for (const context of cases.contexts) {
    for (const kv of cases.kv) {
      const about = { name: `decode ${kv} ${context}`, pass: "decode", kv, context };
      await attempt(session, about, () => decode(session, about, cases));
    }
  }
  for (const context of cases.contexts) {
    for (const prompt of cases.prompts) {
      const about = { name: `prompt ${prompt} ${context}`, pass: "prompt", kv: prompt, context };
      await attempt(session, about, () => whole(session, about, cases));
    }
  }
  tables(session, cases);
  return session.rows;
}

/** Microseconds of everything that was measured, ours and the peer's: a row a context. */
function tables(session, { contexts }) {
  for (const [pass, unit] of [
    ["decode", "gb_per_s"],
    ["prompt", "tflop_per_s"],
  ]) {
    const rows = session.rows.filter((row) => row.pass === pass && row.refused === undefined);
    const columnOf = ({ peer, name, kv }) => (peer === undefined ? kv : name.split(" ").slice(0, 2).join(" "));
    const columns = [...new Set(rows.map(columnOf))];
    if (columns.length === 0) continue;
    session.note(`\n${pass}, us (${unit === "gb_per_s" ? "TB/s" : "TFLOP/s"}):`);
    session.table([
      ["keys", ...columns],
      ...contexts.map((context) => [
        context,
        ...columns.map((column) => {
          const row = rows.find((row) => row.context === context && columnOf(row) === column);
          if (row === undefined) return "-";
          const rate = unit === "gb_per_s" ? row[unit] / 1000 : row[unit];
          return `${Number(row.median_us.toPrecision(4))} (${Number(rate.toPrecision(3))})`;
        }),
      ]),
    ]);
  }
}

async function attempt(session, about, measure) {
  session.progress(`sdpa ${about.name}`);
  try {
    await measure();
  } catch (error) {
    session.refuse(about, error);
  }
}

async function decode(session, about, { heads, kvHeads, size }) {
  const { kv, context } = about;
  const format = kvFormat(kv);
  const shape = [kvHeads, context, size];
  const bytes = 2 * storedLayout(format, [kvHeads * context, size]).bytes;
  const copies = session.small ? 2 : Math.min(32, Math.max(LAYERS, Math.ceil(ROTATED / bytes)));
  const g = graphBuilder({ T: 1, past: context });
  const q = g.operand("q", null, ["T", heads * size]);
  const attrs = { heads, kvHeads, scale: 1 / Math.sqrt(size), causal: true, position: "past" };
  const inputs = { q: randomDense([1, heads * size]) };
  const cache = randomTensor(format, [kvHeads * context, size]);
  for (let i = 0; i < copies; i++) {
    g.one("sdpa", [q, g.operand(`k${i}`, format, shape), g.operand(`v${i}`, format, shape)], attrs, `y${i}`);
    Object.assign(inputs, { [`k${i}`]: cache, [`v${i}`]: cache });
  }
  const program = await run(session, g, { inputs, symbols: { T: 1, past: context - 1 } });
  const flops = 4 * heads * size * context;
  const predicted = session.predict({ bytes });
  session.expect(about.name, predicted);
  await program.use(async () => {
    const samples = await clock(session, program, copies);
    session.record({ ...about, kernel: program.kernel("sdpa"), copies, samples, predicted, bytes, flops });
  });
}

/**
 * Queries, keys and values as a prompt has them. `f32` rounds nothing but the cache, which is bf16; `kv-int8` and others nothing but
 * the cache, which is of that format; `float8` has a scale a KV head, as whole prompts are quantized.
 */
function operands(kind, { heads, kvHeads, size, context }) {
  if (kind.startsWith("kv-"))
    return [[null, [context, heads * size]], [kvFormat(kind.slice(3)), [kvHeads, context, size]], undefined];
  if (kind === "float8") {
    const whole = (rows) => withScale(FORMATS.float8_e4m3, { block: [rows, size] });
    const keys = [whole(context), [1, kvHeads, context, size]];
    return [[whole((heads / kvHeads) * context), [1, heads, context, size]], keys, FLOAT8_PROBABILITIES];
  }
  const keys = [FORMATS.bf16, [kvHeads, context, size]];
  if (kind === "f32") return [[null, [context, heads * size]], keys, undefined];
  return [[FORMATS[kind], [context, heads, size]], keys, BF16_PROBABILITIES];
}

async function whole(session, about, { heads, kvHeads, size }) {
  const { kv: kind, context } = about;
  const [query, keys, probabilities] = operands(kind, { heads, kvHeads, size, context });
  const g = graphBuilder();
  const attrs = {
    ...{ heads, kvHeads, scale: 1 / Math.sqrt(size), causal: true },
    ...(probabilities === undefined ? {} : { probabilities }),
  };
  g.one("sdpa", [g.operand("q", ...query), g.operand("k", ...keys), g.operand("v", ...keys)], attrs, "y");
  const tensor = ([format, shape]) =>
    format === null ? randomDense(shape) : randomTensor(format, [shape.slice(0, -1).reduce((a, b) => a * b, 1), size]);
  const cache = tensor(keys);
  const program = await run(session, g, { inputs: { q: tensor(query), k: cache, v: cache } });
  const flops = 2 * heads * size * context * (context + 1);
  const predicted = session.predict({ flops, kind: kind === "float8" ? "float8" : "bf16" });
  session.expect(about.name, predicted);
  await program.use(async () => {
    const samples = await clock(session, program);
    session.record({ ...about, kernel: program.kernel("sdpa"), samples, predicted, flops });
  });
}
