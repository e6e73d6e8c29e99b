// One linear: weights rotate through copies that no cache holds; inputs are quantized already.
import { casesOf } from "./cases.mjs";
import { storedLayout } from "./library.mjs";
import { clock, graphBuilder, matrix, ROTATED, run } from "./program.mjs";
import { randomDense, randomTensor } from "./random.mjs";
import { formatsOf, inputFormat, unitOf } from "./recipes.mjs";

export async function linear(session, options) {
  const { shapes, rows, recipes } = casesOf("linear", options);
  for (const recipe of recipes)
    for (const [n, k] of shapes)
      for (const m of rows) {
        session.progress(`linear ${recipe} ${n}x${k} M=${m}`);
        const about = { name: `${recipe} ${n}x${k} M=${m}`, recipe, n, k, rows: m };
        try {
          await one(session, about, formatsOf(recipe, [n, k], inputFormat(options.inputs)));
        } catch (error) {
          session.refuse(about, error);
        }
      }
  return session.rows;
}

async function one(session, about, { weight, activation, attrs }) {
  const { n, k, rows: m } = about;
  const bytes = storedLayout(weight, [n, k]).bytes;
  const copies = session.small ? 2 : Math.min(16, Math.max(2, Math.ceil(ROTATED / bytes)));
  const g = graphBuilder();
  const x = g.operand("x", activation, [m, k]);
  for (let i = 0; i < copies; i++) g.one("linear", [x, matrix(g, `w${i}`, weight, [n, k])], attrs, `y${i}`);
  const tensor = randomTensor(weight, [n, k]);
  const input = activation === null ? randomDense([m, k]) : randomTensor(activation, [m, k]);
  const program = await run(session, g, { weights: () => tensor, inputs: { x: input } });
  const flops = 2 * m * n * k;
  const moved = bytes + 4 * m * n + (activation === null ? 4 * m * k : storedLayout(activation, [m, k]).bytes);
  const unit = unitOf({ weight, activation });
  const predicted = session.predict({ bytes: moved, flops, kind: unit });
  session.expect(about.name, predicted);
  await program.use(async () => {
    const samples = await clock(session, program, copies);
    session.record({
      ...about,
      unit,
      kernel: program.kernel("linear"),
      copies,
      samples,
      predicted,
      bytes: moved,
      flops,
    });
  });
}
