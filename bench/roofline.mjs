// ReLU -> Linear with M = K = N, end to end: what each recipe should gain over bf16, and what it does.
import { casesOf } from "./cases.mjs";
import { storedLayout } from "./library.mjs";
import { clock, graphBuilder, matrix, run } from "./program.mjs";
import { randomDense, randomTensor } from "./random.mjs";
import { formatsOf, inputFormat, unitOf } from "./recipes.mjs";

export async function roofline(session, options) {
  const { sizes, recipes } = casesOf("roofline", options);
  const inputs = inputFormat(options.inputs);
  const all = recipes.includes("none") ? recipes : ["none", ...recipes];
  const predictions = [];
  for (const recipe of all) {
    for (const size of sizes) {
      try {
        predictions.push([recipe, size, predict(session, formatsOf(recipe, [size, size], inputs), size)]);
      } catch {
        predictions.push([recipe, size, null]);
      }
    }
  }
  const predicted = (recipe, size) => predictions.find(([r, s]) => r === recipe && s === size)?.[2] ?? null;
  const gain = (ours, theirs) => (ours == null || theirs == null ? "" : (theirs / ours).toFixed(2));
  if (session.known !== undefined) {
    session.note("predicted speed-up over bf16:");
    session.table([
      ["recipe", ...sizes],
      ...all.map((recipe) => [recipe, ...sizes.map((size) => gain(predicted(recipe, size), predicted("none", size)))]),
    ]);
  }
  for (const recipe of all)
    for (const size of sizes) {
      session.progress(`roofline ${recipe} ${size}`);
      const about = { name: `relu, linear ${recipe} ${size}`, recipe, size };
      try {
        await one(session, about, formatsOf(recipe, [size, size], inputs), predicted(recipe, size));
      } catch (error) {
        session.refuse(about, error);
      }
    }
  const measured = (recipe, size) => session.rows.find((r) => r.recipe === recipe && r.size === size)?.median_us;
  session.note("\nobserved (predicted) speed-up over bf16:");
  session.table([
    ["recipe", ...sizes],
    ...all.map((recipe) => [
      recipe,
      ...sizes.map((size) => {
        const expected = gain(predicted(recipe, size), predicted("none", size));
        return `${gain(measured(recipe, size), measured("none", size)) || "-"}${expected && ` (${expected})`}`;
      }),
    ]),
  ]);
  return session.rows;
}

const stepBytes = (activation, size) =>
  activation === null ? 4 * size * size : storedLayout(activation, [size, size]).bytes;

/** One pass over the input, which writes what the product reads, and the product. */
function predict(session, { weight, activation }, size) {
  const input = stepBytes(activation, size);
  const before = session.predict({ bytes: 4 * size * size + input });
  const bytes = input + storedLayout(weight, [size, size]).bytes + 4 * size * size;
  const product = session.predict({ bytes, flops: 2 * size ** 3, kind: unitOf({ weight, activation }) });
  return before === null ? null : before + product;
}

async function one(session, about, formats, predicted) {
  const { size } = about;
  const { weight, activation, attrs } = formats;
  const g = graphBuilder();
  const x = g.one("unary", [g.operand("x", null, [size, size])], { fn: "relu" }, "relu");
  const input = activation === null ? x : g.one("quantize", [x], { format: activation }, "quantize");
  g.one("linear", [input, matrix(g, "w", weight, [size, size])], attrs, "y");
  const tensor = randomTensor(weight, [size, size]);
  const program = await run(session, g, { weights: () => tensor, inputs: { x: randomDense([size, size]) } });
  const bytes = 8 * size * size + storedLayout(weight, [size, size]).bytes + 2 * stepBytes(activation, size);
  const kernel = program.kernel("linear");
  await program.use(async () => {
    const samples = await clock(session, program);
    session.record({ ...about, unit: unitOf(formats), kernel, samples, predicted, bytes, flops: 2 * size ** 3 });
  });
}
