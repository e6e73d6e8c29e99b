import { mkdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Browser, Locator, Page } from "playwright";
import { build } from "vite";
import { isReport, parseReport, type Report } from "../../src/validate/report.js";
import { launchChromium } from "../setup/chromium.js";
import { Site } from "./site.js";

const root = fileURLToPath(new URL("../..", import.meta.url));
/** What tests leave for people to look at. */
export const ARTIFACTS = join(root, "artifacts", "browser");
export const WIDE = { width: 1280, height: 900 };
export const NARROW = { width: 390, height: 844 };

/** The built page on a host, a browser with SwiftShader, and what pages said or asked for that they must not. */
export class Demo implements AsyncDisposable {
  readonly url: string;
  readonly browser: Browser;
  readonly complaints: string[] = [];
  readonly #site: Site;

  private constructor(site: Site, browser: Browser) {
    this.#site = site;
    this.url = site.url;
    this.browser = browser;
  }

  static async start(): Promise<Demo> {
    await mkdir(ARTIFACTS, { recursive: true });
    const outDir = join(root, ".cache", "browser-demo-test");
    await build({ configFile: join(root, "browser-demo", "vite.config.ts"), logLevel: "error", build: { outDir } });
    // A path of its own: nothing may point at the root of the host.
    const site = await Site.serve(outDir, "/some/folder/");
    return new Demo(site, await launchChromium({ adapter: "swiftshader" }));
  }

  /** Opens the page, by another name of its host or in another browser. Its errors and its requests elsewhere are complaints. */
  async open({ url = this.url, browser = this.browser } = {}): Promise<Page> {
    // Without a locale Chromium takes that of the process, whose name may be none that JavaScript knows.
    const context = await browser.newContext({ viewport: WIDE, locale: "en-US" });
    const page = await context.newPage();
    page.setDefaultTimeout(120_000);
    page.on("console", (message) => {
      if (message.type() === "error") this.complaints.push(`console: ${message.text()}`);
    });
    page.on("pageerror", (error) => this.complaints.push(`page error: ${error.message}`));
    context.on("request", (request) => {
      const asked = request.url();
      if (!asked.startsWith(this.#folder(url)) && !/^(blob|data):/.test(asked))
        this.complaints.push(`request: ${asked}`);
    });
    context.on("response", (response) => {
      if (response.status() >= 400) this.complaints.push(`HTTP ${response.status()}: ${response.url()}`);
    });
    await page.goto(url);
    return page;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.browser.close();
    await this.#site[Symbol.asyncDispose]();
  }

  #folder(url: string): string {
    return url.split("#", 1)[0] as string;
  }
}

export function close(page: Page): Promise<void> {
  return page.context().close();
}

export async function screenshot(page: Page, name: string, fullPage = true): Promise<void> {
  await page.screenshot({ path: join(ARTIFACTS, `${name}.png`), fullPage });
}

/** Waits until a run has ended and says how. */
export async function outcome(page: Page, id = "status", timeout = 240_000): Promise<string> {
  const status = page.locator(`#${id}`, { hasText: /^(Finished|Cancelled|Stopped|Device lost):/ });
  await status.waitFor({ timeout });
  return (await status.textContent()) ?? "";
}

/** What the page exports, read back. */
export async function exported(page: Page): Promise<{ report: Report; path: string }> {
  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#export")]);
  const path = join(ARTIFACTS, "report.json");
  await download.saveAs(path);
  const report = parseReport(await readFile(path, "utf8"));
  if (!isReport(report)) throw new Error("the exported file is no report");
  return { report, path };
}

/** What all processes of a browser have used together. */
export async function processorSeconds(of: Browser): Promise<number> {
  const session = await of.newBrowserCDPSession();
  const { processInfo } = await session.send("SystemInfo.getProcessInfo");
  await session.detach();
  return processInfo.reduce((sum, { cpuTime }) => sum + cpuTime, 0);
}

/** Whether a canvas has more than one colour. */
export function drawn(canvas: Locator): Promise<boolean> {
  return canvas.evaluate((element) => {
    const { data } = element.getContext("2d").getImageData(0, 0, element.width, element.height);
    const words = new Uint32Array(data.buffer);
    return words.some((word: number) => word !== words[0]);
  });
}
