import { mkdtemp, rename, rm, stat } from "node:fs/promises";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { type Browser, chromium } from "playwright";
import { provisionSwiftShader } from "../../src/backends/webgpu/node.js";

/** Flags with which Chromium runs WebGPU on SwiftShader, compiling shaders as fewbit's Dawn in Node does. */
const SWIFTSHADER = [
  "--enable-unsafe-webgpu",
  "--use-webgpu-adapter=swiftshader",
  "--enable-dawn-features=disable_workgroup_init",
];

/** A name for this machine that browsers do not trust as they trust localhost: its pages are not secure. */
export const INSECURE_HOST = "fewbit.test";

/**
 * Chromium from the development package `@sparticuz/chromium`, with WebGPU on SwiftShader or without an adapter. On other platforms
 * than its own, the one that `npx playwright install chromium` puts where Playwright looks.
 */
export async function launchChromium({ adapter }: { readonly adapter: "swiftshader" | "none" }): Promise<Browser> {
  const packaged = process.platform === "linux" && process.arch === "x64";
  const home = packaged ? await provisionChromium() : null;
  const libraries = [home && join(home, LIBRARIES), process.env.LD_LIBRARY_PATH].filter(Boolean).join(":");
  return chromium.launch({
    ...(home !== null && {
      executablePath: join(home, "chromium"),
      env: { ...process.env, LD_LIBRARY_PATH: libraries } as Record<string, string>,
    }),
    args: [
      // Tests run as root in containers, where the sandbox cannot be set up.
      "--no-sandbox",
      `--host-resolver-rules=MAP ${INSECURE_HOST} 127.0.0.1`,
      ...(adapter === "swiftshader" ? SWIFTSHADER : []),
    ],
  });
}

/** Where the libraries lie that Chromium asks the system for and bare systems lack (NSS). */
const LIBRARIES = "al2023/lib";

/**
 * The folder of the inflated package. It is inflated once, beside SwiftShader's files: elsewhere, and renamed into place as a whole, so
 * processes that do this together, and one that is killed in the middle, do no harm.
 */
async function provisionChromium(): Promise<string> {
  const { folder } = await provisionSwiftShader();
  const version = basename(folder).replace("swiftshader-", "");
  const home = join(dirname(folder), `headless-${version}`);
  const last = join(home, LIBRARIES);
  if (await exists(last)) return home;
  const work = await mkdtemp(join(dirname(folder), ".chromium-"));
  try {
    await inflateInto(work);
    await rename(work, home).catch(async (error: unknown) => {
      // Another process was first.
      if (!(await exists(last))) throw error;
    });
  } finally {
    await rm(work, { recursive: true, force: true });
  }
  return home;
}

/** The package inflates into the folder for temporary files, which it asks the environment for. */
async function inflateInto(folder: string): Promise<void> {
  const saved = process.env.TMPDIR;
  process.env.TMPDIR = folder;
  try {
    const entry = createRequire(import.meta.url).resolve("@sparticuz/chromium");
    const { default: packaged } = (await import(entry)) as { default: { executablePath(): Promise<string> } };
    await packaged.executablePath();
    // By itself the package brings these to the systems only that it knows to lack them.
    const { inflate } = (await import(join(dirname(entry), "../esm/lambdafs.js"))) as {
      inflate(file: string): Promise<string>;
    };
    await inflate(join(dirname(entry), "../../bin/al2023.tar.br"));
  } finally {
    if (saved === undefined) delete process.env.TMPDIR;
    else process.env.TMPDIR = saved;
  }
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}
