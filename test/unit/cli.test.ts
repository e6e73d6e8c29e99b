import { type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { loadModel } from "../../src/models/model.js";
import { open } from "../../src/runtime/device.js";
import { Built } from "../setup/built.js";
import { tinyModel } from "../support/tiny-model.js";

interface Ended {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

let built: Built;
let work: string;
let tiny: string;

beforeAll(async () => {
  built = await Built.of("cli/main.ts");
  work = await mkdtemp(join(tmpdir(), "fewbit-cli-"));
  tiny = join(work, "tiny");
  await mkdir(tiny);
  for (const [name, bytes] of tinyModel({ config: { max_position_embeddings: 512 } }))
    await writeFile(join(tiny, name), bytes);
});
afterAll(async () => {
  await built[Symbol.asyncDispose]();
  await rm(work, { recursive: true, force: true });
});

/** The command as it is installed, in a folder of its own; `during` may act on it while it runs. */
function fewbit(
  args: string[],
  env: Record<string, string> = {},
  during?: (child: ChildProcessWithoutNullStreams) => void,
): Promise<Ended> {
  const { NO_COLOR: _, FORCE_COLOR: __, ...rest } = process.env;
  const child = spawn(process.execPath, [join(built.folder, "cli/main.js"), ...args], {
    cwd: work,
    env: { ...rest, ...env },
  });
  during?.(child);
  let [stdout, stderr] = ["", ""];
  child.stdout.setEncoding("utf8").on("data", (text: string) => (stdout += text));
  child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
  return new Promise((resolve) => child.on("close", (code) => resolve({ code, stdout, stderr })));
}
const REFERENCE = ["--backend", "reference"];
const onTiny = (...args: string[]) => ["run", tiny, ...REFERENCE, "--quantize", "int4wo-32", ...args];
const json = ({ stdout }: Ended) => {
  expect(stdout.endsWith("\n") && stdout.indexOf("\n") === stdout.length - 1).toBe(true);
  return JSON.parse(stdout);
};
const ESCAPE = "\x1b[";

describe("help", () => {
  test.each([[[]], [["run"]], [["info"]], [["explain"]]])(
    "of fewbit %s goes to stdout, with examples",
    async (command) => {
      const { code, stdout, stderr } = await fewbit([...command, "--help"]);
      expect([code, stderr]).toEqual([0, ""]);
      expect(stdout).toMatch(new RegExp(`Usage: ${["fewbit", ...command].join(" ")}`));
      expect(stdout).toMatch(/Examples:\n {2}fewbit /);
      if (command.length === 0) expect(stdout).toMatch(/Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted/);
      else expect(stdout).toMatch(/--json/);
    },
  );

  test("without a command goes to stderr: wrong usage", async () => {
    const { code, stdout, stderr } = await fewbit([]);
    expect([code, stdout]).toEqual([2, ""]);
    expect(stderr).toMatch(/Usage: fewbit/);
  });

  test("--version is the package's", async () => {
    const { version, bin, scripts } = JSON.parse(await readFile("package.json", "utf8"));
    expect(await fewbit(["--version"])).toEqual({ code: 0, stdout: `${version}\n`, stderr: "" });
    expect(bin.fewbit).toBe("dist/cli/main.js");
    expect(scripts.start).toBe(`node ${bin.fewbit} run`);
  });
});

describe("run", () => {
  test("prints one JSON object: the tokens that the API gives, the device, the model, and speeds", async () => {
    const settings = { maxTokens: 9, temperature: 0.8, topK: 40, topP: 0.95, seed: 7 };
    const flags = ["--max-tokens", "9", "--temperature", "0.8", "--top-k", "40", "--top-p", ".95", "--seed", "7"];
    const ended = await fewbit(onTiny("--prompt", "Hello, sea", ...flags, "--context", "100", "--json"));
    expect([ended.code, ended.stderr]).toEqual([0, ""]);
    await using device = await open({ prefer: ["reference"] });
    using model = await loadModel(tiny, { device, quantize: "int4wo-32", context: 100 });
    const tokens = [];
    for await (const token of model.generate("Hello, sea", settings)) tokens.push(token);
    const text = tokens.map((token) => token.text).join("");
    const report = json(ended);
    expect(report).toMatchObject({
      command: "run",
      prompt: "Hello, sea",
      settings,
      tokens,
      text,
      finish: "length",
      device: { backend: "reference", kind: "reference", reason: expect.stringMatching(/never a fallback/) },
      model: { path: "tiny", architecture: "LlamaForCausalLM", layers: 2, context: 100, quantize: "int4wo-32" },
      speed: { promptTokens: 11, generatedTokens: 9, dispatchesPerToken: model.program.plan.steps.length },
    });
    expect(report.model.weightBytes).toBe(model.weightBytes);
    expect(report.model.formats).toContainEqual(
      expect.objectContaining({ format: expect.stringMatching(/^int4_tinygemm/), matrices: 14, bitsPerWeight: 5 }),
    );
    for (const key of ["promptSeconds", "promptTokensPerSecond", "decodeTokensPerSecond", "encodeSecondsPerToken"])
      expect(report.speed[key]).toBeGreaterThan(0);
  });

  test("without a folder takes the bundled model at 4 bits a weight: text on stdout, the summary on stderr", async () => {
    const { code, stdout, stderr } = await fewbit(["run", ...REFERENCE, "--max-tokens", "6"]);
    expect(code).toBe(0);
    expect(stdout).toMatch(/^[ ,a-z"A-Z.]+\n$/);
    for (const line of [
      /^device +TypeScript reference \(float64\)/m,
      /^why +asked for: the reference is never a fallback/m,
      /^model +.*fewbit-tiny: LlamaForCausalLM, 8 layers, context 1,024 tokens/m,
      /^format +int4wo-64\n +1 matrix .*bf16\n +56 matrices +4\.50 bits a weight +int4_tinygemm/m,
      /^weights +4\.9 MB, KV cache 8\.4 MB/m,
      /^prompt +10 tokens in [\d.]+ m?s, [\d.]+ tokens\/s/m,
      /^decode +5 tokens in [\d.]+ m?s, [\d.]+ tokens\/s/m,
      /^work +69 dispatches a token for 8 layers; computing them takes [\d.]+ [mu]?s a token/m,
      /^go on +npx fewbit run .*\n +npx fewbit run .*\n +npx fewbit explain$/m,
    ])
      expect(stderr).toMatch(line);
    expect(stderr).not.toContain(ESCAPE);
    expect(stderr).not.toContain("\r");
  });

  test("of no tokens prints none", async () => {
    const { code, stdout, stderr } = await fewbit(onTiny("--max-tokens", "0"));
    expect([code, stdout]).toEqual([0, ""]);
    expect(stderr).not.toMatch(/^decode/m);
  });

  test("says when the model ended the text", async () => {
    const tokens = json(await fewbit(onTiny("--max-tokens", "3", "--json"))).tokens as { id: number }[];
    const config = JSON.parse(await readFile(join(tiny, "config.json"), "utf8"));
    const ending = join(work, "ending");
    await mkdir(ending);
    for (const [name, bytes] of tinyModel()) await writeFile(join(ending, name), bytes);
    await writeFile(join(ending, "config.json"), JSON.stringify({ ...config, eos_token_id: tokens[2]?.id }));
    const ended = json(await fewbit(["run", "ending", ...REFERENCE, "--quantize", "int4wo-32", "--json"]));
    expect(ended).toMatchObject({ finish: "eos", model: { path: "ending" } });
    expect(ended.tokens.length).toBeLessThanOrEqual(3);
  });
});

describe("quantize", () => {
  test("saves a folder that run loads as it is stored, whatever its default would quantize to", async () => {
    const saved = json(await fewbit(["quantize", tiny, "--quantize", "int8wo", "--out", "saved", "--json"]));
    expect(saved).toMatchObject({
      command: "quantize",
      files: ["model.safetensors"],
      kept: [],
      quantized: 14,
      foreign: null,
    });
    const ended = await fewbit(["run", "saved", ...REFERENCE, "--max-tokens", "2", "--json"]);
    expect(ended.stderr).toContain("the checkpoint is quantized already");
    const formats = json(ended).model.formats as { format: string; matrices: number }[];
    expect(formats).toContainEqual(expect.objectContaining({ format: "int8[1xall:f32]", matrices: 14 }));
    expect(await fewbit(["run", "saved", ...REFERENCE, "--quantize", "int8wo", "--max-tokens", "0"])).toMatchObject({
      code: 0,
    });
  });

  test("says what it lacks", async () => {
    const ended = await fewbit(["quantize", tiny, "--quantize", "nf4-64"]);
    expect(ended.code).toBe(2);
    expect(ended.stderr).toContain("--out");
    const foreign = await fewbit(["quantize", tiny, "--quantize", "uint4wo-32", "--out", "uint4"]);
    expect(foreign.stderr).toContain("fewbit alone: torchao's checkpoints have no class for int4_hqq");
  });
});

describe("colours", () => {
  test("are off in a pipe, on with FORCE_COLOR, off with NO_COLOR whatever else is said", async () => {
    const escapes = async (env: Record<string, string>) => {
      const { stdout, stderr } = await fewbit(onTiny("--max-tokens", "1"), env);
      expect(stdout).not.toContain(ESCAPE);
      return stderr.includes(ESCAPE);
    };
    expect(await escapes({})).toBe(false);
    expect(await escapes({ CI: "1" })).toBe(false);
    expect(await escapes({ FORCE_COLOR: "1" })).toBe(true);
    expect(await escapes({ FORCE_COLOR: "1", NO_COLOR: "1" })).toBe(false);
    expect((await fewbit(["run", "--help"], { NO_COLOR: "1" })).stdout).not.toContain(ESCAPE);
  });
});

describe("errors carry a code, say what would be right, and set the exit code", () => {
  const cases: [args: string[], exit: number, code: string, text: RegExp][] = [
    [["run", "--quantize", "int4w-64"], 2, "argument/unknown-name", /int4wo-64/],
    [["run", "--quantize", "int4wo-99"], 2, "argument/invalid", /32, 64, 128, 256/],
    [["run", "--max-tokens", "-1"], 2, "argument/invalid", /--max-tokens is "-1": expected an integer of at least 0/],
    [["run", "--max-tokens", "1.5"], 2, "argument/invalid", /--max-tokens/],
    [["run", "--max-tokens", "many"], 2, "argument/invalid", /--max-tokens/],
    [["run", "--max-tokens", ""], 2, "argument/invalid", /--max-tokens/],
    [["run", "--top-k", "-5"], 2, "argument/invalid", /--top-k/],
    [["run", "--seed", "4294967296"], 2, "argument/invalid", /from 0 to 4294967295/],
    [["run", "--context", "0"], 2, "argument/invalid", /--context/],
    [["run", "--temperature", "-0.1"], 2, "argument/invalid", /--temperature/],
    [["run", "--temperature", "Infinity"], 2, "argument/invalid", /--temperature/],
    [["run", "--top-p", "0"], 2, "argument/invalid", /above 0 and at most 1/],
    [["explain", "--tokens", "0"], 2, "argument/invalid", /--tokens/],
    [["run", "--backend", "cpu"], 2, "argument/unknown-name", /did you mean cuda, auto, webgpu, reference/],
    [["run", "--sed", "1"], 2, "argument/unknown-name", /option "--sed".*--seed/],
    [["rum"], 2, "argument/unknown-name", /command "rum".*run/],
    [["run", "--seed"], 2, "argument/invalid", /--seed is "": expected a value/],
    [["run", "one", "two"], 2, "argument/invalid", /fewer arguments/],
    [["run", "nowhere", ...REFERENCE], 1, "io/not-found", /nowhere/],
    [["run", "tiny", ...REFERENCE, "--quantize", "int4wo-64"], 1, "quantize/layer", /K = 32 is not a multiple of 64/],
    [["run", "tiny", ...REFERENCE, "--quantize", "none", "--context", "8"], 1, "model/context-length", /do not fit/],
    [["run", "tiny", ...REFERENCE, "--quantize", "none", "--context", "9999"], 2, "argument/invalid", /from 1 to 512/],
  ];

  test.each(cases)("%j", async (args, exit, code, text) => {
    const [command, ...rest] = args as [string, ...string[]];
    const [told, ended] = await Promise.all([fewbit(args), fewbit([command, "--json", ...rest])]);
    expect([told.code, told.stdout]).toEqual([exit, ""]);
    expect(told.stderr).toMatch(text);
    expect(told.stderr).toContain(`(${code})`);
    expect(told.stderr).not.toMatch(/^\s+at /m);
    const { error } = json(ended);
    expect([ended.code, ended.stderr]).toEqual([exit, ""]);
    expect(error).toMatchObject({ code, context: expect.any(Object), message: expect.stringMatching(text) });
    expect(error.hint === null || typeof error.hint === "string").toBe(true);
  });

  test("no WebGPU device is an error with every reason: the reference does not step in", async () => {
    const nowhere = {
      VK_DRIVER_FILES: "/nonexistent.json",
      VK_ICD_FILENAMES: "",
      XDG_CACHE_HOME: "/dev/null",
      TMPDIR: "/dev/null",
    };
    const ended = await fewbit(["run", "tiny", "--quantize", "none", "--json"], nowhere);
    expect(ended.code).toBe(1);
    expect(json(ended).error).toMatchObject({
      code: "device/unavailable",
      message: expect.stringMatching(/SwiftShader/),
    });
    const told = await fewbit(["info"], nowhere);
    expect(told.code).toBe(1);
    expect(told.stdout).toMatch(/^device +none$/m);
    expect(told.stderr).toMatch(/device\/unavailable/);
  });
});

describe("Ctrl-C", () => {
  const interruptAfter = (count: number) => (child: ChildProcessWithoutNullStreams) => {
    let chunks = 0;
    child.stdout.on("data", () => ++chunks === count && child.kill("SIGINT"));
  };

  test("stops the text where it is, prints the summary and exits 130", async () => {
    const whole = await fewbit(onTiny("--max-tokens", "400"));
    const { code, stdout, stderr } = await fewbit(onTiny("--max-tokens", "400"), {}, interruptAfter(5));
    expect(code).toBe(130);
    expect(stdout.length).toBeLessThan(whole.stdout.length);
    expect(whole.stdout.startsWith(stdout.slice(0, -1))).toBe(true);
    expect(stderr).toMatch(/^stopped +by Ctrl-C after \d+ of 400 tokens/m);
    expect(stderr).toMatch(/^decode/m);
  });

  test("with --json still gives the one object", async () => {
    // Nothing is printed before the end: the child says itself when Ctrl-C would be heard.
    const ready = 'process.on("newListener", (event) => event === "SIGINT" && console.error("ready"))';
    const env = { NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(ready)}` };
    const during = (child: ChildProcessWithoutNullStreams) =>
      void child.stderr.once("data", () => setTimeout(() => child.kill("SIGINT"), 900));
    const ended = await fewbit(["run", ...REFERENCE, "--max-tokens", "900", "--json"], env, during);
    expect(ended.code).toBe(130);
    const report = json(ended);
    // Before the first token it is an error, after it a report.
    if (report.error) expect(report.error.code).toBe("operation/aborted");
    else expect(report).toMatchObject({ finish: "interrupted" });
  });
});

test("a reader that goes away ends the run quietly", async () => {
  const during = (child: ChildProcessWithoutNullStreams) =>
    void child.stdout.once("data", () => child.stdout.destroy());
  const { code, stderr } = await fewbit(onTiny("--max-tokens", "450"), {}, during);
  expect([code, stderr]).toEqual([0, ""]);
});

describe("explain", () => {
  test("prints every step of both buckets on stdout, what it is about on stderr", async () => {
    const { code, stdout, stderr } = await fewbit([
      "explain",
      tiny,
      ...REFERENCE,
      "--quantize",
      "int4wo-32",
      "--tokens",
      "16",
    ]);
    expect(code).toBe(0);
    expect(stdout).toMatch(/^bucket T <= 1, past <= 512: 21 steps\nembedding #0 /);
    expect(stdout).toMatch(/^bucket T <= 16, past <= 512: 21 steps$/m);
    expect(stdout).toMatch(/^ {2}-> reference\/linear +est\. [\d.e+]+ us, (compute|bandwidth|dispatch)-bound$/m);
    expect(stdout).toMatch(/^memory: weights \d+ B/m);
    expect(stderr).toMatch(/^format +int4wo-32/m);
  });

  test("as JSON", async () => {
    const { plan, command } = json(await fewbit(["explain", tiny, ...REFERENCE, "--quantize", "none", "--json"]));
    expect(command).toBe("explain");
    expect(
      plan.buckets.map(({ symbols, steps }: { symbols: object; steps: object[] }) => [symbols, steps.length]),
    ).toEqual([
      [{ T: 1, past: 512 }, 21],
      [{ T: 128, past: 512 }, 21],
    ]);
    expect(plan.buckets[0].steps[0]).toMatchObject({ kernel: "reference/embedding", rejected: [] });
    expect(plan.bytes.weights).toBeGreaterThan(0);
  });
});

test("info lists the device and every name, as text and as JSON", async () => {
  const report = json(await fewbit(["info", ...REFERENCE, "--json"]));
  expect(report).toMatchObject({ command: "info", node: process.versions.node, device: { backend: "reference" } });
  for (const name of ["none", "int4wo-64", "int8dq", "mxfp4", "nvfp4wo"]) expect(report.quantize).toContain(name);
  for (const name of ["f32", "int4_tinygemm", "nvfp4"]) expect(report.formats).toContain(name);
  const { stdout, stderr, code } = await fewbit(["info", ...REFERENCE]);
  expect([code, stderr]).toEqual([0, ""]);
  expect(stdout).toMatch(/int4wo-\{32,64,128,256\}/);
  // The GPU backends that were not opened: the device that each would give, or why there is none.
  for (const { backend, device, reason } of report.others as {
    backend: string;
    device: string | null;
    reason: string;
  }[]) {
    expect(stdout).toMatch(new RegExp(`^${backend} .*${device === null ? "none: " : "with --backend"}`, "m"));
    expect(reason).not.toBe("");
  }
  expect((report.others as unknown[]).length).toBe(2);
});
