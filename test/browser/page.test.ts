import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Page } from "playwright";
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import { caseTable, selectCases } from "../../src/validate/cases.js";
import { diffReports } from "../../src/validate/diff.js";
import { type Report, reportJson } from "../../src/validate/report.js";
import { makeReport } from "../../src/validate/run-tiers.js";
import { INSECURE_HOST, launchChromium } from "../setup/chromium.js";
import { contrast, unnamedControls } from "../support/accessibility.js";
import {
  ARTIFACTS,
  close,
  Demo,
  drawn,
  exported,
  NARROW,
  outcome,
  processorSeconds,
  screenshot,
  WIDE,
} from "../support/demo.js";

/**
 * Processor seconds that the whole quick matrix may take with SwiftShader. A test shares its machine; a run that has it alone ends
 * sooner, because it waits for nothing but its processes.
 */
const QUICK_SECONDS = 120;
vi.setConfig({ testTimeout: 300_000, hookTimeout: 300_000 });

let demo: Demo;
beforeAll(async () => {
  demo = await Demo.start();
});
afterAll(() => demo?.[Symbol.asyncDispose]());
afterEach(() => {
  expect(demo.complaints.splice(0)).toEqual([]);
});

describe("a run of the whole quick matrix", () => {
  let page: Page;
  let report: Report;
  let reportPath: string;
  beforeAll(async () => {
    page = await demo.open();
  });
  afterAll(() => close(page));

  test("says which adapter this is, and what it goes without", async () => {
    const card = page.locator("#adapter");
    await card.locator(".adapter-name").waitFor();
    const text = (await card.textContent()) ?? "";
    expect(text).toContain("swiftshader");
    expect(text).toContain("runs on the CPU");
    // SwiftShader has subgroups and no 16-bit floats: that tier and the matrix unit's kernel fall away.
    expect(await card.locator(".chip.off").allTextContents()).toEqual(["no f16"]);
    expect(text).toMatch(/webgpu\/linear\/subgroup_matrix falls away \(the device has no shader-f16\)/);
    expect(text).toMatch(/estimated [\d.]+ times slower/);
  });

  test("passes, fills the matrix and keeps within its time", async () => {
    const before = await processorSeconds(demo.browser);
    await page.click("#start");
    await page.locator(".matrix .cell.passed").first().waitFor();
    await screenshot(page, "validate-running");
    const text = await outcome(page, "status", 600_000);
    expect((await processorSeconds(demo.browser)) - before).toBeLessThan(QUICK_SECONDS);
    const planned = selectCases(caseTable(), { quick: true }).flatMap(({ runs }) => runs);
    const [, passed, failed, unsupported] =
      /^Finished: (\d+) passed, (\d+) failed(?:, (\d+) without a kernel)?/.exec(text)?.map(Number) ?? [];
    expect(failed).toBe(0);
    // The default tier runs every case, those above it a part.
    expect((passed as number) + (unsupported ?? 0)).toBeGreaterThan(planned.length);
    expect(await page.locator(".matrix .cell:is(.waiting, .partial, .failed)").count()).toBe(0);
    await screenshot(page, "validate-done");
  }, 660_000);

  test("is a report as the command line writes it", async () => {
    ({ report, path: reportPath } = await exported(page));
    expect(report.devices.map(({ tier }) => tier)).toEqual(["default", "portable", "subgroups"]);
    expect(report.absent).toMatchObject([{ tier: "f16", reason: expect.stringContaining("shader-f16") }]);
    expect(report.host).toContain("Chrome");
    const ids = selectCases(caseTable(), { quick: true }).flatMap(({ runs }) => runs.map(({ id }) => id));
    const ran = report.results.filter(({ tier }) => tier === "default").map(({ id }) => id);
    expect(ran.sort()).toEqual(ids.sort());
    for (const { status, kernels, wgsl } of report.results)
      if (status === "passed") expect([kernels.length > 0, wgsl.length > 0]).toEqual([true, true]);
  });

  test("agrees bit for bit with Node on the same adapter, on every quantize case", async () => {
    const about = { fewbit: report.fewbit, host: "Node", created: new Date().toISOString() };
    const selection = { quick: true, ops: ["quantize"] };
    const node = await makeReport(
      { backends: ["webgpu"], tiers: ["default"], open: { adapter: "software" }, selection },
      about,
    );
    const here: Report = {
      ...report,
      results: report.results.filter(({ op, tier }) => op === "quantize" && tier === "default"),
    };
    expect(node.results.filter(({ digest }) => digest !== null).length).toBeGreaterThan(20);
    for (const result of node.results) {
      const other = here.results.find(({ id }) => id === result.id);
      expect([result.id, other?.status, other?.digest]).toEqual([result.id, result.status, result.digest]);
      // What a norm or an activation has made has a tolerance, and so have its codes: those are compared by their errors alone.
      const exact = result.status !== "unsupported" && result.id.includes("/values/");
      expect(result.digest !== null, result.id).toBe(exact);
    }
    expect(diffReports(node, here)).toEqual({ status: [], details: [], same: node.results.length });
  });

  test("opens a cell by keyboard: errors, kernel, shader, time", async () => {
    const grid = page.locator(".matrix");
    await grid.locator("[tabindex='0']").focus();
    // From quantize over dequantize to linear, and two formats down.
    for (const key of ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"]) await page.keyboard.press(key);
    const focused = page.locator(".matrix :focus");
    expect(await focused.getAttribute("aria-label")).toMatch(/^bf16, linear: /);
    await page.keyboard.press("Enter");
    const dialog = page.getByRole("dialog");
    await dialog.locator(".pictures").first().waitFor();
    const text = (await dialog.textContent()) ?? "";
    for (const part of [
      /Time[\d.]+ m?s/,
      /-> webgpu\/linear\//,
      /@compute @workgroup_size/,
      /fewbit validate --backend webgpu/,
    ])
      expect(text).toMatch(part);
    const histogram = dialog.getByRole("img", { name: /^Histogram of the errors of .*: [\d,]+ elements/ }).first();
    expect(await drawn(histogram.locator("canvas"))).toBe(true);
    const heatmap = dialog.getByRole("img", { name: /^Error of each element of/ }).first();
    expect(await drawn(heatmap)).toBe(true);
    expect(await unnamedControls(page)).toEqual([]);
    await screenshot(page, "detail-light-1280", false);
    await page.emulateMedia({ colorScheme: "dark" });
    await page.setViewportSize(NARROW);
    expect(await dialog.evaluate((element) => element.scrollWidth - element.clientWidth)).toBe(0);
    expect(await contrast(page)).toEqual([]);
    await screenshot(page, "detail-dark-390", false);
    await page.emulateMedia({ colorScheme: null });
    await page.setViewportSize(WIDE);
    await page.keyboard.press("Escape");
    await dialog.waitFor({ state: "hidden" });
    // Focus is back where it was.
    expect(await focused.getAttribute("aria-label")).toMatch(/^bf16, linear: /);
  });

  test("is compared with an imported report", async () => {
    const [first] = report.results;
    const changed: Report = {
      ...report,
      results: report.results
        .slice(1)
        .map((result) =>
          result.op === "quantize" && result.digest !== null ? { ...result, digest: "0".repeat(64) } : result,
        ),
    };
    const changedPath = join(ARTIFACTS, "changed.json");
    await writeFile(changedPath, reportJson(changed));
    await page.getByRole("link", { name: "Compare" }).click();
    const tally = page.locator("#tally");
    await page.getByLabel("B: another report").setInputFiles(reportPath);
    await tally.filter({ hasText: `${report.results.length} the same, 0 with another outcome, 0 with` }).waitFor();

    await page.getByLabel("B: another report").setInputFiles(changedPath);
    const expected = diffReports(report, changed);
    expect(expected.details.length).toBeGreaterThan(20);
    await tally
      .filter({ hasText: `${expected.same} the same, 1 with another outcome, ${expected.details.length} with another` })
      .waitFor();
    const text = (await page.locator("#comparison").textContent()) ?? "";
    expect(text).toContain(`${first?.id}only in A: passed`);
    expect(text).toContain("stored bits differ");
    await screenshot(page, "compare");

    const brokenPath = join(ARTIFACTS, "broken.json");
    await writeFile(brokenPath, '{"format": 1}');
    await page.getByLabel("B: another report").setInputFiles(brokenPath);
    const alert = page.locator("#comparison").getByRole("alert");
    expect(await alert.textContent()).toContain("no report of fewbit validate");
    await page.getByRole("link", { name: "Validate" }).click();
  });

  test.each([
    ["light", WIDE],
    ["dark", WIDE],
    ["light", NARROW],
    ["dark", NARROW],
  ] as const)("is readable in %s at %o", async (colorScheme, viewport) => {
    await page.emulateMedia({ colorScheme });
    await page.setViewportSize(viewport);
    // Nothing but the matrix itself scrolls sideways.
    expect(await page.evaluate("document.documentElement.scrollWidth")).toBeLessThanOrEqual(viewport.width);
    expect(await contrast(page)).toEqual([]);
    await screenshot(page, `validate-${colorScheme}-${viewport.width}`);
    await page.emulateMedia({ colorScheme: null });
    await page.setViewportSize(WIDE);
  });
});

describe("text", () => {
  test("is generated in a format, with its speed and its distance from the reference", async () => {
    const page = await demo.open();
    await page.getByRole("link", { name: "Generate" }).click();
    await page.fill("#quantize", "mxfp4wo");
    await page.fill("#max-tokens", "12");
    await page.keyboard.press("Enter");
    expect(await outcome(page, "generate-status")).toBe("Finished: 12 tokens, 12 positions compared.");
    expect((await page.locator("#text .made").textContent())?.length).toBeGreaterThan(12);
    expect(await page.locator("#speed").textContent()).toMatch(/Decoding[\d.]+ tokens\/s/);
    await page.locator("#differences summary").click();
    const rows = await page.locator("#differences tbody tr").allTextContents();
    expect(rows).toHaveLength(12);
    const cells = await page.locator("#differences tbody tr td:nth-child(3)").allTextContents();
    const ranges = await page.locator("#differences tbody tr td:nth-child(4)").allTextContents();
    // Eight layers of float32 arithmetic: far above one rounding, far below anything a wrong weight would do.
    for (const [i, cell] of cells.entries()) expect(Number(cell) / Number(ranges[i])).toBeLessThan(2 ** -12);
    for (const [scheme, viewport] of [
      ["light", WIDE],
      ["dark", NARROW],
    ] as const) {
      await page.emulateMedia({ colorScheme: scheme });
      await page.setViewportSize(viewport);
      expect(await page.evaluate("document.documentElement.scrollWidth")).toBeLessThanOrEqual(viewport.width);
      expect(await contrast(page)).toEqual([]);
      await screenshot(page, `generate-${scheme}-${viewport.width}`);
    }

    await page.fill("#quantize", "int4wo-63x");
    await page.click("#generate");
    expect(await outcome(page, "generate-status")).toMatch(/^Stopped/);
    expect(await page.locator("#generation").getByRole("alert").textContent()).toMatch(/did you mean .*int4wo-64/);
    await close(page);
  });

  test("can be cancelled, and generated again", async () => {
    const page = await demo.open({ url: `${demo.url}#generate` });
    await page.fill("#max-tokens", "512");
    await page.click("#generate");
    await page.locator("#text .made:not(:empty)").waitFor();
    await page.click("#generate-cancel");
    expect(await outcome(page, "generate-status")).toMatch(/^Cancelled: [1-9]\d* tokens/);
    await page.fill("#max-tokens", "2");
    await page.uncheck("#compare-reference");
    await page.click("#generate");
    expect(await outcome(page, "generate-status")).toBe("Finished: 2 tokens.");
    await close(page);
  });
});

describe("a run that is stopped", () => {
  const done = async (page: Page) =>
    Number(/: (\d+) of/.exec((await page.locator("#status").textContent()) ?? "")?.[1]);

  test("by its user keeps its results and goes on", async () => {
    const page = await demo.open();
    await page.selectOption("#tier", "default");
    await page.click("#start");
    await page.locator(".matrix .cell.passed").nth(3).waitFor();
    // What is timed runs alone: text waits for its turn, and can be cancelled while it waits.
    await page.getByRole("link", { name: "Generate" }).click();
    await page.click("#generate");
    await page.getByText("Waiting for the other run to finish").waitFor();
    await page.click("#generate-cancel");
    expect(await outcome(page, "generate-status")).toBe("Cancelled: 0 tokens.");
    await page.getByRole("link", { name: "Validate" }).click();
    await page.click("#cancel");
    expect(await outcome(page)).toMatch(/^Cancelled: [1-9]\d* passed, 0 failed/);
    expect(await page.locator("#continue").isVisible()).toBe(true);
    const { report } = await exported(page);
    expect(report.results.length).toBeGreaterThan(3);
    await close(page);
  });

  test("by the loss of its device says so, and goes on with a new one", async () => {
    const page = await demo.open();
    await page.selectOption("#tier", "default");
    await page.getByText("Test the recovery").click();
    await page.click("#start");
    await page.locator(".matrix .cell.passed").nth(3).waitFor();
    await page.click("#lose");
    const before = Number(/^Device lost: (\d+) passed, 0 failed/.exec(await outcome(page))?.[1]);
    expect(before).toBeGreaterThan(3);
    const alert = page.locator("#notices").getByRole("alert");
    expect(await alert.textContent()).toContain("The GPU device was lost");
    expect(await page.locator("#continue").evaluate((element) => element === element.ownerDocument.activeElement)).toBe(
      true,
    );
    await screenshot(page, "device-lost");
    await page.keyboard.press("Enter");
    await expect.poll(() => done(page), { timeout: 60_000 }).toBeGreaterThan(3);
    expect(await alert.count()).toBe(0);
    // Nothing ran twice: the results of both parts are those of one run.
    await page.click("#cancel");
    expect(await outcome(page)).toMatch(/^(Cancelled|Finished): \d+ passed, 0 failed/);
    const { report } = await exported(page);
    expect(report.results.length).toBeGreaterThan(before + 3);
    expect(new Set(report.results.map(({ id }) => id)).size).toBe(report.results.length);
    expect(report.devices).toHaveLength(1);
    await close(page);
  });

  test("text too: a lost device is shown, and the next attempt works", async () => {
    const page = await demo.open({ url: `${demo.url}#generate` });
    await page.fill("#max-tokens", "512");
    await page.click("#generate");
    await page.locator("#text .made:not(:empty)").waitFor();
    await page.getByRole("link", { name: "Validate" }).click();
    await page.getByText("Test the recovery").click();
    await page.click("#lose");
    await page.getByRole("link", { name: "Generate" }).click();
    expect(await outcome(page, "generate-status")).toMatch(/^Device lost/);
    await page.fill("#max-tokens", "2");
    await page.uncheck("#compare-reference");
    await page.getByRole("button", { name: "Try again on a new device" }).click();
    expect(await outcome(page, "generate-status")).toBe("Finished: 2 tokens.");
    await close(page);
  });
});

describe("everybody", () => {
  test("can name and reach every control, in the order that is seen", async () => {
    const page = await demo.open();
    await page.locator("#adapter .adapter-name").waitFor();
    for (const name of ["Validate", "Generate", "Compare"]) {
      await page.getByRole("link", { name }).click();
      expect(await unnamedControls(page)).toEqual([]);
      expect(await page.getByRole("heading", { level: 1 }).filter({ visible: true }).count()).toBe(1);
      expect(await page.getByRole("main").count()).toBe(1);
      expect(await page.locator("nav [aria-current=page]").textContent()).toBe(name);
    }
    await page.getByRole("link", { name: "Validate" }).click();
    await page.locator("body").press("Control+Home");
    const order: string[] = [];
    await page.reload();
    await page.locator(".matrix .cell").first().waitFor();
    for (let i = 0; i < 8; i++) {
      await page.keyboard.press("Tab");
      const focused = page.locator(":focus");
      order.push((await focused.getAttribute("id")) || (await focused.textContent()) || "");
    }
    expect(order.slice(0, 7)).toEqual(["Skip to content", "Validate", "Generate", "Compare", "table", "tier", "start"]);
    expect(await page.locator("#announce[aria-live=polite]").count()).toBe(1);
    await close(page);
  });

  test("without WebGPU is told what to do", async () => {
    const page = await demo.open({ url: demo.url.replace("127.0.0.1", INSECURE_HOST) });
    expect(await page.getByRole("heading", { level: 1 }).textContent()).toBe("This page has no WebGPU");
    expect(await page.locator("main").textContent()).toContain("Open the page by https or from localhost");
    expect(await contrast(page)).toEqual([]);
    await screenshot(page, "no-webgpu");
    await close(page);
  });

  test("without an adapter is told what to do, and may start all the same", async () => {
    const bare = await launchChromium({ adapter: "none" });
    try {
      const page = await demo.open({ browser: bare });
      const alert = page.locator("#adapter").getByRole("alert");
      expect(await alert.textContent()).toContain("it offers no adapter");
      expect(await page.locator("#adapter").textContent()).toContain("--enable-unsafe-webgpu");
      await page.click("#start");
      expect(await outcome(page)).toMatch(/^Stopped: 0 passed/);
      expect(await page.locator("#notices").getByRole("alert").textContent()).toContain("no webgpu device");
      await screenshot(page, "no-adapter");
      await close(page);
    } finally {
      await bare.close();
    }
  });
});
