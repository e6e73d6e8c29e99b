// Codes of the row kernels against those of the general ones, byte by byte: `FEWBIT=/path/to/package node bench/gpu/rows.mjs`.
// Every format that they take, over rows of random bits, normal numbers, ties, zeros, infinities and NaN, alone and behind activations and norms.
// With `--time`, what they take for prompts instead.
import { pathToFileURL } from "node:url";

const root = process.env.FEWBIT ?? process.cwd();
const from = (path) => import(pathToFileURL(`${root}/dist/${path}`).href);
const { openCuda } = await from("backends/native/device.js");
const { GENERAL_KERNELS } = await from("backends/native/kernels/general-table.js");
const { NATIVE_KERNELS } = await from("backends/native/kernels/table.js");
const { FORMATS } = await from("formats/table.js");
const { blockGrid, codecBits, formatKey, withScale } = await from("formats/format.js");
const { GraphBuilder, dense } = await from("ir/graph.js");
const { makePlan } = await from("plan/plan.js");
const { Device } = await from("index.js");

const backend = await openCuda();
const device = new Device(backend);
const { capabilities } = backend;

let state = 88172645;
const next = () => {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return state >>> 0;
};
const normal = () => ((next() + next() + next() + next()) / 2 ** 32 - 2) * 1.7;
const bits = new DataView(new ArrayBuffer(4));
const anything = () => {
  bits.setUint32(0, next());
  return bits.getFloat32(0);
};

/** Kinds of rows: what each makes of a row of normal numbers. */
const ROWS = [
  (row) => row,
  (row) => row.map(() => anything()).map((x) => (Number.isFinite(x) ? x : 0)),
  // Whole and half steps of a grid whose largest is a code's largest: quotients are ties.
  (row) => row.map((_, i) => (i === 0 ? 448 : ((next() % 1793) - 896) / 2)),
  (row) => row.map((_, i) => (i % 3 === 0 ? -0 : 0)),
  (row) => row.map((x) => x * 2 ** -140),
  (row) => row.map((x) => x * 2 ** 125),
  (row) => row.map((x, i) => (i === row.length >> 1 ? 3e38 : x * 2 ** -80)),
  (row) => row.map((x, i) => (i === row.length - 1 ? Number.NEGATIVE_INFINITY : x)),
  (row) => row.map((x, i) => (i === 3 ? Number.NaN : x)),
  (row) => row.map((x) => x * 2 ** -61),
];

/** Whole numbers whose squares add up to less than 2^24: in any order, so that norms of different kernels are the same. */
const WHOLE = (row) => row.map((x) => Math.round(x * 8));

const made = new Map();
/** Rows of these kinds in turn; the same ones each time. */
function values(rows, k, kinds = [ROWS[0]]) {
  const key = `${rows} ${k} ${kinds}`;
  if (!made.has(key)) made.set(key, drawn(rows, k, kinds));
  return made.get(key);
}
function drawn(rows, k, kinds) {
  const data = new Float32Array(rows * k);
  const period = Math.min(rows, 331);
  for (let r = 0; r < period; r++) data.set(kinds[r % kinds.length](Float32Array.from({ length: k }, normal)), r * k);
  for (let r = period; r < rows; r++) data.copyWithin(r * k, (r % period) * k, ((r % period) + 1) * k);
  return { dtype: "f32", shape: [rows, k], data };
}

function graph(format, rows, k, behind, copies = 1) {
  const g = new GraphBuilder();
  const type = dense("f32", [rows, k]);
  const x = g.input("x", type);
  for (let i = 0; i < copies; i++) {
    let made = x;
    if (behind === "rmsnorm") made = g.one("rmsnorm", [made, g.input("weight", dense("f32", [k]))], { eps: 1e-5 });
    else if (behind !== "values") made = g.one("unary", [made], { fn: behind === "relu" ? "relu" : "silu" });
    if (behind === "silu*mul") made = g.one("binary", [made, g.input("up", type)], { fn: "mul" });
    g.output(i === 0 ? "y" : `y${i}`, g.one("quantize", [made], { format }));
  }
  // No step touches it: reading it waits for the runs before.
  g.state("done", dense("f32", [4]));
  return g.build();
}

/** The parts of a stored tensor, without what follows the last code of scales and zero points: nothing writes that. */
function parts({ format, shape, qdata, scales, zero }) {
  const used = (words, { block, codec }) => {
    const [rows, columns] = blockGrid(block, shape);
    const bits = rows * columns * codecBits(codec);
    const last = bits >>> 5;
    return words.map((word, i) => (i < last ? word : i > last ? 0 : word & (2 ** (bits & 31) - 1)));
  };
  const [first] = format.scales;
  const zeros = zero === undefined ? [] : [used(zero, { ...first, codec: format.zero.codec })];
  return [qdata, ...scales.map((words, i) => used(words, format.scales[i])), ...zeros];
}

async function coded(plan, inputs) {
  const program = await device.load(plan);
  try {
    return (await program.run({ inputs })).y;
  } finally {
    program[Symbol.dispose]();
  }
}

const formats = new Map();
for (const format of Object.values(FORMATS)) {
  const variants = [format];
  if (format.scales.length === 1)
    for (const block of [
      [1, "all"],
      ["all", "all"],
    ])
      variants.push(withScale(format, { block }));
  for (const each of variants) formats.set(formatKey(each), each);
}

/** What is compared: every format, over rows that a warp, a block, a cluster and few threads share, behind what may be fused. */
function* cases() {
  for (const format of formats.values())
    for (const [rows, k] of [
      [1, 256],
      [21, 256],
      [1, 4096],
      [1, 14336],
      [11, 14336],
      [300, 4096],
      [300, 1024],
      [300, 772],
    ]) {
      // Blocks must fit a row.
      if (format.scales.some(({ block }) => block[1] !== "all" && k % block[1] !== 0)) continue;
      for (const behind of ["values", "relu", "silu*mul", "rmsnorm"]) yield { format, rows, k, behind };
    }
}

/** Of which kinds the rows of each tensor are. With one scale for all rows the largest kind would hide the others. */
function kindsOf(format, behind) {
  if (behind === "rmsnorm") return [[WHOLE]];
  if (format.scales[0]?.block[0] !== "all") return [ROWS];
  return (behind === "values" ? ROWS : ROWS.slice(0, 1)).map((kind) => [kind]);
}

/** The plans with and without row kernels, if they differ; null where a format cannot be made on a device. */
function plansOf(text) {
  try {
    const plans = [NATIVE_KERNELS, GENERAL_KERNELS].map((kernels) => makePlan(text, { kernels, capabilities }));
    const [ours, theirs] = plans.map(({ buckets }) => buckets[0].choices.at(-1).kernel.id);
    return ours === theirs ? null : plans;
  } catch (error) {
    if (error.code === "plan/no-kernel" || error.code === "graph/invalid") return null;
    throw error;
  }
}

/** The first word in which two tensors differ, in words, or null. */
function difference(ours, theirs) {
  for (const [i, part] of ours.entries()) {
    const at = part.findIndex((word, j) => word !== theirs[i][j]);
    if (at >= 0) return `part ${i}, word ${at}: ${part[at].toString(16)} instead of ${theirs[i][at].toString(16)}`;
  }
  return null;
}

async function compare() {
  let [compared, failed] = [0, 0];
  const start = performance.now();
  for (const { format, rows, k, behind } of cases()) {
    const plans = plansOf(graph(format, rows, k, behind));
    if (plans === null) continue;
    for (const kinds of kindsOf(format, behind)) {
      const inputs = { x: values(rows, k, kinds) };
      if (behind === "silu*mul") inputs.up = values(rows, k);
      if (behind === "rmsnorm") inputs.weight = { ...values(1, k), shape: [k] };
      const [ours, theirs] = [parts(await coded(plans[0], inputs)), parts(await coded(plans[1], inputs))];
      const wrong = difference(ours, theirs);
      if (wrong !== null) {
        console.log(`FAIL ${formatKey(format)} ${behind} ${rows}x${k}, rows of ${kinds[0]}: ${wrong}`);
        failed++;
      }
      compared++;
    }
  }
  console.log(`${compared} tensors compared in ${((performance.now() - start) / 1000).toFixed(0)} s, ${failed} differ`);
  return failed;
}

/** Microseconds of a quantize among others, in a graph: what programs replay. */
async function time() {
  for (const [name, format] of [
    ["bf16", FORMATS.bf16],
    ["e4m3 row", withScale(FORMATS.float8_e4m3, { block: [1, "all"] })],
    ["e4m3 tensor", withScale(FORMATS.float8_e4m3, { block: ["all", "all"] })],
    ["int8 row", withScale(FORMATS.int8, { block: [1, "all"] })],
    ["mxfp8", FORMATS.mxfp8_e4m3],
  ])
    for (const [rows, k, behind] of [
      [1, 4096, "values"],
      [1, 14336, "values"],
      [1024, 1024, "relu"],
      [4096, 4096, "values"],
      [4096, 14336, "values"],
      [8192, 8192, "relu"],
    ]) {
      const copies = rows > 1024 ? 2 : 16;
      const plan = makePlan(graph(format, rows, k, behind, copies), { kernels: NATIVE_KERNELS, capabilities });
      const { executable } = await device.load(plan);
      executable.write("x", values(rows, k));
      const times = [];
      const runs = rows > 1024 ? 20 : 200;
      for (let i = 0; i < 7; i++) {
        const begin = performance.now();
        for (let run = 0; run < runs; run++) executable.submit({});
        await executable.read("done");
        times.push(((performance.now() - begin) * 1000) / runs / copies);
      }
      times.sort((a, b) => a - b);
      console.log(
        `${name} ${behind} ${rows}x${k}: ${times[3].toFixed(2)} us [${times[0].toFixed(2)}, ${times[6].toFixed(2)}]`,
      );
      executable[Symbol.dispose]();
    }
}

if (process.argv.includes("--time")) await time();
else process.exitCode = (await compare()) > 0 ? 1 : 0;
await device[Symbol.asyncDispose]();
