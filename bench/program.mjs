// Programs of a bench: a graph, its weights on the device, and a way to wait for it that reads next to nothing.
import { dense, GraphBuilder, stored } from "./library.mjs";

/** Bytes that what runs rotate through takes together at least: more than any cache. */
export const ROTATED = 160 * 2 ** 20;

/** A graph builder whose operands may be dense or stored, with a state that no step touches: reading it waits for the runs before. */
export function graphBuilder(symbols = {}) {
  const g = new GraphBuilder(symbols);
  const one = g.one.bind(g);
  let last;
  return Object.assign(g, {
    one(...node) {
      last = one(...node);
      return last;
    },
    operand: (name, format, shape) =>
      format === null ? g.input(name, dense("f32", shape)) : g.state(name, stored(format, shape)),
    finish() {
      g.output("last", last);
      g.state("done", dense("f32", [4]));
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
  let seconds = 0;
  // The first run loads kernels and the second may be captured as a graph: the third says how long one takes.
  for (let i = 0; i < 3; i++) {
    const start = performance.now();
    program.submit();
    await program.done();
    seconds = (performance.now() - start) / 1000;
  }
  const runs = session.small ? 1 : Math.min(1000, Math.max(1, Math.round(0.02 / seconds)));
  const work = async () => {
    for (let i = 0; i < runs; i++) program.submit();
    await program.done();
  };
  return session.time(work, runs * pieces);
}
