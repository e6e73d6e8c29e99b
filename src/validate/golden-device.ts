import type { FloatType } from "../core/dtype.js";
import { blockGrid, type Codec, codecBits, codecName, defineFormat, type Format } from "../formats/format.js";
import { HOST_RULES, isHostKind } from "../formats/host-rules.js";
import { packRows, unpackRows } from "../formats/pack.js";
import type { QuantizedTensor } from "../formats/tensor.js";
import { dense, type Graph, GraphBuilder, stored } from "../ir/graph.js";
import type { DenseTensor, HostTensor } from "../ir/tensor.js";
import { type QuantizeOptions, quantizeTensor } from "../quantize/quantize.js";
import type { Device } from "../runtime/device.js";
import type { AttentionShape, GoldenBackend } from "./golden-case.js";

/**
 * A device's own kernels as a golden backend: every primitive is a graph of one op. A format whose rule the device has no kernel
 * for is reported by name with the kernel table's reason.
 */
export function goldenDevice(device: Device): GoldenBackend {
  const run = async (graph: Graph, inputs: Record<string, HostTensor>, weights: Record<string, HostTensor> = {}) => {
    using program = await device.compile(graph, { weights: new Map(Object.entries(weights)) });
    return (await program.run({ inputs })).y as HostTensor;
  };
  return {
    name: device.info.backend,
    primitives: {
      encode: async (codec, values) => {
        const tensor = await quantize(values, [1, values.length], "f32", unscaled(codec), {});
        return unpackRows(tensor.qdata, 1, values.length, codecBits(codec));
      },
      decode: (codec, codes) => {
        const qdata = packRows(codes, 1, codes.length, codecBits(codec));
        return dequantize({ format: unscaled(codec), shape: [1, codes.length], qdata, scales: [] }, "f32");
      },
      quantize,
      dequantize,
      linear,
      sdpa,
      store,
    },
    quantizesOnHost,
  };

  /** Formats for weights, whose rules search or learn, are quantized once, on the host, whatever the device. */
  function quantizesOnHost(format: Format, { given }: QuantizeOptions): string | null {
    const { kind } = format.rule;
    if (isHostKind(kind)) return `quantizing to ${format.name}: ${HOST_RULES[kind]}`;
    return format.rule.kind === "nf4" && format.scales.some(({ codec }) => codecBits(codec) < 32) && given === undefined
      ? `quantizing to ${format.name} with 16-bit scales, which are themselves quantized (specification 15)`
      : null;
  }

  async function store(tensor: QuantizedTensor): Promise<QuantizedTensor> {
    const g = new GraphBuilder();
    const state = g.state("s", stored(tensor.format, tensor.shape));
    g.output("y", g.one("dequantize", [state], {}));
    using program = await device.compile(g.build(), { weights: new Map() });
    program.executable.write("s", tensor);
    return (await program.executable.read("s")) as QuantizedTensor;
  }

  async function quantize(
    data: Float32Array,
    shape: readonly [n: number, k: number],
    dtype: FloatType,
    format: Format,
    options: QuantizeOptions,
  ): Promise<QuantizedTensor> {
    if (quantizesOnHost(format, options) !== null) return store(quantizeTensor(data, shape, dtype, format, options));
    const { given, ...rule } = options;
    const g = new GraphBuilder();
    const inputs: Record<string, HostTensor> = { x: { dtype: "f32", shape, data } };
    const blocks = blockGrid(
      (format.scales[0] as Format["scales"][number] | undefined)?.block ?? ["all", "all"],
      shape,
    );
    for (const [name, values] of Object.entries(given ?? {}))
      inputs[name] = { dtype: "f32", shape: blocks, data: values };
    const operands = Object.entries(inputs).map(([name, tensor]) => g.input(name, dense("f32", tensor.shape)));
    g.output("y", g.one("quantize", operands, { format, dtype, ...rule }));
    return (await run(g.build(), inputs)) as QuantizedTensor;
  }

  async function dequantize(tensor: QuantizedTensor, dtype: FloatType): Promise<Float32Array> {
    const g = new GraphBuilder();
    const x = g.input("x", stored(tensor.format, tensor.shape));
    g.output("y", g.one("dequantize", [x], { dtype }));
    return floats(await run(g.build(), { x: tensor }));
  }

  async function linear(
    x: Float32Array | QuantizedTensor,
    weight: QuantizedTensor,
    bias: Float32Array | null,
  ): Promise<Float32Array> {
    const g = new GraphBuilder();
    const [n, k] = weight.shape;
    const input: HostTensor = x instanceof Float32Array ? { dtype: "f32", shape: [x.length / k, k], data: x } : x;
    const type = "data" in input ? dense("f32", input.shape) : stored(input.format, input.shape);
    const operands = [g.input("x", type), g.weight("w", stored(weight.format, weight.shape))];
    if (bias !== null) operands.push(g.weight("b", dense("f32", [n])));
    g.output("y", g.one("linear", operands, {}));
    const weights: Record<string, HostTensor> = { w: weight };
    if (bias !== null) weights.b = { dtype: "f32", shape: [n], data: bias };
    return floats(await run(g.build(), { x: input }, weights));
  }

  async function sdpa(q: Float32Array, k: Float32Array, v: Float32Array, shape: AttentionShape): Promise<Float32Array> {
    const { batch, heads, kvHeads, tokens, keys, size, causal } = shape;
    const g = new GraphBuilder();
    const inputs = {
      q: { dtype: "f32", shape: [batch, heads, tokens, size], data: q },
      k: { dtype: "f32", shape: [batch, kvHeads, keys, size], data: k },
      v: { dtype: "f32", shape: [batch, kvHeads, keys, size], data: v },
    } as const;
    const operands = Object.entries(inputs).map(([name, tensor]) => g.input(name, dense("f32", tensor.shape)));
    g.output("y", g.one("sdpa", operands, { heads, kvHeads, scale: 1 / Math.sqrt(size), causal }));
    return floats(await run(g.build(), inputs));
  }
}

/** A format whose codes are all there is, to reach a codec through the ops. */
function unscaled(codec: Codec): Format {
  return defineFormat(`codec ${codecName(codec)}`, {
    element: codec,
    rule: { kind: "cast" },
    source: "golden",
    use: "holds the codes of one codec, to compare them",
  });
}

const floats = (tensor: HostTensor): Float32Array => (tensor as DenseTensor).data as Float32Array;
