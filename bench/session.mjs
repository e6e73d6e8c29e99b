// One run of a bench: the device, how times are taken, predictions, and what is printed.
import { execFileSync } from "node:child_process";
import { appendFileSync } from "node:fs";
import { open } from "./library.mjs";

/**
 * What devices reach in practice, for predictions: bytes/s of a large copy, operations/s of large matrix products by the kind of their
 * operands (bf16 and float8 as measured with PyTorch under sustained load; int8 has float8's units), seconds of a launch in a graph. Unknown
 * devices predict nothing.
 */
const DEVICES = [
  { match: /H100 80GB/, bandwidth: 3.0e12, flops: { bf16: 7.0e14, float8: 1.29e15, int8: 1.29e15 }, launch: 2.5e-6 },
  { match: /H200/, bandwidth: 4.3e12, flops: { bf16: 7.0e14, float8: 1.29e15, int8: 1.29e15 }, launch: 2.5e-6 },
];

function run(command, args) {
  try {
    return execFileSync(command, args, { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim();
  } catch {
    return null;
  }
}

export const commit = () => process.env.FEWBIT_COMMIT ?? run("git", ["rev-parse", "--short", "HEAD"]);

const clocks = () =>
  run("nvidia-smi", ["--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]);

export class Session {
  #rows = [];
  #options;

  constructor(bench, device, options) {
    this.bench = bench;
    this.device = device;
    this.#options = options;
    this.runs = options.runs;
    this.signal = options.signal;
    this.small = options.small;
    this.profiles = options.profile === true;
    this.known = DEVICES.find(({ match }) => match.test(device.info.name));
    this.about = {
      bench,
      backend: options.backend,
      device: device.info.name,
      commit: commit(),
      date: new Date().toISOString().slice(0, 10),
    };
  }

  static async open(bench, options) {
    const tier = options.backend === "webgpu" && options.tier !== undefined ? { tier: options.tier } : {};
    const device = await open({ prefer: [options.backend], signal: options.signal, ...tier });
    const session = new Session(bench, device, options);
    session.note(`${bench} on ${device.info.name} (${options.backend}), ${options.runs} runs a case`);
    if (session.known === undefined) session.note("no prediction: this device's rates are not in bench/session.mjs");
    return session;
  }

  /** A line for people; JSON lines go to standard output alone when they are asked for there. */
  note(text) {
    (this.#options.json === "-" ? console.error : console.log)(text);
  }

  progress(text) {
    if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`);
  }

  /** Says what a case should take, before it is measured. */
  expect(name, seconds) {
    if (seconds !== null) this.note(`${name}: predicted ${number(seconds * 1e6, 4)} us`);
  }

  /** Seconds that bytes and operations take at least, launches included; null for an unknown device. */
  predict({ bytes = 0, flops = 0, kind = "bf16", launches = 1 }) {
    if (this.known === undefined) return null;
    const { bandwidth, flops: rates, launch } = this.known;
    return Math.max(bytes / bandwidth, flops / rates[kind], launches * launch);
  }

  /**
   * Seconds of `work`, which enqueues `count` equal pieces and resolves when the device has done them (with the seconds that count,
   * if not all do): warm-up for a third of a second, then as many samples as asked for.
   */
  async time(work, count = 1) {
    const warm = this.small ? 20 : 300;
    for (const start = performance.now(); performance.now() - start < warm; ) {
      this.signal.throwIfAborted();
      await work();
    }
    const samples = [];
    for (let i = 0; i < this.runs; i++) {
      this.signal.throwIfAborted();
      const start = performance.now();
      const own = await work();
      samples.push((own ?? (performance.now() - start) / 1000) / count);
    }
    return samples.sort((a, b) => a - b);
  }

  /** Records a measurement: its samples in seconds, what it moved and computed, and what was predicted for it. */
  record({ samples, predicted = null, bytes, flops, ...about }) {
    const at = (q) => samples[Math.min(samples.length - 1, Math.floor(q * samples.length))];
    const median = at(0.5);
    const row = {
      ...this.about,
      ...about,
      samples: samples.map((s) => s * 1e6),
      median_us: median * 1e6,
      p10_us: at(0.1) * 1e6,
      p90_us: at(0.9) * 1e6,
      spread: (samples.at(-1) - samples[0]) / median,
      ...(bytes === undefined ? {} : { bytes, gb_per_s: bytes / median / 1e9 }),
      ...(flops === undefined ? {} : { flops, tflop_per_s: flops / median / 1e12 }),
      ...(predicted === null ? {} : { predicted_us: predicted * 1e6, of_roofline: predicted / median }),
      clocks: clocks(),
    };
    this.#write(row);
    return row;
  }

  /** A case that has no time, with the reason in words. */
  refuse(about, error) {
    this.signal.throwIfAborted();
    const reason = String(error?.message ?? error).split("\n")[0];
    this.#write({ ...this.about, ...about, refused: reason });
  }

  #write(row) {
    this.progress("");
    this.#rows.push(row);
    const line = JSON.stringify(row);
    if (this.#options.json === "-") console.log(line);
    else if (this.#options.json !== undefined) appendFileSync(this.#options.json, `${line}\n`);
    this.note(shown(row));
  }

  get rows() {
    return this.#rows;
  }

  /** Prints rows of cells in columns; the first row is the head. */
  table(rows) {
    const width = rows[0].map((_, i) => Math.max(...rows.map((row) => String(row[i] ?? "").length)));
    for (const row of ["", ...rows])
      this.note(
        row === ""
          ? ""
          : row
              .map((cell, i) => String(cell ?? "").padEnd(width[i]))
              .join("  ")
              .trimEnd(),
      );
  }

  async close() {
    await this.device[Symbol.asyncDispose]();
  }
}

const number = (value, digits = 3) => (value === undefined ? "" : Number(value.toPrecision(digits)).toString());

function shown({ name, kernel, refused, median_us, p10_us, p90_us, gb_per_s, tflop_per_s, of_roofline, rate, unit }) {
  if (refused !== undefined) return `${name}: ${refused}`;
  const parts = [
    `${number(median_us, 4)} us [${number(p10_us)}, ${number(p90_us)}]`,
    ...(rate === undefined ? [] : [`${number(rate, 4)} ${unit}`]),
    ...(gb_per_s === undefined ? [] : [`${number(gb_per_s)} GB/s`]),
    ...(tflop_per_s === undefined ? [] : [`${number(tflop_per_s)} TFLOP/s`]),
    ...(of_roofline === undefined ? [] : [`${number(of_roofline, 2)} of the prediction`]),
    ...(kernel === undefined ? [] : [kernel]),
  ];
  return `${name}: ${parts.join("  ")}`;
}
