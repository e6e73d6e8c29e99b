import type { Scope } from "../../core/dispose.js";
import { throwIfAborted } from "../../core/errors.js";
import type { Symbols } from "../../ir/evaluate.js";
import type { Graph } from "../../ir/graph.js";
import type { HostTensor } from "../../ir/tensor.js";
import { bucketFor, type Plan } from "../../plan/plan.js";
import { type Executable, GUARD_WORD, type LoadOptions, type WeightSource } from "../backend.js";
import { decodeRead, encodeWrite, partlyUsedOutputs } from "../transfer.js";
import { loadWeights, type Source as SharedSource } from "../weights.js";
import { type Built, buildBucket } from "./bucket.js";
import { ProgramBuffers } from "./buffers.js";
import type { CudaDevice } from "./device.js";

/** A plan on a CUDA device: launches laid down once, replayed as one graph where a bucket allows it. */
export class NativeExecutable implements Executable {
  readonly graph: Graph;
  readonly overlaps = true;
  readonly #device: CudaDevice;
  readonly #scope: Scope;
  readonly #plan: Plan;
  readonly #buffers: ProgramBuffers;
  readonly #buckets: readonly (readonly Built[])[];
  readonly #words: Uint32Array;
  #program = 0;
  #last: Symbols | null = null;
  #submits = 0;
  #dispatches = 0;
  #seconds = 0;

  private constructor(device: CudaDevice, scope: Scope, plan: Plan, options: LoadOptions) {
    this.#device = device;
    this.#scope = scope;
    this.#plan = plan;
    this.graph = plan.graph;
    this.#words = new Uint32Array(Object.keys(plan.graph.symbols).length);
    this.#buckets = plan.buckets.map(({ symbols, choices }) =>
      buildBucket(plan, symbols, choices, device.capabilities),
    );
    this.#buffers = new ProgramBuffers(device, scope, plan, options.guard ?? false);
  }

  static async load(
    device: CudaDevice,
    scope: Scope,
    plan: Plan,
    weights: WeightSource,
    options: LoadOptions = {},
  ): Promise<NativeExecutable> {
    try {
      const executable = new NativeExecutable(device, scope, plan, options);
      await executable.#load(weights, options);
      throwIfAborted(options.signal, "loading a program");
      return executable;
    } catch (error) {
      scope.dispose();
      throw error;
    }
  }

  async #load(weights: WeightSource, options: LoadOptions): Promise<void> {
    const buffers = this.#buffers;
    const sources = this.#buckets.flat().flatMap(({ dispatch }) => dispatch.bindings);
    if (this.#plan.bytes.scratch > 0) buffers.add({ kind: "scratch" }, "scratch", this.#plan.bytes.scratch);
    for (const source of sources) {
      if (source.kind !== "constant" || buffers.has(source)) continue;
      const data = source.data();
      buffers.write(buffers.add(source, source.key, data.byteLength), 0, data);
    }
    const shared = sources.filter((source): source is SharedSource => source.kind !== "constant");
    const { maxBinding } = this.#device.capabilities;
    await loadWeights(this.#plan, maxBinding, shared, weights, options, ({ source, label, bytes, parts }) => {
      const buffer = buffers.has(source) ? buffers.get(source) : buffers.add(source, label, bytes);
      for (const [at, data] of parts) buffers.write(buffer, at, data);
    });
    const largest = this.#plan.buckets.length - 1;
    this.#program = this.#device.program(this.#scope, {
      symbols: this.#words.length,
      buckets: this.#buckets.map((built, i) => ({
        largest: Object.keys(this.graph.symbols).map((name) => this.#plan.buckets[i]?.symbols[name] ?? 0),
        // Grids of a graph are those of its largest symbols: wasteful for the bucket of every size, unless nothing varies.
        capture: i < largest || this.#words.length === 0,
        launches: built.map(({ dispatch: { entry, label, bindings, args } }) => ({
          entry: entry.name,
          label,
          buffers: bindings.map((source) => buffers.get(source)),
          args,
        })),
      })),
    });
  }

  get statistics() {
    return { submits: this.#submits, dispatches: this.#dispatches, encodeSeconds: this.#seconds };
  }

  write(name: string, tensor: HostTensor): void {
    this.#scope.assertLive();
    const { id, bytes } = encodeWrite(this.graph, name, tensor);
    this.#buffers.write(this.#buffers.get({ kind: "value", id }), 0, bytes);
  }

  submit(symbols: Symbols): void {
    this.#run(symbols, false);
  }

  replay(symbols: Symbols): void {
    this.#run(symbols, true);
  }

  #run(symbols: Symbols, replay: boolean): void {
    this.#scope.assertLive();
    const start = performance.now();
    const bucket = bucketFor(this.#plan, symbols);
    const words = this.#symbolWords(symbols);
    this.#dispatches += this.#device.call((handle) => handle.run(this.#program, bucket, words, replay));
    this.#last = symbols;
    this.#submits++;
    this.#seconds += (performance.now() - start) / 1000;
  }

  /** Runs once with an event around every launch: seconds of each step, in order of the plan. */
  async profile(symbols: Symbols): Promise<number[]> {
    this.#scope.assertLive();
    const bucket = bucketFor(this.#plan, symbols);
    const words = this.#symbolWords(symbols);
    const times = new Float64Array(await this.#device.wait((handle) => handle.profile(this.#program, bucket, words)));
    this.#last = symbols;
    const seconds = this.#plan.steps.map(() => 0);
    for (const [i, { step }] of (this.#buckets[bucket] as readonly Built[]).entries())
      seconds[step] = (seconds[step] as number) + (times[i] as number);
    return seconds;
  }

  async read(name: string): Promise<HostTensor> {
    this.#scope.assertLive();
    const { id, bytes, decode } = decodeRead(this.#plan, name, this.#last ?? this.graph.symbols);
    return decode(await this.#buffers.read([{ buffer: this.#buffers.get({ kind: "value", id }), at: 0, bytes }]));
  }

  async damage(): Promise<string[]> {
    this.#scope.assertLive();
    const found: string[] = [];
    for (const { name, id, used, all } of partlyUsedOutputs(this.#plan, this.#last ?? this.graph.symbols)) {
      const buffer = this.#buffers.get({ kind: "value", id });
      const bytes = await this.#buffers.read([{ buffer, at: used * 4, bytes: (all - used) * 4 }]);
      if (new Uint32Array(bytes.buffer).some((word) => word !== GUARD_WORD))
        found.push(`the rows of ${name} that this run has`);
    }
    return [...found, ...(await this.#buffers.damage())];
  }

  [Symbol.dispose](): void {
    this.#scope.dispose();
  }

  #symbolWords(symbols: Symbols): Uint32Array {
    for (const [i, name] of Object.keys(this.graph.symbols).entries()) this.#words[i] = symbols[name] as number;
    return this.#words;
  }
}
