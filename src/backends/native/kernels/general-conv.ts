import { convSize } from "../../../ir/conv.js";
import type { Dim, Node, ValueId } from "../../../ir/graph.js";
import { type Entry, type NativeKernel, value } from "../kernel.js";
import { Arguments, operand, storedObstacle } from "./general-arguments.js";

const CONV: Entry = { name: "general/conv2d", abi: 1 };

export const CONV_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/conv2d/plain",
    kind: "conv2d",
    entries: [CONV],
    requires: [
      {
        unmet: (bound) => {
          const type = bound.type(bound.step.nodes[0]?.inputs[1] as ValueId);
          return type.kind === "format" ? storedObstacle(type.format) : "its weight is dense, a stored one is needed";
        },
      },
    ],
    efficiency: { bandwidth: 0.1, compute: 0.005 },
    build: (context) => {
      const { inputs, outputs, attrs } = context.bound.step.nodes[0] as Node<"conv2d">;
      const [x, weight, bias] = inputs as readonly [ValueId, ValueId, ValueId?];
      const { kernel, stride, padding, dilation, groups } = attrs;
      const [batch, channels, height, width] = context.type(x).shape as readonly [Dim, number, number, number];
      const layout = context.layout(weight);
      const { bindings, args } = new Arguments()
        .int(...context.extent(batch))
        .buffer(operand(context, x))
        .stored(layout, operand(context, weight))
        .buffer(bias === undefined ? undefined : operand(context, bias))
        .buffer(value(outputs[0] as ValueId))
        .int(channels, height, width, layout.shape[0], ...convSize(attrs, height, width), groups)
        .int(kernel[1], kernel[0] * kernel[1], ...stride, ...padding, ...dilation);
      return [{ label: context.bound.describe(), entry: CONV, bindings, args }];
    },
  },
];
