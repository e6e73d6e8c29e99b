import { type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Chat } from "../../src/models/chat.js";
import { CHAT_TEMPLATES, modelTemplate, namedTemplate, parseTemplate } from "../../src/text/chat.js";
import { Built } from "../setup/built.js";
import { load, reference } from "../support/generate.js";
import { tinyModel } from "../support/tiny-model.js";

const TEMPLATE =
  "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
const TOKENS = { bos_token: "<bos>", eos_token: { content: "<eos>" } };
const messages = [
  { role: "system", content: "Be brief." },
  { role: "user", content: " Hello " },
] as const;

describe("a chat template", () => {
  test("comes from the model: its file, its configuration's text, or the default of a list", () => {
    const expected = "<bos>[system] Be brief.\n[user] Hello\n[assistant]";
    const list = [
      { name: "tool_use", template: "no" },
      { name: "default", template: TEMPLATE },
    ];
    for (const [config, file] of [
      [{ ...TOKENS, chat_template: TEMPLATE }, null],
      [{ ...TOKENS, chat_template: list }, null],
      [{ ...TOKENS, chat_template: "no" }, TEMPLATE],
    ] as const) {
      expect(modelTemplate(config, file)?.render(messages)).toBe(expected);
    }
    expect(modelTemplate(TOKENS, null)).toBeNull();
    expect(modelTemplate({ chat_template: [{ name: "tool_use", template: "no" }] }, null)).toBeNull();
  });

  test("by name puts every message in, in order, and ends where the answer begins", () => {
    for (const name of Object.keys(CHAT_TEMPLATES)) {
      const text = namedTemplate(name, TOKENS)?.render(messages) as string;
      expect(text.indexOf("Be brief.")).toBeGreaterThan(-1);
      expect(text.indexOf("Hello")).toBeGreaterThan(text.indexOf("Be brief."));
      expect(text).toMatch(/assistant[:\n]$/i);
    }
    expect(namedTemplate("toString", TOKENS)).toBeNull();
  });

  test("that does not parse, or refuses a conversation, is a coded error with its words", () => {
    expect(() => parseTemplate("{% for %}", [], TOKENS, "mine.jinja")).toThrow(
      expect.objectContaining({ code: "io/malformed", context: expect.objectContaining({ path: "mine.jinja" }) }),
    );
    const strict = parseTemplate("{{ raise_exception('roles must alternate') }}", [], TOKENS, "strict");
    expect(() => strict.render(messages)).toThrow(/roles must alternate/);
    expect(() => strict.render(messages)).toThrow(expect.objectContaining({ code: "argument/invalid" }));
  });
});

describe("a conversation", () => {
  const template = parseTemplate(TEMPLATE, [], TOKENS, "test");
  const settings = { maxTokens: 5, ignoreEos: true };
  const answer = async (chat: Chat, text: string) => {
    let said = "";
    for await (const token of chat.send(text, settings)) said += token.text;
    return said;
  };

  test("goes on from what the cache holds, and says what it would have said without it", async () => {
    await using device = await reference();
    using model = await load(device);
    const chat = new Chat(model, template, "S");
    await answer(chat, "a");
    const before = model.statistics;
    expect(before?.cachedTokens).toBe(0);
    const second = await answer(chat, "b");
    const { promptTokens = 0, cachedTokens = 0 } = model.statistics ?? {};
    // The first prompt is a prefix of the second, whatever the answer's own tokens turn into.
    expect(cachedTokens).toBeGreaterThanOrEqual(before?.promptTokens as number);
    expect(cachedTokens).toBeLessThan(promptTokens);
    const prompt = template.render(chat.messages.slice(0, -1));
    let fresh = "";
    const ids = model.tokenizer.encode(prompt, { addSpecialTokens: false });
    for await (const token of model.generate(ids, settings)) fresh += token.text;
    expect(second).toBe(fresh);
    expect(chat.messages.map(({ role }) => role)).toEqual(["system", "user", "assistant", "user", "assistant"]);
    chat.reset();
    expect(chat.messages.map(({ role }) => role)).toEqual(["system"]);
  });

  test("keeps an answer that was stopped, and forgets a message that failed", async () => {
    await using device = await reference();
    using model = await load(device);
    const chat = new Chat(model, template);
    const controller = new AbortController();
    const stopped = (async () => {
      for await (const _ of chat.send("a", { ...settings, signal: controller.signal })) controller.abort();
    })();
    await expect(stopped).rejects.toMatchObject({ code: "operation/aborted" });
    expect(chat.messages.length).toBe(2);
    await expect(answer(chat, "x".repeat(100))).rejects.toMatchObject({ code: "model/context-length" });
    expect(chat.messages.length).toBe(2);
    // The cache holds a token less than was given: the next answer is still right.
    const again = await answer(chat, "b");
    using other = await load(device);
    let fresh = "";
    const ids = other.tokenizer.encode(template.render(chat.messages.slice(0, -1)), { addSpecialTokens: false });
    for await (const token of other.generate(ids, settings)) fresh += token.text;
    expect(again).toBe(fresh);
  });
});

describe("fewbit chat", () => {
  let built: Built;
  let work: string;
  beforeAll(async () => {
    built = await Built.of("cli/main.ts");
    work = await mkdtemp(join(tmpdir(), "fewbit-chat-"));
    for (const [folder, config] of [
      ["plain", {}],
      ["chatty", { chat_template: TEMPLATE }],
    ] as const) {
      await mkdir(join(work, folder));
      const files = tinyModel({ config: { max_position_embeddings: 512 } });
      files.set("tokenizer_config.json", new TextEncoder().encode(JSON.stringify({ ...TOKENS, ...config })));
      for (const [name, bytes] of files) await writeFile(join(work, folder, name), bytes);
    }
  }, 120_000);
  afterAll(async () => {
    await built[Symbol.asyncDispose]();
    await rm(work, { recursive: true, force: true });
  });

  function chat(args: string[], during: (child: ChildProcessWithoutNullStreams) => void) {
    const all = [join(built.folder, "cli/main.js"), "chat", ...args, "--backend", "reference", "-q", "int8wo"];
    const child = spawn(process.execPath, all, { cwd: work });
    let [stdout, stderr] = ["", ""];
    child.stdout.setEncoding("utf8").on("data", (text: string) => (stdout += text));
    child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
    during(child);
    return new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve) =>
      child.on("close", (code) => resolve({ code, stdout, stderr })),
    );
  }

  test("answers the lines of a pipe on stdout and nothing else; commands are not messages", async () => {
    const lines = "one\n/help\n/reset\none\n/nonsense\n\n/exit\nnever\n";
    const { code, stdout, stderr } = await chat(["chatty", "-n", "6", "-t", "0"], (child) => child.stdin.end(lines));
    expect(code).toBe(0);
    expect(stderr).toMatch(/\/reset {2}forget/);
    expect(stderr).toMatch(/unknown command \/nonsense/);
    // Greedy answers to the same message after a reset are equal, and there is no third.
    const half = stdout.length / 2;
    expect(stdout.slice(0, half)).toBe(stdout.slice(half));
    expect(half).toBeGreaterThan(1);
  }, 120_000);

  test("Ctrl-C stops the answer and not the program", async () => {
    const { code, stdout } = await chat(["chatty", "-n", "400"], (child) => {
      child.stdin.write("talk\n");
      child.stdout.once("data", () => {
        child.kill("SIGINT");
        child.stdin.end("/help\n/exit\n");
      });
    });
    expect(code).toBe(0);
    expect(stdout.endsWith("\n")).toBe(true);
    // 400 tokens of a byte or more each would be longer.
    expect(stdout.length).toBeLessThan(300);
  }, 120_000);

  test("needs a template, and names those there are", async () => {
    const without = await chat(["plain"], (child) => child.stdin.end("hello\n"));
    expect([without.code, without.stdout]).toEqual([2, ""]);
    expect(without.stderr).toMatch(/chatml, transcript.*the model brings none/s);
    const unknown = await chat(["plain", "--template", "chatmk"], (child) => child.stdin.end());
    expect([unknown.code, unknown.stdout]).toEqual([2, ""]);
    expect(unknown.stderr).toMatch(/unknown chat template "chatmk"/);
    await writeFile(join(work, "own.jinja"), TEMPLATE);
    const own = await chat(["plain", "--template", "./own.jinja", "-n", "2"], (child) => child.stdin.end("hello\n"));
    expect([own.code, own.stderr]).toEqual([0, ""]);
  }, 120_000);
});
