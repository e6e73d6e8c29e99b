import { Scope } from "../../core/dispose.js";
import { FewbitError, throwIfAborted } from "../../core/errors.js";
import { sizeOf } from "../../core/shape.js";
import { formatKey } from "../../formats/format.js";
import { evaluateNode, type Symbols } from "../../ir/evaluate.js";
import { concreteShape, type Graph, type TensorType, type Value, type ValueId } from "../../ir/graph.js";
import { copyTensor, type DenseTensor, type HostTensor, hostBytes, isDense, joinRows, zeros } from "../../ir/tensor.js";
import { bucketFor, type Plan } from "../../plan/plan.js";
import type { KernelRow } from "../../plan/select.js";
import type { StepKind } from "../../plan/step.js";
import type { BackendDevice, Capabilities, Executable, LoadOptions, WeightSource } from "../backend.js";

const KINDS: readonly StepKind[] = [
  "embedding",
  "rmsnorm",
  "layernorm",
  "linear",
  "conv2d",
  "rope_kv",
  "sdpa",
  "moe_route",
  "moe_linear",
  "moe_combine",
  "elementwise",
  "quantize",
  "dequantize",
  "last_row",
  "sample",
];

/** The reference runs any step by running its nodes in order: it is what every fusion and kernel is judged against. */
const KERNELS: readonly KernelRow[] = KINDS.map((kind) => ({
  id: `reference/${kind}`,
  kind,
  requires: [],
  efficiency: { bandwidth: 1, compute: 1 },
}));

const CAPABILITIES: Capabilities = {
  features: new Set(),
  maxBinding: Number.MAX_SAFE_INTEGER,
  maxBuffer: Number.MAX_SAFE_INTEGER,
  workgroupMemory: 0,
  maxInvocations: 1,
  maxWorkgroupsPerDimension: 1,
  maxStorageBuffers: Number.MAX_SAFE_INTEGER,
  subgroupSize: [0, 0],
  bandwidth: 8e9,
  flops: 1e9,
  dispatchSeconds: 1e-6,
};

/** Opens the reference device: float64 on the CPU, slow and obvious, the definition of every result. */
export function openReference(): BackendDevice {
  const scope = new Scope("reference device");
  const counter = { bytes: 0 };
  return {
    info: {
      backend: "reference",
      name: "TypeScript reference (float64)",
      kind: "reference",
      reason: "asked for: the reference is never a fallback",
      detail: {},
    },
    capabilities: CAPABILITIES,
    kernels: KERNELS,
    get bytes() {
      return counter.bytes;
    },
    lost: new Promise<string>(() => {}),
    async load(plan, weights, options) {
      scope.assertLive();
      return ReferenceExecutable.load(plan, weights, options, new Scope("program", scope), counter);
    },
    async [Symbol.asyncDispose]() {
      scope.dispose();
    },
  };
}

class ReferenceExecutable implements Executable {
  readonly graph: Graph;
  readonly #plan: Plan;
  readonly #values = new Map<ValueId, HostTensor>();
  readonly #scope: Scope;
  #submits = 0;
  #seconds = 0;

  private constructor(plan: Plan, scope: Scope) {
    this.#plan = plan;
    this.graph = plan.graph;
    this.#scope = scope;
  }

  static async load(
    plan: Plan,
    weights: WeightSource,
    options: LoadOptions | undefined,
    scope: Scope,
    counter: { bytes: number },
  ): Promise<ReferenceExecutable> {
    const executable = new ReferenceExecutable(plan, scope);
    let held = 0;
    const free = () => {
      executable.#values.clear();
      counter.bytes -= held;
    };
    scope.add({ [Symbol.dispose]: free });
    try {
      for (const value of plan.graph.values) {
        throwIfAborted(options?.signal, "loading weights");
        if (value.role === "value") continue;
        const tensor =
          value.role === "weight" ? await joinRows(await weights(value.name)) : zeros(value.type, plan.graph.symbols);
        scope.assertLive();
        checkType(tensor, value.type, value.name, plan.graph.symbols);
        executable.#values.set(value.id, tensor);
        held += hostBytes(tensor);
        counter.bytes += hostBytes(tensor);
        options?.onProgress?.(held, plan.bytes.weights + plan.bytes.state);
      }
    } catch (error) {
      scope.dispose();
      throw error;
    }
    return executable;
  }

  get statistics() {
    const dispatches = this.#submits * this.#plan.steps.length;
    return { submits: this.#submits, dispatches, encodeSeconds: this.#seconds };
  }

  write(name: string, tensor: HostTensor): void {
    this.#scope.assertLive();
    const value = this.graph.values.find((candidate) => candidate.name === name);
    const target = value === undefined ? undefined : this.#values.get(value.id);
    if (value === undefined || target === undefined || value.role === "weight") {
      throw new FewbitError("graph/invalid", { where: name, reason: "it is neither an input nor a state" });
    }
    if (!isDense(target) || !isDense(tensor)) {
      checkType(tensor, value.type, name, this.graph.symbols);
      this.#values.set(value.id, copyTensor(tensor));
      return;
    }
    if (tensor.dtype !== target.dtype) {
      throw new FewbitError("dtype/mismatch", { what: name, got: tensor.dtype, expected: target.dtype });
    }
    if (tensor.data.length > target.data.length) {
      throw new FewbitError("shape/mismatch", {
        what: name,
        got: tensor.shape,
        expected: `at most [${target.shape.join(", ")}]`,
      });
    }
    target.data.set(tensor.data);
  }

  submit(symbols: Symbols): void {
    this.#scope.assertLive();
    bucketFor(this.#plan, symbols);
    const start = performance.now();
    for (const step of this.#plan.steps) {
      for (const node of step.nodes) {
        const operands = node.inputs.map((id) => this.#operand(id, symbols));
        const types = node.inputs.map((id) => (this.graph.values[id] as Value).type);
        const results = evaluateNode(node, operands, symbols, types);
        for (const [i, result] of results.entries()) this.#values.set(node.outputs[i] as ValueId, result);
      }
    }
    this.#submits++;
    this.#seconds += (performance.now() - start) / 1000;
  }

  async read(name: string): Promise<HostTensor> {
    this.#scope.assertLive();
    const id =
      this.graph.outputs[name] ?? this.graph.values.find((value) => value.name === name && value.role === "state")?.id;
    const tensor = id === undefined ? undefined : this.#values.get(id);
    if (tensor === undefined)
      throw new FewbitError("graph/invalid", { where: name, reason: "it is not an output, or nothing was run" });
    const result = copyTensor(tensor);
    // Runs are computed at once, so this is where timers, signals and aborts get their turn.
    await new Promise((resolve) => setTimeout(resolve));
    return result;
  }

  [Symbol.dispose](): void {
    this.#scope.dispose();
  }

  /** Inputs are stored at their largest size; a run sees the part that its symbols select. */
  #operand(id: ValueId, symbols: Symbols): HostTensor {
    const tensor = this.#values.get(id);
    const type = this.graph.values[id]?.type;
    if (tensor === undefined || type === undefined) {
      throw new FewbitError("graph/invalid", {
        where: this.graph.values[id]?.name ?? `value ${id}`,
        reason: "it is read before it is written",
      });
    }
    if (!isDense(tensor) || type.kind !== "dense" || type.shape.every((dim) => typeof dim === "number")) return tensor;
    const shape = concreteShape(type.shape, symbols);
    const size = sizeOf(shape);
    if (size === tensor.data.length) return tensor;
    return { dtype: tensor.dtype, shape, data: tensor.data.subarray(0, size) as DenseTensor["data"] };
  }
}

/** Throws unless `tensor` has the type, with symbols at their largest. */
export function checkType(tensor: HostTensor, type: TensorType, what: string, symbols: Symbols): void {
  const shape = concreteShape(type.shape, symbols);
  if (isDense(tensor)) {
    if (type.kind !== "dense" || type.dtype !== tensor.dtype) {
      const expected = type.kind === "dense" ? type.dtype : formatKey(type.format);
      throw new FewbitError("dtype/mismatch", { what, got: tensor.dtype, expected });
    }
  } else if (type.kind !== "format" || formatKey(type.format) !== formatKey(tensor.format)) {
    const expected = type.kind === "dense" ? type.dtype : formatKey(type.format);
    throw new FewbitError("dtype/mismatch", { what, got: formatKey(tensor.format), expected });
  }
  if (sizeOf(tensor.shape) !== sizeOf(shape)) {
    throw new FewbitError("shape/mismatch", { what, got: tensor.shape, expected: `[${shape.join(", ")}]` });
  }
}
