// Times linear kernels on the WebGPU device with GPU timestamps: `node bench/linear.mjs [--shapes NxK,...] [--rows 1,...] [--formats ...]`.
// Weights are rotated through copies that together exceed 128 MiB, so that no cache holds them; warm-up is apart; prints the
// median, the spread, and JSON lines with everything needed to compare.
import { execSync } from "node:child_process";
import { parseArgs } from "node:util";

const root = new URL(process.env.FEWBIT ? `file://${process.env.FEWBIT}/dist/` : "../dist/", import.meta.url);
const load = (path) => import(new URL(path, root));
const { open } = await load("runtime/device.js");
const { GraphBuilder, dense, stored } = await load("ir/graph.js");
const { parseQuantizeName } = await load("quantize/names.js");
const { FORMATS } = await load("formats/table.js");
const { quantizeTensor } = await load("quantize/quantize.js");
const { concatRows } = await load("formats/tensor.js");
const { storedLayout } = await load("backends/webgpu/layout.js");

const { values: args } = parseArgs({
  options: {
    shapes: { type: "string", default: "4096x4096,6144x4096,28672x4096,4096x14336" },
    rows: { type: "string", default: "1" },
    formats: { type: "string", default: "none,int8wo,int4wo-64,float8wo,nvfp4wo,int8dq" },
    runs: { type: "string", default: "7" },
    tier: { type: "string", default: "f16" },
  },
});
const device = await open({ tier: args.tier });
const commit = (() => {
  try {
    return execSync("git rev-parse --short HEAD", { stdio: ["ignore", "pipe", "ignore"] })
      .toString()
      .trim();
  } catch {
    return process.env.FEWBIT_COMMIT ?? "unknown";
  }
})();
let seed = 1;
const random = () => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return seed / 2 ** 32;
};
const normal = (n) => Float32Array.from({ length: n }, () => random() + random() + random() + random() - 2);

for (const name of args.formats.split(",")) {
  for (const shape of args.shapes.split(",")) {
    for (const rows of args.rows.split(",").map(Number)) {
      const [n, k] = shape.split("x").map(Number);
      const config = parseQuantizeName(name);
      const weight = config === null ? FORMATS.bf16 : config.weight({ shape: [n, k], dtype: "bf16" });
      if ("refused" in weight) continue;
      // Rows repeat every 64: the bytes differ from cache line to cache line, and quantizing takes no time.
      const tile = quantizeTensor(normal(64 * k), [64, k], "f32", weight);
      const tensor = concatRows(Array.from({ length: n / 64 }, () => tile));
      const bytes = storedLayout(tensor.format, [n, k]).bytes;
      const copies = Math.min(16, Math.max(2, Math.ceil((128 * 2 ** 20) / bytes)));
      const g = new GraphBuilder({ T: rows });
      const x = g.input("x", dense("f32", ["T", k]));
      const input = config?.activation ? g.one("quantize", [x], { format: config.activation }) : x;
      for (let i = 0; i < copies; i++) {
        const w = g.weight(`w${i}`, stored(tensor.format, [n, k]));
        g.output(`y${i}`, g.one("linear", [input, w], {}));
      }
      let program;
      try {
        program = await device.compile(g.build(), { weights: () => tensor, fuse: false });
      } catch (error) {
        console.log(`${name} ${shape} M=${rows}: ${error.message.split("\n")[0].slice(0, 300)}`);
        continue;
      }
      program.executable.write("x", { dtype: "f32", shape: [rows, k], data: normal(rows * k) });
      const symbols = { T: rows };
      // Clocks rise under load: warm up for a third of a second before any sample is taken.
      for (const start = performance.now(); performance.now() - start < 300; ) {
        for (let i = 0; i < 4; i++) program.executable.submit(symbols);
        await program.executable.read("y0");
      }
      const samples = [];
      for (let i = 0; i < Number(args.runs); i++) {
        const seconds = await program.executable.profile(symbols);
        samples.push(...seconds.slice(-copies));
      }
      samples.sort((a, b) => a - b);
      const at = (q) => samples[Math.min(samples.length - 1, Math.floor(q * samples.length))] * 1e6;
      const kernel = program.plan.buckets[0].choices.at(-1).kernel.id;
      const median = at(0.5);
      const row = {
        name,
        n,
        k,
        rows,
        kernel,
        bytes,
        copies,
        device: device.info.name,
        commit,
        date: new Date().toISOString().slice(0, 10),
        samples: samples.length,
        median_us: median,
        p10_us: at(0.1),
        p90_us: at(0.9),
        gb_per_s: bytes / median / 1e3,
        tflop_per_s: (2 * rows * n * k) / median / 1e6,
      };
      console.log(
        `${name.padEnd(13)} ${shape.padEnd(12)} M=${String(rows).padEnd(5)} ${kernel.padEnd(32)} ${median.toFixed(1).padStart(9)} us  [${at(0.1).toFixed(1)}, ${at(0.9).toFixed(1)}]  ${row.gb_per_s.toFixed(0).padStart(5)} GB/s  ${row.tflop_per_s.toFixed(2).padStart(7)} TFLOP/s`,
      );
      console.error(JSON.stringify(row));
      program[Symbol.dispose]();
    }
  }
}
await device[Symbol.asyncDispose]();
