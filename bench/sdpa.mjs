// Checks attention against its error bound and times it on the WebGPU device: `node bench/sdpa.mjs [--contexts 2048,...] [--kv int8,...]`.
// Shapes of Llama-3.1-8B: 32 heads over 8 KV heads of 128. Decoding takes one token after a full cache, a prompt 512 tokens.
// Times are wall time over many submits in a row; the median of seven series, after a series to warm up. Prints JSON lines.
import { parseArgs } from "node:util";

const root = new URL(process.env.FEWBIT ? `file://${process.env.FEWBIT}/dist/` : "../dist/", import.meta.url);
const load = (path) => import(new URL(path, root));
const { open } = await load("runtime/device.js");
const { GraphBuilder, dense, stored } = await load("ir/graph.js");
const { sdpaBound } = await load("ir/attention.js");
const { kvFormat } = await load("models/kvcache.js");
const { quantizeTensor } = await load("quantize/quantize.js");
const { typeBytes } = await load("ir/tensor.js");

const { values: args } = parseArgs({
  options: {
    contexts: { type: "string", default: "1024,8192,32768,131072" },
    kv: { type: "string", default: "bf16,int8,float8,int4" },
    runs: { type: "string", default: "7" },
    tier: { type: "string", default: "f16" },
  },
});
const [HEADS, KV_HEADS, SIZE] = [32, 8, 128];
const device = await open({ tier: args.tier });
const print = (line) => console.log(JSON.stringify({ bench: "sdpa", device: device.info.name, ...line }));

function graphOf(kv, capacity, tokens) {
  const g = new GraphBuilder({ T: tokens, past: capacity });
  const cache = stored(kvFormat(kv), [KV_HEADS, capacity, SIZE]);
  const operands = [g.input("q", dense("f32", ["T", HEADS * SIZE])), g.state("k", cache), g.state("v", cache)];
  const attrs = { heads: HEADS, kvHeads: KV_HEADS, scale: 1 / Math.sqrt(SIZE), causal: true, position: "past" };
  g.output("y", g.one("sdpa", operands, attrs, "sdpa"));
  return g.build();
}

let seed = 1;
const random = () => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return seed / 2 ** 31 - 1;
};
const numbers = (count) => Float32Array.from({ length: count }, () => 2 * random());

for (const kv of args.kv.split(",")) {
  const capacity = 1500;
  const rows = KV_HEADS * capacity;
  const [k, v] = [0, 1].map(() => quantizeTensor(numbers(rows * SIZE), [rows, SIZE], "f32", kvFormat(kv)));
  for (const [tokens, past] of [
    [1, 1400],
    [1, 0],
    [3, 77],
    [100, 333],
  ]) {
    const graph = graphOf(kv, capacity, tokens);
    const program = await device.compile(graph);
    const q = { dtype: "f32", shape: [tokens, HEADS * SIZE], data: numbers(tokens * HEADS * SIZE) };
    const symbols = { T: tokens, past };
    const { y } = await program.run({ inputs: { q, k, v }, symbols });
    const node = graph.nodes[0];
    const { value, bound } = sdpaBound(
      [q, k, v],
      node.inputs.map((id) => graph.values[id].type),
      node.attrs,
      symbols,
    );
    const part = (x, i) => (y.data[i] === x ? 0 : Math.abs(y.data[i] - x) / bound[i]);
    const worst = value.reduce((most, x, i) => Math.max(most, part(x, i)), 0);
    print({ kv, tokens, past, kernel: program.plan.buckets[0].choices[0].kernel.id, worst, passed: worst <= 1 });
    if (!(worst <= 1)) process.exitCode = 1;
    program[Symbol.dispose]();
  }
}

async function time(program, symbols, submits) {
  const start = performance.now();
  for (let i = 0; i < submits; i++) program.executable.submit(symbols);
  await program.executable.read("y");
  return (performance.now() - start) / 1000 / submits;
}

for (const kv of args.kv.split(",")) {
  for (const context of args.contexts.split(",").map(Number)) {
    for (const tokens of [1, 512]) {
      const graph = graphOf(kv, context, tokens);
      const program = await device.compile(graph);
      const symbols = { T: tokens, past: context - tokens };
      const submits = tokens === 1 ? 50 : Math.max(1, Math.round(2e5 / context));
      await time(program, symbols, submits);
      const series = [];
      for (let i = 0; i < Number(args.runs); i++) series.push(await time(program, symbols, submits));
      series.sort((a, b) => a - b);
      const seconds = series[series.length >> 1];
      const bytes = 2 * typeBytes(graph.values[1].type, graph.symbols);
      const seen = tokens * (context - (tokens - 1) / 2);
      print({
        kv,
        tokens,
        context,
        kernel: program.plan.buckets[0].choices[0].kernel.id,
        microseconds: seconds * 1e6,
        spread: (series.at(-1) - series[0]) / seconds,
        gigabytesPerSecond: bytes / seconds / 1e9,
        gigaflops: (4 * HEADS * SIZE * seen) / seconds / 1e9,
      });
      program[Symbol.dispose]();
    }
  }
}
await device[Symbol.asyncDispose]();
