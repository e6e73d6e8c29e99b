import { readdirSync, truncateSync } from "node:fs";
import { chmod, mkdir, mkdtemp, readFile, rm, stat, unlink, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { type AdapterChoice, destroyDevice, requestGpu } from "../../src/backends/webgpu/adapter.js";
import { provisionSwiftShader } from "../../src/backends/webgpu/node.js";
import { Built } from "../setup/built.js";
import { failure } from "../support/failure.js";

/** A GPU object with the adapters given: what a browser's, or a caller's own, looks like from here. */
function fakeGpu(adapters: { software?: Partial<GPUAdapterInfo>; hardware?: Partial<GPUAdapterInfo> }): GPU {
  const adapter = (info: Partial<GPUAdapterInfo> | undefined, isFallbackAdapter: boolean) =>
    info && {
      info: { vendor: "", architecture: "", device: "", description: "", isFallbackAdapter, ...info },
      features: new Set(["subgroups"]),
    };
  const hardware = adapter(adapters.hardware, false);
  const software = adapter(adapters.software, true);
  return {
    requestAdapter: async (options: GPURequestAdapterOptions = {}) =>
      (options.forceFallbackAdapter ? software : (hardware ?? software)) ?? null,
  } as unknown as GPU;
}

const environment = { ...process.env };

describe("the machine's adapter", () => {
  let choice: AdapterChoice;
  beforeAll(async () => {
    choice = await requestGpu();
  });

  test("is found, named and explained", () => {
    expect(choice.name).not.toBe("");
    expect(choice.info.vendor).not.toBe("");
    expect(choice.info.architecture).not.toBe("");
    expect(choice.reason).toContain(choice.name);
    expect(choice.reason).toMatch(/^[^\n]+\.$/);
    expect(["hardware", "software"]).toContain(choice.kind);
  });

  test("is software only after the hardware was looked for, and then says why", () => {
    if (choice.kind === "hardware") return expect(choice.reason).toContain("hardware GPU");
    expect(choice.tried).not.toEqual([]);
    expect(choice.reason).toContain("runs on the CPU because no hardware GPU was found");
    for (const line of choice.tried) expect(choice.reason).toContain(line);
  });

  test("makes a device that computes, and each request gives a fresh adapter", async () => {
    for (let i = 0; i < 2; i++) {
      const { adapter } = await requestGpu();
      const device = await adapter.requestDevice();
      const buffer = device.createBuffer({ size: 16, usage: 0x1 | 0x8 }); // MAP_READ | COPY_DST
      device.queue.writeBuffer(buffer, 0, new Uint32Array([1, 2, 3, 4 + i]));
      await buffer.mapAsync(0x1);
      expect([...new Uint32Array(buffer.getMappedRange())]).toEqual([1, 2, 3, 4 + i]);
      await destroyDevice(device);
    }
  });

  test("requests made together share one GPU object", async () => {
    const choices = await Promise.all([requestGpu(), requestGpu(), requestGpu()]);
    expect(new Set(choices.map((c) => c.gpu)).size).toBe(1);
    expect(new Set(choices.map((c) => c.adapter)).size).toBe(3);
  });

  test("the environment is as it was", () => {
    expect({ ...process.env }).toEqual(environment);
  });

  test("an aborted request is a coded error", async () => {
    const error = await failure(requestGpu({ signal: AbortSignal.abort() }));
    expect(error.code).toBe("operation/aborted");
  });

  test("a feature nobody has is a reason, not a device without it", async () => {
    const feature = "no-such-feature" as GPUFeatureName;
    const error = await failure(requestGpu({ features: [feature] }));
    expect(error.code).toBe("device/unavailable");
    expect(error.message).toContain("lacks no-such-feature");
  });
});

describe("an injected GPU", () => {
  test("is used, whatever the machine has", async () => {
    const gpu = fakeGpu({ hardware: { vendor: "acme", device: "anvil", description: "Anvil 9000" } });
    const choice = await requestGpu({ gpu });
    expect(choice).toMatchObject({ gpu, kind: "injected", name: "anvil (Anvil 9000)", tried: [] });
    expect(choice.info).toEqual({ vendor: "acme", architecture: "", device: "anvil", description: "Anvil 9000" });
  });

  test("is not replaced when it has no adapter", async () => {
    const error = await failure(requestGpu({ gpu: fakeGpu({}) }));
    expect(error.code).toBe("device/unavailable");
    expect(error.message).toContain("injected GPU: it offers no adapter");
    expect(error.hint).toBeTruthy();
  });

  test("must be of the kind asked for", async () => {
    const cpu = fakeGpu({ software: { device: "abacus" } });
    const error = await failure(requestGpu({ gpu: cpu, adapter: "hardware" }));
    expect(error.message).toContain("abacus runs on the CPU");
    const both = fakeGpu({ hardware: { device: "anvil" }, software: { device: "abacus" } });
    expect((await requestGpu({ gpu: both, adapter: "software" })).name).toBe("abacus");
    expect((await requestGpu({ gpu: both, adapter: "hardware" })).name).toBe("anvil");
    expect((await requestGpu({ gpu: both, adapter: "auto" })).name).toBe("anvil");
  });
});

describe("a browser's GPU", () => {
  let saved: PropertyDescriptor | undefined;
  beforeEach(() => {
    saved = Object.getOwnPropertyDescriptor(globalThis, "navigator");
  });
  afterEach(() => {
    if (saved) Object.defineProperty(globalThis, "navigator", saved);
    else delete (globalThis as { navigator?: unknown }).navigator;
  });
  const browse = (gpu: GPU) => Object.defineProperty(globalThis, "navigator", { value: { gpu }, configurable: true });

  test("is preferred to Dawn, and called hardware or software as it is", async () => {
    browse(fakeGpu({ hardware: { vendor: "acme", architecture: "gen-1" } }));
    expect(await requestGpu()).toMatchObject({ kind: "hardware", name: "acme gen-1" });
    browse(fakeGpu({ software: { vendor: "acme", architecture: "gen-0" } }));
    const choice = await requestGpu();
    expect(choice).toMatchObject({ kind: "software", name: "acme gen-0" });
    expect(choice.reason).toContain("no hardware GPU was found");
  });
});

describe.runIf(process.platform === "linux" && process.arch === "x64")("SwiftShader", () => {
  let built: Built;
  let cache: string;
  beforeAll(async () => {
    built = await Built.of("backends/webgpu/adapter.ts");
  });
  afterAll(() => built[Symbol.asyncDispose]());
  beforeEach(async () => {
    cache = await mkdtemp(join(tmpdir(), "fewbit-test-"));
  });
  afterEach(() => rm(cache, { recursive: true, force: true }));

  /** A machine without a GPU, whatever this one has: no driver named, none in the folders that variables name. */
  const bare = () => ({
    VK_DRIVER_FILES: undefined,
    VK_ICD_FILENAMES: undefined,
    VK_ADD_DRIVER_FILES: undefined,
    XDG_CACHE_HOME: cache,
  });
  const SHOW = `import { requestGpu, destroyDevice } from "./backends/webgpu/adapter.js";
    const show = (c) => console.log(JSON.stringify({ name: c.name, kind: c.kind, info: c.info, tried: c.tried, reason: c.reason }));\n`;
  const last = (stdout: string) => JSON.parse(stdout.trim().split("\n").at(-1) ?? "null");

  test("is the software adapter", async () => {
    const choice = await requestGpu({ adapter: "software" });
    expect(choice.kind).toBe("software");
    expect(choice.reason).toMatch(/runs on the CPU, as was asked\.$/);
  });

  test("8 processes that inflate it together all get a device", async () => {
    const script = `${SHOW} const c = await requestGpu({ adapter: "software" }); const d = await c.adapter.requestDevice(); await destroyDevice(d); show(c);`;
    const children = await Promise.all(Array.from({ length: 8 }, () => built.node(script, bare())));
    for (const child of children) {
      expect(child).toMatchObject({ code: 0, signal: null, stderr: "" });
      expect(last(child.stdout)).toMatchObject({ kind: "software", info: { architecture: "swiftshader" } });
    }
    const [folder] = readdirSync(join(cache, "fewbit"));
    const left = readdirSync(join(cache, "fewbit", folder as string));
    expect(left.sort()).toEqual(["libvk_swiftshader.so", "libvulkan.so.1", "sizes.json", "vk_swiftshader_icd.json"]);
  });

  test("hardware is refused without one, and software still works in the same process", async () => {
    const script = `${SHOW} const e = await requestGpu({ adapter: "hardware" }).catch((e) => e);
      const c = await requestGpu(); show(c); console.log(JSON.stringify({ code: e.code ?? e.kind, message: e.message, hint: e.hint, kind: c.kind }));`;
    const child = await built.node(script, bare());
    const { code, message, hint, kind } = last(child.stdout);
    if (kind === "hardware") return expect(code).toBe("hardware");
    expect({ code, kind }).toEqual({ code: "device/unavailable", kind: "software" });
    expect(message).toMatch(/^no webgpu device: the system's Vulkan driver: /);
    expect(hint).toBeTruthy();
    expect(child.stderr).toBe("");
  });

  test("a software driver that the user named is used, and not called hardware", async () => {
    const { icd } = await provisionSwiftShader();
    const child = await built.node(
      `${SHOW} show(await requestGpu()); const e = await requestGpu({ adapter: "hardware" }).catch((e) => e); console.log(JSON.stringify(e.message));`,
      { ...bare(), VK_ICD_FILENAMES: icd },
    );
    expect(JSON.parse(child.stdout.split("\n")[0] as string)).toMatchObject({ kind: "software" });
    expect(child.stdout.split("\n")[0]).toContain("the Vulkan driver in VK_ICD_FILENAMES");
    expect(last(child.stdout)).toContain("runs on the CPU");
  });

  test("files that were cut, removed or never finished are repaired", async () => {
    const { folder, loader } = await provisionSwiftShader(cache);
    const size = (await stat(loader)).size;
    const harm: (() => unknown)[] = [
      () => truncateSync(loader, 1000),
      () => unlink(join(folder, "libvk_swiftshader.so")),
      () => unlink(join(folder, "sizes.json")),
      () => writeFile(join(folder, "sizes.json"), "{"),
    ];
    for (const act of harm) {
      await act();
      await provisionSwiftShader(cache);
      expect((await stat(loader)).size).toBe(size);
      const sizes = JSON.parse(await readFile(join(folder, "sizes.json"), "utf8")) as Record<string, number>;
      for (const [name, bytes] of Object.entries(sizes)) expect((await stat(join(folder, name))).size).toBe(bytes);
    }
  });

  test("a complete copy is not written again", async () => {
    const { loader } = await provisionSwiftShader(cache);
    const before = await stat(loader);
    await provisionSwiftShader(cache);
    expect((await stat(loader)).ino).toBe(before.ino);
  });

  test("what a killed process left is removed when it is old, and kept while it may be in use", async () => {
    const { folder } = await provisionSwiftShader(cache);
    for (const name of [".inflate-old", ".inflate-new"]) await mkdir(join(folder, name));
    await utimes(join(folder, ".inflate-old"), 1, 1);
    await unlink(join(folder, "sizes.json"));
    await provisionSwiftShader(cache);
    expect(readdirSync(folder).filter((name) => name.startsWith("."))).toEqual([".inflate-new"]);
  });

  test("its folder is closed to other users' writes", async () => {
    await mkdir(join(cache, "open"));
    await chmod(join(cache, "open"), 0o777);
    const { folder } = await provisionSwiftShader(join(cache, "open"));
    for (const path of [join(cache, "open"), folder]) expect((await stat(path)).mode & 0o022).toBe(0);
  });

  test("without its package the error says what to install", async () => {
    const elsewhere = join(cache, "elsewhere");
    await mkdir(elsewhere);
    const script = `import { cp } from "node:fs/promises"; await cp(".", ${JSON.stringify(elsewhere)}, { recursive: true });
      const { requestGpu } = await import(${JSON.stringify(join(elsewhere, "backends/webgpu/adapter.js"))});
      const e = await requestGpu({ adapter: "software" }).catch((e) => e);
      console.log(JSON.stringify({ code: e.code, message: e.message, hint: e.hint }));`;
    const child = await built.node(script, bare());
    const { code, message, hint } = last(child.stdout);
    expect(code).toBe("device/unavailable");
    expect(message).toContain("@sparticuz/chromium is not installed");
    expect(hint).toContain("npm install --save-dev @sparticuz/chromium");
  });

  describe("a process ends by itself", () => {
    const START = `${SHOW} const { adapter } = await requestGpu(); const device = await adapter.requestDevice();
      const buffer = device.createBuffer({ size: 16, usage: 0x1 | 0x8 });
      device.queue.writeBuffer(buffer, 0, new Uint32Array(4));\n`;
    const endings = {
      "after the device was destroyed": ["await buffer.mapAsync(1); await destroyDevice(device);", 0],
      "with a map pending when it is destroyed": [
        "buffer.mapAsync(1).catch(() => {}); await destroyDevice(device);",
        0,
      ],
      "with a device that nobody destroyed": ["await buffer.mapAsync(1);", 0],
      "by process.exit with a live device": ["await buffer.mapAsync(1); process.exit(3);", 3],
      "by an error with a live device": ["await buffer.mapAsync(1); throw new Error('boom');", 1],
    } as const;
    test.each(Object.entries(endings))("%s", async (_, [script, code]) => {
      const child = await built.node(START + script, { ...bare(), XDG_CACHE_HOME: process.env.XDG_CACHE_HOME }, 15_000);
      expect({ code: child.code, signal: child.signal }).toEqual({ code, signal: null });
    });
  });
});
