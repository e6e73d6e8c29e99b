// Programs of a bench: a graph, its weights on the device, and a way to wait for it that reads next to nothing.
import { dense, GraphBuilder, stored } from "./library.mjs";

/** A graph builder whose operands may be dense or stored, and that ends with a value small enough to wait for. */
export function graphBuilder(symbols = {}) {
  const g = new GraphBuilder(symbols);
  return Object.assign(g, {
    operand: (name, format, shape) =>
      format === null ? g.input(name, dense("f32", shape)) : g.state(name, stored(format, shape)),
    finish() {
      g.output("done", g.one("unary", [g.input("tick", dense("f32", [1, 4]))], { fn: "relu" }, "done"));
      return g.build();
    },
  });
}

export const matrix = (g, name, format, shape) => g.weight(name, stored(format, shape));

/** Compiles and fills a program; `symbols` are those of the runs to come. */
export async function run(session, g, { weights, inputs, symbols = {} }) {
  const { signal } = session;
  // A bucket of its own lets a backend replay the runs as one graph.
  const program = await session.device.compile(g.finish(), { weights, signal, fuse: true, buckets: [symbols] });
  const { executable } = program;
  for (const [name, tensor] of Object.entries(inputs)) executable.write(name, tensor);
  executable.write("tick", { dtype: "f32", shape: [1, 4], data: new Float32Array(4) });
  return {
    program,
    executable,
    submit: () => executable.submit(symbols),
    done: () => executable.read("done"),
    /** The kernel of the first step of a kind. */
    kernel(kind) {
      const { plan } = program;
      const at = plan.steps.findIndex((step) => step.kind === kind);
      return plan.buckets[0].choices[at]?.kernel.id;
    },
    /** Frees it after `body`, however that ends. */
    async use(body) {
      try {
        await body();
      } finally {
        program[Symbol.dispose]();
      }
    },
  };
}

/** Samples of a program whose run holds `pieces` equal ones, in seconds a piece: enough runs a sample to hide the wait for the last. */
export async function clock(session, program, pieces = 1) {
  const start = performance.now();
  program.submit();
  await program.done();
  const first = (performance.now() - start) / 1000;
  const runs = session.small ? 1 : Math.min(200, Math.max(1, Math.round(0.02 / first)));
  const work = async () => {
    for (let i = 0; i < runs; i++) program.submit();
    await program.done();
  };
  return session.time(work, runs * pieces);
}
