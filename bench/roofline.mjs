// ReLU -> Linear with M = K = N, end to end: what each recipe should gain over bf16, and what it does.
import { casesOf } from "./cases.mjs";
import { storedLayout } from "./library.mjs";
import { clock, graphBuilder, matrix, ROTATED, run } from "./program.mjs";
import { randomDense, randomTensor } from "./random.mjs";
import { formatsOf, inputFormat, unitOf } from "./recipes.mjs";

/** Inputs, each with its own weight, that one run takes: the host does not submit small products as fast as they end. */
const copiesOf = (size) => Math.min(16, Math.ceil(ROTATED / (4 * size * size)));

export async function roofline(session, options) {
  const { sizes, recipes } = casesOf("roofline", options);
  const inputs = inputFormat(options.inputs);
  const all = recipes.includes("none") ? recipes : ["none", ...recipes];
  const cases = sizes.flatMap((size) => all.map((recipe) => ({ recipe, size, ...formatsFor(recipe, size, inputs) })));
  for (const each of cases) each.predicted = each.refused === undefined ? predict(session, each) : null;
  const predicted = (recipe, size) => cases.find((c) => c.recipe === recipe && c.size === size)?.predicted ?? null;
  const measured = (recipe, size) =>
    session.rows.find((r) => r.recipe === recipe && r.size === size)?.median_us ?? null;
  const gain = (times, recipe, size) => {
    const [ours, theirs] = [times(recipe, size), times("none", size)];
    return ours === null || theirs === null ? null : theirs / ours;
  };
  const time = (us) => (us == null ? "-" : Number(us.toPrecision(4)));
  const shown = (value) => value?.toFixed(2) ?? "-";
  const table = (title, names, cell) => {
    session.note(`\n${title}`);
    session.table([["recipe", ...sizes], ...names.map((name) => [name, ...sizes.map((size) => cell(name, size))])]);
  };
  if (session.known !== undefined) table("expected speed-up over bf16:", all, (...at) => shown(gain(predicted, ...at)));

  let input = null;
  for (const [i, each] of cases.entries()) {
    const { recipe, size } = each;
    session.progress(`roofline ${recipe} ${size} (${i + 1} of ${cases.length})`);
    const about = { name: `relu, linear ${recipe} ${size}`, recipe, size };
    try {
      if (each.refused !== undefined) throw each.refused;
      // The same numbers for all recipes of a size, made once.
      if (input?.shape[0] !== size) input = randomDense([size, size]);
      await one(session, about, each, input, (median) => {
        const theirs = recipe === "none" ? median : (measured("none", size) ?? Number.NaN) * 1e-6;
        const [expected, observed] = [gain(predicted, recipe, size), theirs / median];
        return { ...(expected === null ? {} : { expected }), ...(Number.isFinite(observed) ? { observed } : {}) };
      });
    } catch (error) {
      session.refuse(about, error);
    }
  }
  table("observed (expected) speed-up over bf16, end to end:", all, (...at) => {
    const expected = gain(predicted, ...at);
    return `${shown(gain(measured, ...at))}${expected === null ? "" : ` (${shown(expected)})`}`;
  });
  table("us:", all, (...at) => time(measured(...at)));
  const peers = [...new Set(session.rows.filter(({ work }) => work !== undefined).map(({ work }) => work))];
  if (peers.length > 0)
    table("PyTorch, us:", peers, (work, size) => {
      const row = session.rows.find((each) => each.work === work && each.peer_size === size);
      return time(row?.median_us);
    });
  return session.rows;
}

/** The formats of a case, or why the recipe refuses such a layer. */
function formatsFor(recipe, size, inputs) {
  try {
    return formatsOf(recipe, [size, size], inputs);
  } catch (refused) {
    return { refused };
  }
}

const stepBytes = (activation, size) =>
  activation === null ? 4 * size * size : storedLayout(activation, [size, size]).bytes;

/** One pass over the input, which writes what the product reads, and the product. */
function predict(session, { weight, activation, size }) {
  const input = stepBytes(activation, size);
  const before = session.predict({ bytes: 4 * size * size + input });
  const bytes = input + storedLayout(weight, [size, size]).bytes + 4 * size * size;
  const product = session.predict({ bytes, flops: 2 * size ** 3, kind: unitOf({ weight, activation }) });
  return before === null ? null : before + product;
}

async function one(session, about, formats, x, gains) {
  const { size } = about;
  const { weight, activation, attrs } = formats;
  const copies = session.small ? 2 : copiesOf(size);
  const g = graphBuilder();
  const inputs = {};
  for (let i = 0; i < copies; i++) {
    const relu = g.one("unary", [g.operand(`x${i}`, null, [size, size])], { fn: "relu" }, `relu${i}`);
    const input = activation === null ? relu : g.one("quantize", [relu], { format: activation }, `quantize${i}`);
    g.one("linear", [input, matrix(g, `w${i}`, weight, [size, size])], attrs, `y${i}`);
    inputs[`x${i}`] = x;
  }
  const tensor = randomTensor(weight, [size, size]);
  const program = await run(session, g, { weights: () => tensor, inputs });
  const bytes = 8 * size * size + storedLayout(weight, [size, size]).bytes + 2 * stepBytes(activation, size);
  const [kernel, quantize] = ["linear", "quantize"].map((kind) => program.kernel(kind));
  await program.use(async () => {
    const samples = await clock(session, program, copies);
    session.record({
      ...about,
      ...gains(samples[samples.length >> 1]),
      unit: unitOf(formats),
      kernel,
      ...(quantize === undefined ? {} : { quantize }),
      copies,
      samples,
      predicted: formats.predicted,
      bytes,
      flops: 2 * size ** 3,
    });
  });
}
