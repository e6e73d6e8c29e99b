// Checks what only a GPU can show of the native backend's machinery: `FEWBIT=/path/to/package node bench/gpu/native.mjs`.
// Kernels are judged by `fewbit validate --backend cuda`; this is about memory, reads, graphs, errors and leaks.
import { execFileSync } from "node:child_process";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const root = process.env.FEWBIT ?? process.cwd();
const from = (path) => import(pathToFileURL(`${root}/dist/${path}`).href);
const { openCuda } = await from("backends/native/device.js");
const { GraphBuilder, dense, Device } = await from("index.js");

let failures = 0;
function check(what, ok, detail = "") {
  console.log(`${ok ? "ok  " : "FAIL"} ${what}${detail === "" ? "" : `: ${detail}`}`);
  if (!ok) failures++;
}
async function codeOf(run) {
  try {
    await run();
    return "none";
  } catch (error) {
    return error.code ?? `uncoded: ${error.message}`;
  }
}

if (process.argv[2] === "lost") {
  // A pointer far outside any buffer: the fault must come back as device/lost, not as an abort.
  const addon = createRequire(import.meta.url)(`${root}/native/build/Release/fewbit.node`);
  const device = await openCuda();
  let told = null;
  device.lost.then((reason) => {
    told = reason;
  });
  const wild = (handle) => {
    const buffer = handle.allocate(1024);
    const launches = [{ entry: "addon/fill", label: "a wild pointer", buffers: [buffer], args: [2 ** 42, 4, 7] }];
    const program = handle.load({ symbols: 0, buckets: [{ largest: [], capture: false, launches }] });
    handle.run(program, 0, new Uint32Array(0), false);
    return handle.read([buffer], [0], [1024]);
  };
  const first = await codeOf(() => device.wait(wild));
  const later = await codeOf(() => device.wait((handle) => handle.read([1], [0], [4])));
  await new Promise((resolve) => setTimeout(resolve, 10));
  await device[Symbol.asyncDispose]();
  console.log(JSON.stringify({ first, later, told, abi: addon.abi }));
  process.exit(0);
}

const backend = await openCuda();
const device = new Device(backend);
console.log(`${backend.info.name}, ${JSON.stringify(backend.info.detail)}`);
console.log(
  `bandwidth ${backend.capabilities.bandwidth / 1e12} TB/s, tensor ${backend.capabilities.flops / 1e12} TFLOP/s`,
);

/** y = silu(x) * x + x for x [T, width]: three launches of known results. */
function graph(rows, width) {
  const g = new GraphBuilder({ T: rows });
  const x = g.input("x", dense("f32", ["T", width]));
  const s = g.one("unary", [x], { fn: "silu" });
  const m = g.one("binary", [s, x], { fn: "mul" });
  g.output("y", g.one("binary", [m, x], { fn: "add" }));
  return g.build();
}
const truth = (x) => Math.fround(x / (1 + Math.exp(-x))) * x + x;
const near = (got, x) => got.every((value, i) => Math.abs(value - truth(x[i])) <= 4e-6 * (1 + Math.abs(truth(x[i]))));
const input = (rows, width, seed) =>
  Float32Array.from({ length: rows * width }, (_, i) => Math.sin(i * 0.37 + seed) * 4);

{
  const [rows, width] = [64, 4096];
  const program = await device.compile(graph(rows, width), { buckets: [{ T: 1 }], guard: true });
  const { executable } = program;
  let good = true;
  for (const [seed, T] of [1, 1, 1, 64, 1, 7, 1, 1].entries()) {
    const data = input(T, width, seed);
    const { y } = await program.run({ inputs: { x: { dtype: "f32", shape: [T, width], data } }, symbols: { T } });
    good &&= near(y.data, data);
  }
  check("plain runs, the captured bucket and its replays agree with the definition", good);
  check("one bucket became a graph", backend.counters.graphs === 1, `${backend.counters.graphs} graphs`);
  check("no guard word was touched", (await executable.damage()).length === 0);
  const seconds = await executable.profile({ T: 64 });
  check(
    "a profile has a time for every step",
    seconds.every((each) => each > 0 && each < 1e-2),
    seconds.map((each) => `${(each * 1e6).toFixed(1)} us`).join(" "),
  );

  // Many runs on their way at once, reads in between: results in order, and the event loop goes on meanwhile.
  let ticks = 0;
  const timer = setInterval(() => ticks++, 1);
  const data = input(1, width, 0);
  executable.write("x", { dtype: "f32", shape: [1, width], data });
  const start = performance.now();
  const reads = [];
  for (let i = 0; i < 2000; i++) {
    executable.submit({ T: 1 });
    if (i % 100 === 99) reads.push(executable.read("y"));
  }
  const submitted = performance.now() - start;
  const results = await Promise.all(reads);
  const total = performance.now() - start;
  clearInterval(timer);
  check(
    "pipelined reads are right",
    results.every(({ data: y }) => near(y, data)),
  );
  console.log(
    `     2000 submits of a graph of 3 launches: ${(submitted / 2).toFixed(2)} us each on the host, ${(total / 2).toFixed(2)} us each in all, ${ticks} timer ticks`,
  );
  // One run and one read at a time, as decoding does.
  const begin = performance.now();
  for (let i = 0; i < 500; i++) {
    executable.submit({ T: 1 });
    await executable.read("y");
  }
  console.log(`     submit and read, one after another: ${((performance.now() - begin) * 2).toFixed(1)} us`);
  program[Symbol.dispose]();
}
check(
  "a disposed program leaves nothing",
  backend.bytes === 0 && backend.counters.graphs === 0 && backend.counters.programs === 0,
  JSON.stringify(backend.counters),
);

{
  // 1 GiB through the read path while a timer runs.
  const bytes = 2 ** 30;
  const buffer = backend.call((handle) => handle.allocate(bytes));
  let [ticks, longest, last] = [0, 0, performance.now()];
  const timer = setInterval(() => {
    ticks++;
    longest = Math.max(longest, performance.now() - last);
    last = performance.now();
  }, 1);
  const start = performance.now();
  await backend.wait((handle) => handle.read([buffer], [0], [bytes]));
  const seconds = (performance.now() - start) / 1000;
  clearInterval(timer);
  console.log(
    `     reading 1 GiB: ${(bytes / seconds / 1e9).toFixed(1)} GB/s with pinning, ${ticks} timer ticks, longest pause ${longest.toFixed(0)} ms`,
  );
  const data = new Uint8Array(2 ** 28).fill(7);
  const before = performance.now();
  for (let at = 0; at < bytes; at += data.length) backend.call((handle) => handle.write(buffer, at, data));
  await backend.wait((handle) => handle.read([buffer], [bytes - 4], [4]));
  console.log(`     writing 1 GiB: ${(bytes / (performance.now() - before) / 1e6).toFixed(1)} GB/s`);
  const tail = new Uint8Array(await backend.wait((handle) => handle.read([buffer], [bytes - 4], [4])));
  check(
    "what was written is read",
    tail.every((byte) => byte === 7),
  );
  backend.call((handle) => handle.free(buffer));
}

check(
  "too much memory is plan/memory",
  (await codeOf(() => backend.call((handle) => handle.allocate(2 ** 41)))) === "plan/memory",
);
check(
  "a range outside a buffer is device/error",
  (await codeOf(() => backend.wait((handle) => handle.read([12345], [0], [4])))) === "device/error",
);
check(
  "an unknown entry is device/error",
  (await codeOf(() =>
    backend.call((handle) =>
      handle.load({
        symbols: 0,
        buckets: [{ largest: [], capture: false, launches: [{ entry: "no/such", label: "", buffers: [], args: [] }] }],
      }),
    ),
  )) === "device/error",
);
{
  const data = input(3, 256, 5);
  const program = await device.compile(graph(8, 256));
  const { y } = await program.run({ inputs: { x: { dtype: "f32", shape: [3, 256], data } }, symbols: { T: 3 } });
  check("the device works after errors", near(y.data, data));
  program[Symbol.dispose]();
}
{
  const before = backend.counters;
  for (let i = 0; i < 300; i++) {
    const program = await device.compile(graph(8, 256), { buckets: [{ T: 1 }] });
    for (let run = 0; run < 3; run++) program.executable.submit({ T: 1 });
    if (i % 50 === 0) await program.executable.read("y");
    program[Symbol.dispose]();
  }
  const after = backend.counters;
  check(
    "300 programs leave nothing",
    after.bytes === 0 &&
      after.programs === 0 &&
      after.graphs === 0 &&
      after.reads === 0 &&
      after.pinnedBytes <= before.pinnedBytes + 2 ** 20,
    JSON.stringify(after),
  );
}
{
  // Disposing while a read is pending rejects the read and returns.
  const other = await openCuda();
  const buffer = other.call((handle) => handle.allocate(2 ** 20));
  const pending = codeOf(() => other.wait((handle) => handle.read([buffer], [0], [2 ** 20])));
  await other[Symbol.asyncDispose]();
  const code = await pending;
  check("a read that is pending at disposal ends coded", code === "object/disposed" || code === "none", code);
  check(
    "calls after disposal are refused",
    (await codeOf(() => other.call((handle) => handle.allocate(4)))) === "object/disposed",
  );
}
const lost = JSON.parse(
  execFileSync(process.execPath, [process.argv[1], "lost"], { encoding: "utf8", env: process.env })
    .trim()
    .split("\n")
    .at(-1),
);
check(
  "a wild pointer loses the device and does not abort",
  lost.first === "device/lost" && lost.later === "device/lost" && lost.told !== null,
  JSON.stringify(lost),
);

await device[Symbol.asyncDispose]();
check("a disposed device counts nothing", backend.bytes === 0, JSON.stringify(backend.counters));
console.log(failures === 0 ? "all checks passed" : `${failures} checks failed`);
process.exitCode = failures === 0 ? 0 : 1;
