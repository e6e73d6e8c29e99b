import { existsSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { type Capabilities, GUARD_WORD } from "../../src/backends/backend.js";
import { ADDON_PATH, checkAddon, codedError, loadAddon } from "../../src/backends/native/addon.js";
import { cudaCapabilities, H100 } from "../../src/backends/native/capabilities.js";
import { choose } from "../../src/backends/native/device.js";
import { BuildContext, type NativeDispatch, type NativeKernel, value } from "../../src/backends/native/kernel.js";
import { NATIVE_KERNELS } from "../../src/backends/native/kernels/table.js";
import { openTrace } from "../../src/backends/trace/device.js";
import { WEBGPU_KERNELS } from "../../src/backends/webgpu/kernels/table.js";
import { TIERS } from "../../src/codegen/support.js";
import { FewbitError } from "../../src/core/errors.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, type Graph, GraphBuilder, stored, type ValueId } from "../../src/ir/graph.js";
import type { DenseTensor } from "../../src/ir/tensor.js";
import { makePlan, type Plan } from "../../src/plan/plan.js";
import { BoundStep } from "../../src/plan/step.js";
import { Device, open } from "../../src/runtime/device.js";
import { caseTable, selectCases } from "../../src/validate/cases.js";
import { cudaError, openFakeCuda, RELU } from "../support/fake-cuda.js";

const hopper = { kernels: NATIVE_KERNELS, capabilities: cudaCapabilities(H100) };

const codeOf = async (run: () => unknown) => {
  try {
    await run();
  } catch (error) {
    if (error instanceof FewbitError) return error.code;
    throw error;
  }
  return null;
};

/** Every dispatch of a plan, built for a device that is not here. */
function dispatches(plan: Plan): NativeDispatch[] {
  return plan.buckets.flatMap(({ symbols, choices }) =>
    choices.flatMap(({ kernel }, i) => {
      const bound = new BoundStep(plan.graph, plan.steps[i] as Plan["steps"][number], symbols);
      return (kernel as NativeKernel).build(
        new BuildContext(bound, plan.memory, hopper.capabilities, plan.graph.symbols),
      );
    }),
  );
}

/** A graph's plan, or null when no kernel can run one of its steps. */
function planned(graph: Graph, device: Parameters<typeof makePlan>[1]): Plan | null {
  try {
    return makePlan(graph, device);
  } catch (error) {
    if (error instanceof FewbitError && error.code === "plan/no-kernel") return null;
    throw error;
  }
}

function relus(width = 8): Graph {
  const g = new GraphBuilder({ T: 4 });
  const x = g.input("x", dense("f32", ["T", width]));
  g.output("y", g.one("unary", [g.one("unary", [x], { fn: "relu" })], { fn: "relu" }));
  return g.build();
}

const reluPlan = (buckets: { T: number }[] = []) =>
  makePlan(relus(), { kernels: [RELU], capabilities: hopper.capabilities }, { buckets });

describe("the native kernel table", () => {
  test("names every row and every entry once, and an entry's version is the same in all rows", () => {
    const ids = NATIVE_KERNELS.map(({ id }) => id);
    expect(new Set(ids).size).toBe(ids.length);
    for (const { id, entries } of NATIVE_KERNELS) {
      expect(id).toMatch(/^cuda\//);
      expect(entries.length, id).toBeGreaterThan(0);
    }
    const versions = new Map<string, Set<number>>();
    for (const { name, abi } of NATIVE_KERNELS.flatMap(({ entries }) => entries))
      versions.set(name, (versions.get(name) ?? new Set()).add(abi));
    for (const [name, found] of versions) expect(found.size, name).toBe(1);
  });

  test("has a kernel on an H100 for every case that WebGPU has one for, and builds entries that its row declares", () => {
    const everything = { kernels: WEBGPU_KERNELS, capabilities: Object.values(TIERS).at(-1) as Capabilities };
    const missing: string[] = [];
    for (const { id, build } of selectCases(caseTable(), { quick: true })) {
      const { graph } = build();
      const plan = planned(graph, hopper);
      if (plan === null) {
        if (planned(graph, everything) !== null) missing.push(id);
        continue;
      }
      const declared = plan.buckets.flatMap(({ choices }) =>
        choices.flatMap(({ kernel }) => (kernel as NativeKernel).entries),
      );
      for (const { entry, args, label } of dispatches(plan)) {
        expect(declared.includes(entry), `${id}: ${entry.name}`).toBe(true);
        expect(args.every(Number.isSafeInteger), `${label}: ${args}`).toBe(true);
      }
    }
    expect(missing).toEqual([]);
  });
});

describe("launch arguments", () => {
  const context = (graph: Graph, step = 0) => {
    const plan = makePlan(graph, openTrace({ ...hopper, name: "an H100" }));
    const bound = new BoundStep(graph, plan.steps[step] as Plan["steps"][number], graph.symbols);
    return new BuildContext(bound, plan.memory, hopper.capabilities, graph.symbols);
  };

  test("an extent is a coefficient and a symbol's place, and never two symbols", async () => {
    const g = new GraphBuilder({ past: 9, T: 4 });
    const x = g.input("x", dense("f32", ["T", 3, 8]));
    g.output("y", g.one("unary", [x], { fn: "relu" }));
    const it = context(g.build());
    expect(it.extent(6, 7)).toEqual([42, -1]);
    expect(it.extent(2, "T", 5)).toEqual([10, 1]);
    expect(it.rowExtent(x)).toEqual([3, 1]);
    expect(await codeOf(() => it.extent("T", "past"))).toBe("graph/invalid");
    expect(await codeOf(() => it.extent("U"))).toBe("graph/invalid");
  });

  test("columns of a wider value are given by stride and column", () => {
    const g = new GraphBuilder({ T: 4 });
    const x = g.input("x", dense("f32", ["T", 32]));
    const weight = (name: string, n: number) => g.weight(name, stored(FORMATS.bf16, [n, 32]));
    const [q, k] = [weight("q", 16), weight("k", 8)].map((w) => g.one("linear", [x, w], {})) as [number, number];
    g.output("a", g.one("unary", [q], { fn: "relu" }));
    g.output("b", g.one("unary", [k], { fn: "relu" }));
    const graph = g.build();
    const bound = new BoundStep(
      graph,
      { id: 0, kind: "linear", nodes: graph.nodes.slice(0, 2), inputs: [x], outputs: [q, k] },
      {},
    );
    const placement = new Map([
      [q, { root: q, column: 0, stride: 24 }],
      [k, { root: q, column: 16, stride: 24 }],
    ]);
    const memory = { slots: [], slotOf: new Map(), live: new Map(), placement };
    const it = new BuildContext(bound, memory, hopper.capabilities, graph.symbols);
    expect([it.strided(q), it.strided(k), it.strided(x)]).toEqual([
      [24, 0],
      [24, 16],
      [32, 0],
    ]);
  });
});

describe("an executable over the addon's interface", () => {
  test("runs, reads the rows of the run, replays small buckets only, and leaves nothing", async () => {
    const { fake, device: backend } = openFakeCuda();
    const device = new Device(backend);
    const program = await device.load(reluPlan([{ T: 1 }]));
    const data = Float32Array.from({ length: 16 }, (_, i) => i - 8);
    const { y } = await program.run({ inputs: { x: { dtype: "f32", shape: [2, 8], data } }, symbols: { T: 2 } });
    expect([...((y as DenseTensor).data as Float32Array)]).toEqual([...data].map((x) => Math.max(0, x)));
    expect((y as DenseTensor).shape).toEqual([2, 8]);
    program.executable.submit({ T: 1 });
    program.executable.replay?.({ T: 3 });
    expect(fake.runs.map(({ bucket, symbols, replay }) => [bucket, ...symbols, replay])).toEqual([
      [1, 2, false],
      [0, 1, false],
      [1, 3, true],
    ]);
    const [text] = [...fake.programs.values()];
    expect(text?.buckets.map(({ capture, largest }) => [capture, ...largest])).toEqual([
      [true, 1],
      [false, 4],
    ]);
    expect(program.executable.statistics).toMatchObject({ submits: 3, dispatches: 6 });
    program[Symbol.dispose]();
    expect(fake.counters()).toMatchObject({ bytes: 0, programs: 0 });
    expect(await codeOf(() => program.executable.submit({ T: 1 }))).toBe("object/disposed");
    await device[Symbol.asyncDispose]();
    expect(fake.disposed).toBe(true);
  });

  test("a program in which nothing varies is captured, though its bucket is the largest", async () => {
    const { fake, device } = openFakeCuda();
    const g = new GraphBuilder();
    const x = g.input("x", dense("f32", [4, 8]));
    g.output("y", g.one("unary", [x], { fn: "relu" }));
    const plan = makePlan(g.build(), { kernels: [RELU], capabilities: hopper.capabilities });
    using _ = await device.load(plan, () => expect.fail("it has no weights"));
    const [program] = [...fake.programs.values()];
    expect(program?.buckets.map(({ capture, largest }) => [capture, largest])).toEqual([[true, []]]);
    await device[Symbol.asyncDispose]();
  });

  test.each([true, false])(
    "a kernel that takes over the step behind its own launches once, read elsewhere: %s",
    async (read) => {
      const joining: NativeKernel = {
        ...RELU,
        join: (context, after) => {
          const [dispatch] = RELU.build(after) as [NativeDispatch];
          const bindings = [value(context.bound.step.inputs[0] as ValueId), ...dispatch.bindings.slice(1)];
          return [{ ...dispatch, bindings }];
        },
      };
      const g = new GraphBuilder({ T: 4 });
      const first = g.one("unary", [g.input("x", dense("f32", ["T", 8]))], { fn: "relu" });
      g.output("y", g.one("unary", [first], { fn: "relu" }));
      if (read) g.output("first", first);
      const plan = makePlan(g.build(), { kernels: [joining], capabilities: hopper.capabilities });
      const { device } = openFakeCuda();
      using executable = await device.load(plan, () => expect.fail("it has no weights"));
      executable.write("x", { dtype: "f32", shape: [4, 8], data: Float32Array.from({ length: 32 }, (_, i) => 3 - i) });
      executable.submit({ T: 4 });
      expect(executable.statistics.dispatches).toBe(read ? 2 : 1);
      const { data } = (await executable.read("y")) as DenseTensor;
      expect([...data]).toEqual(Array.from({ length: 32 }, (_, i) => Math.max(0, 3 - i)));
    },
  );

  test("guard words tell which buffer was written beyond its end, and rows that a run does not have", async () => {
    const { fake, device } = openFakeCuda();
    const plan = reluPlan();
    using executable = await device.load(plan, () => expect.fail("it has no weights"), { guard: true });
    executable.submit({ T: 2 });
    expect(await executable.damage()).toEqual([]);
    const label = plan.graph.values.find(({ role }) => role === "input")?.name;
    // The input has 4 * 8 floats; its guard begins after them.
    const [input] = [...fake.memory]
      .filter(([, bytes]) => new Uint32Array(bytes.buffer)[0] !== GUARD_WORD)
      .map(([id]) => id);
    fake.write(input as number, 4 * 8 * 4, new Uint32Array([1]));
    expect(await executable.damage()).toEqual([label]);
    expect(await executable.damage()).toEqual([]);
    executable.submit({ T: 4 });
    executable.submit({ T: 2 });
    expect((await executable.damage()).length).toBe(1);
    await device[Symbol.asyncDispose]();
  });

  test("a failure of the addon is coded; a sticky one loses the device for good", async () => {
    const { fake, device } = openFakeCuda();
    const plan = reluPlan();
    fake.fails = cudaError("memory", "allocating a buffer", "out of memory");
    expect(await codeOf(() => device.load(plan, () => expect.fail()))).toBe("plan/memory");
    expect(fake.counters()).toMatchObject({ bytes: 0, programs: 0 });
    const executable = await device.load(plan, () => expect.fail());
    fake.fails = cudaError("error", "launching", "an invalid argument");
    expect(await codeOf(() => executable.submit({ T: 1 }))).toBe("device/error");
    expect(await codeOf(() => executable.submit({ T: 1 }))).toBe(null);
    const read = executable.read("y");
    fake.fails = cudaError("lost", "reading a buffer", "an illegal address");
    expect(await codeOf(() => read)).toBe("device/lost");
    expect(await device.lost).toContain("an illegal address");
    expect(await codeOf(() => executable.submit({ T: 1 }))).toBe("device/lost");
    executable[Symbol.dispose]();
    await device[Symbol.asyncDispose]();
  });
});

describe("the addon and the table must fit", () => {
  const row = (...entries: { name: string; abi: number }[]) => ({ entries }) as unknown as NativeKernel;
  const a = { name: "general/a", abi: 2 };

  test("an addon with everything and more is taken", () => {
    checkAddon({ abi: 1, entries: [a, { name: "general/old", abi: 1 }] }, [row(a), row(a)]);
  });

  test("every entry that differs is named", async () => {
    const check = () =>
      checkAddon({ abi: 7, entries: [{ name: "general/a", abi: 1 }] }, [row(a, { name: "linear/b", abi: 1 })]);
    expect(await codeOf(check)).toBe("build/addon-mismatch");
    expect(check).toThrow("interface 7 instead of 1, general/a has version 1 instead of 2, linear/b is missing");
  });

  test("errors without detail pass through", () => {
    const plain = new Error("a bug");
    expect(codedError(plain)).toBe(plain);
    expect(codedError(cudaError("error", "a", "b"))).toBeInstanceOf(FewbitError);
  });
});

describe("why there is no CUDA device, in words", () => {
  const none = { driver: 0, runtime: 13000, status: "insufficient driver", devices: [] };
  const volta = { ...H100, name: "a V100", major: 7, minor: 0 };
  test.each([
    ["no NVIDIA driver is installed", none, undefined],
    ["the driver is for CUDA 12.2, the addon needs 13.0", { ...none, driver: 12020 }, undefined],
    ["the driver says: no device", { ...none, driver: 13000, status: "no device" }, undefined],
    ["a V100 has compute capability 7.0: 8.0 is the lowest", { ...none, driver: 13000, devices: [volta] }, undefined],
    ["there is no device 3", { ...none, driver: 13000, devices: [H100] }, 3],
  ])("%s", (reason, probe, index) => {
    expect(() => choose(probe, index)).toThrow(reason);
  });

  test("the first device that kernels are built for is taken, or the one that is named", () => {
    const second = { ...H100, index: 1 };
    const probe = { ...none, driver: 13000, devices: [volta, second] };
    expect(choose(probe)).toBe(second);
    expect(choose(probe, 1)).toBe(second);
  });

  test("an addon that is not built is a reason, not a crash", async () => {
    expect(() => loadAddon([], "/no/such/fewbit.node")).toThrow("the native addon is not built");
    expect(await codeOf(() => loadAddon([], "/no/such/fewbit.node"))).toBe("device/unavailable");
  });
});

/** Why the built addon cannot be tested here, or null. */
const absent = (() => {
  try {
    loadAddon(NATIVE_KERNELS);
    return null;
  } catch (error) {
    return (error as Error).message;
  }
})();

test("the addon is built and of this version, or its absence is named", () => {
  if (absent !== null) console.warn(`absent: ${absent} (npm run build:native), so the addon is not loaded by this run`);
  if (existsSync(ADDON_PATH)) expect(absent ?? "").not.toContain("cannot be loaded");
});

test("a backend that is not here stays in the explanations with its reason", async () => {
  await using device = await open({ prefer: ["cuda", "reference"] });
  if (device.info.backend === "cuda") return;
  const [choice] = device.plan(relus()).buckets.flatMap(({ choices }) => choices);
  const own = choice?.explanation.rejected.find(({ id }) => id === "cuda/*");
  expect(own?.reason).toMatch(/^not considered: .*(not built|no NVIDIA driver|does not fit)/);
});

describe.runIf(absent === null)("the built addon", () => {
  const addon = () => loadAddon(NATIVE_KERNELS);

  test("loads with and without a driver, and says in words why there is no device", async () => {
    const { driver, devices, runtime } = addon().probe();
    expect(runtime).toBeGreaterThanOrEqual(12000);
    if (devices.length > 0) return;
    expect(await codeOf(() => open({ prefer: ["cuda"] }))).toBe("device/unavailable");
    await expect(open({ prefer: ["cuda"] })).rejects.toThrow(driver === 0 ? "no NVIDIA driver is installed" : "driver");
    const { Device: Opened } = addon();
    expect(() => new Opened(0)).toThrow(/opening the device: cuda/);
  });

  test("refuses arguments that make no sense", () => {
    const { Device: Opened } = addon();
    expect(() => new Opened(-1)).toThrow("non-negative integer");
  });
});
